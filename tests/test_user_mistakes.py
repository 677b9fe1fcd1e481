"""What users get wrong with `serve` and `query` ends in one line that names the remedy, without a traceback."""

from __future__ import annotations

import http.server
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from conftest import DigitsRun
from gradtrace_service import cli
from gradtrace_service.server import refuse_taken
from gradtrace_service.settings import SettingsError

pytestmark = pytest.mark.unit

Run = Callable[..., str]


@pytest.fixture
def error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> Run:
    """Runs the program; gives what it says when it ends with 1, without `error: `."""

    def run(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["gradtrace", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 1
        said = capsys.readouterr().err
        assert said.startswith("error: ")
        assert said.count("error: ") == 1
        assert "Traceback" not in said
        assert not [record for record in caplog.records if record.levelname == "ERROR"]  # told once
        return said.removeprefix("error: ")

    return run


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening


def test_a_port_that_is_taken_is_told_before_anything_is_loaded(
    digits_index: DigitsRun, listener: socket.socket, error: Run
) -> None:
    port = listener.getsockname()[1]
    for words in (["serve", str(digits_index.index), "--task", "none.py:TASK"], ["demo", "--once"]):
        assert f"port {port}: Address already in use" in error(*words, "--port", str(port))
    with pytest.raises(SettingsError, match="give another --port \\(0 takes a free one\\)"):
        refuse_taken("127.0.0.1", port)
    refuse_taken("127.0.0.1", 0)
    refuse_taken("localhost", 0)


def test_an_address_of_no_machine_here(error: Run) -> None:
    assert "--host no.such.invalid is not" in error("serve", "x", "--task", "t:T", "--host", "no.such.invalid")
    with pytest.raises(SettingsError, match=r"cannot listen on 192\.0\.2\.1.*give an address of this machine"):
        refuse_taken("192.0.2.1", 8000)


def test_a_wrong_task_or_index(digits_index: DigitsRun, tmp_path: Path, error: Run) -> None:
    index = str(digits_index.index)
    for command in (("serve", "--port", "0"), ("query", "--query-row", "3")):
        name, *more = command
        assert "there is no file none.py" in error(name, index, "--task", "none.py:TASK", *more)
        assert "tasks found there: TASK" in error(name, index, "--task", digits_index.task + "S", *more)
        assert "build one with `gradtrace build`" in error(name, f"{tmp_path}/no", "--task", digits_index.task, *more)
    said = error("query", index, "--task", wrong_model(tmp_path), "--query-row", "3")
    assert "ZeroDivisionError: division by zero" in said
    assert "wrong_model.py, line" in said


def wrong_model(folder: Path) -> str:
    path = folder / "wrong_model.py"
    path.write_text(
        "import digits_task\nfrom gradtrace.tasks import ImageClassification\n"
        "TASK = ImageClassification(lambda: 1 / 0, train=lambda: digits_task.load(slice(400)), "
        "class_names=digits_task.NAMES)\n"
    )
    return f"{path}:TASK"


class _Silent(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


def test_a_wrong_address_of_a_service(listener: socket.socket, error: Run) -> None:
    nobody = f"http://127.0.0.1:{listener.getsockname()[1]}"
    listener.close()
    assert "is `gradtrace serve` running there?" in error("query", nobody, "--query-row", "3")
    assert "is not an http:// address" in error("query", "127.0.0.1:8000", "--query-row", "3")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Silent) as other:
        thread = threading.Thread(target=other.serve_forever)
        thread.start()
        said = error("query", f"http://127.0.0.1:{other.server_port}", "--query-row", "3")
        other.shutdown()
        thread.join()
    assert "check host and port" in said
