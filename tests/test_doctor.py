"""`gradtrace doctor` finds what is wrong with an index or a service, says how to put it right, and changes nothing."""

from __future__ import annotations

import json
import os
import resource
import shutil
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI, Response
from typer.testing import CliRunner

import digits_task
from conftest import DigitsRun, serving_when_ready, wait_until
from gradtrace import QueryError
from gradtrace.store.manifest import MANIFEST_NAME, PENDING_NAME
from gradtrace.store.manifest_file import read_manifest
from gradtrace_client.service_schemas import VERSION_HEADER
from gradtrace_indexer import delete_rows
from gradtrace_indexer.generations import successor
from gradtrace_indexer.writing.files import write_manifest
from gradtrace_service import cli
from gradtrace_service.app import create_app, create_service
from gradtrace_service.http.api_keys import Scope, add_key
from gradtrace_service.indexes.hosted import Hosted
from gradtrace_service.settings import Settings

Findings = list[dict[str, str]]


@pytest.fixture
def run(digits_index: DigitsRun, tmp_path: Path) -> DigitsRun:
    """A copy that a test may change."""
    shutil.copytree(digits_index.index.parent, tmp_path / "run")
    return DigitsRun(tmp_path / "run" / "checkpoints", tmp_path / "run" / "index", digits_index.task)


def doctor(*words: str | Path) -> Findings:
    """The findings, after a check that the exit code fits them, and that the report in lines says the same."""
    outcome = CliRunner().invoke(cli.app, ["doctor", *map(str, words), "--json"])
    findings: Findings = json.loads(outcome.stdout)["findings"]
    problems = [finding for finding in findings if finding["state"] == "problem"]
    assert outcome.exit_code == bool(problems), outcome.output
    return findings


def about(findings: Findings, topic: str, state: str) -> str:
    return "\n".join(finding["text"] for finding in findings if (finding["topic"], finding["state"]) == (topic, state))


def wrong(findings: Findings) -> set[tuple[str, str]]:
    return {(finding["topic"], finding["state"]) for finding in findings if finding["state"] != "ok"}


def contents(folder: Path) -> dict[str, tuple[bytes, float]]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): (path.read_bytes(), path.stat().st_mtime) for path in files}


def test_a_sound_index_is_ok_and_stays_as_it_is(run: DigitsRun) -> None:
    delete_rows(run.index, [3])
    before = contents(run.index.parent)
    findings = doctor(run.index, "--task", run.task)
    # What the machine lacks is not the index's fault.
    assert wrong(findings) <= {(topic, "warning") for topic in ("file system", "disk", "descriptors", "memory")}
    assert "generation 2" in about(findings, "manifest", "ok")
    assert "all bytes match" in about(findings, "files", "ok")
    assert about(findings, "generations", "ok") == "1 earlier ones to roll back to: 1"
    assert "first query" in about(findings, "task", "ok")
    assert contents(run.index.parent) == before


def test_the_report_is_lines_that_can_be_passed_on(run: DigitsRun) -> None:
    report = CliRunner().invoke(cli.app, ["doctor", str(run.index)]).stdout.splitlines()
    assert report[0].split() == ["checked:", str(run.index)]
    assert {line.split(":")[0] for line in report[:7]} >= {"time", "gradtrace", "torch", "python", "system"}
    assert report[-1] == "0 problem(s), 0 warning(s), 12 ok" or "warning" in report[-1]
    assert all(line.split()[0] in ("ok", "warning", "problem") for line in report[7:-1])


def flip_a_byte(run: DigitsRun) -> None:
    path = run.index / read_manifest(run.index).shards[0].rows.path
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def remove_weights(run: DigitsRun) -> None:
    (run.index / read_manifest(run.index).checkpoints[0].file).unlink()


def leave_a_stray_file(run: DigitsRun) -> None:
    (run.index / "rows" / "left.tmp").write_bytes(bytes(1000))


def date_a_file_into_the_future(run: DigitsRun) -> None:
    os.utime(run.index / MANIFEST_NAME, (time.time() + 7200,) * 2)


def begin_an_update(run: DigitsRun) -> None:
    write_manifest(run.index, PENDING_NAME, successor(read_manifest(run.index), "compact"))


def build_with_another_torch(run: DigitsRun) -> None:
    manifest = read_manifest(run.index)
    write_manifest(run.index, MANIFEST_NAME, manifest.model_copy(update={"libraries": {"torch": "1.13.0"}}))


def let_others_write(run: DigitsRun) -> None:
    run.index.chmod(run.index.stat().st_mode | stat.S_IWOTH)


def lose_an_earlier_generation(run: DigitsRun) -> None:
    delete_rows(run.index, [3])
    delete_rows(run.index, [4])
    (run.index / str(read_generation_two(run.index)["deleted"]["path"])).unlink()


def read_generation_two(index: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((index / "generations" / "2.json").read_text())
    return content


@pytest.mark.parametrize(
    ("fault", "topic", "state", "text"),
    [
        (flip_a_byte, "files", "problem", "does not match its checksum"),
        (remove_weights, "weights", "problem", "restore the file"),
        (
            leave_a_stray_file,
            "stray files",
            "warning",
            "rows/left.tmp; while nothing writes the index, `gradtrace prune",
        ),
        (date_a_file_into_the_future, "clock", "warning", "manifest.json is 7,"),
        (begin_an_update, "unfinished", "warning", "gradtrace discard"),
        (build_with_another_torch, "versions", "warning", "torch 1.13.0 then"),
        (let_others_write, "permissions", "warning", "chmod go-w"),
        (lose_an_earlier_generation, "generations", "warning", "generation 2: deleted/"),
    ],
)
def test_each_fault_of_an_index_is_found_alone_with_its_remedy(
    run: DigitsRun, fault: Callable[[DigitsRun], None], topic: str, state: str, text: str
) -> None:
    machine = wrong(doctor(run.index))
    fault(run)
    findings = doctor(run.index)
    assert wrong(findings) - machine == {(topic, state)}
    assert text in about(findings, topic, state)


def test_an_unwritten_checksum_is_found_when_sizes_are_right_and_all_is_read(
    run: DigitsRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gradtrace_service.doctor.index_files._QUICKLY_READ", 0)
    flip_a_byte(run)
    assert "--deep reads all bytes" in about(doctor(run.index), "files", "ok")
    assert "does not match" in about(doctor(run.index, "--deep"), "files", "problem")


def test_no_index_and_a_damaged_manifest_are_one_problem(run: DigitsRun) -> None:
    assert wrong(doctor(run.index.parent)) == {("manifest", "problem")}
    (run.index / MANIFEST_NAME).write_text("{")
    assert wrong(doctor(run.index)) == {("manifest", "problem")}


def test_what_cannot_be_checked_is_said_and_the_rest_is_checked(run: DigitsRun) -> None:
    (run.index / "pending.json").write_text("{")
    findings = doctor(run.index)
    assert "could not be checked: CorruptIndexError" in about(findings, "stray files", "problem")
    assert about(findings, "files", "ok")


def test_an_earlier_generation_that_cannot_be_read_is_warned_of(run: DigitsRun) -> None:
    delete_rows(run.index, [3])
    (run.index / "generations" / "1.json").write_text("{")
    (run.index / "generations" / "notes.json").write_text("{")
    assert "generation 1 cannot be rolled back to" in about(doctor(run.index), "generations", "warning")


def test_a_task_that_does_not_fit_is_a_problem(run: DigitsRun, tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("raise ValueError('of the task')")
    assert "of the task" in about(doctor(run.index, "--task", f"{broken}:TASK"), "task", "problem")


def test_moved_weights_are_found_where_they_are_now(run: DigitsRun) -> None:
    moved = run.checkpoints.rename(run.checkpoints.with_name("moved"))
    assert ("weights", "problem") in wrong(doctor(run.index))
    assert ("weights", "problem") not in wrong(doctor(run.index, "--checkpoints", moved))


def test_few_descriptors_are_warned_of(run: DigitsRun) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (260, hard))
    try:
        assert "raise it to" in about(doctor(run.index), "descriptors", "warning")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
def guarded(digits_index: DigitsRun, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A service that asks for keys, and their file."""
    add_key(tmp_path / "keys", "first", [Scope.query])
    hosted = [Hosted("digits", digits_index.index, digits_index.task)]
    with serving_when_ready(create_service(hosted, Settings(api_key_file=tmp_path / "keys"))) as url:
        yield url, tmp_path / "keys"


def test_a_sound_service_is_ok(guarded: tuple[str, Path]) -> None:
    url, file = guarded
    both = doctor(url, "--api-key", add_key(file, "both", [Scope.query, Scope.admin]))
    assert {topic for topic, state in wrong(both)} <= {"latency", "disk"}
    assert about(both, "keys", "ok").splitlines() == ["who has none is refused", "the given one has query and admin"]
    assert about(both, "indexes", "ok") == f"digits: generation 1, {digits_task.TRAIN_ROWS} rows, loaded"
    assert "20 queries one by one: p50" in both_latency(both)
    assert "descriptors are open" in about(both, "process", "ok")
    assert "queue_size 256" in about(both, "limits", "ok")
    assert "digits: generation 1 is published" in about(both, "generations", "ok")


def both_latency(findings: Findings) -> str:
    """A slow machine is warned of."""
    return about(findings, "latency", "ok") + about(findings, "latency", "warning")


def test_keys_are_told_apart(guarded: tuple[str, Path]) -> None:
    url, file = guarded
    without, unknown = doctor(url), doctor(url, "--api-key", "gradtrace_nonsense")
    assert "GRADTRACE_API_KEY" in about(without, "keys", "warning")
    assert "not known" in about(unknown, "keys", "problem")
    admin = doctor(url, "--api-key", add_key(file, "keeper", [Scope.admin]))
    assert "lacks the scope query" in about(admin, "keys", "warning")
    assert not any(finding["topic"] == "latency" for finding in without + unknown + admin)
    key = add_key(file, "reader", [Scope.query])
    report = CliRunner().invoke(cli.app, ["doctor", url, "--api-key", key])
    assert "the given one has query\n" in report.stdout
    assert key not in report.stdout


def test_a_service_without_keys_that_answers_any_name_is_a_problem(digits_index: DigitsRun) -> None:
    with serving_when_ready(create_app(digits_index.open())) as url:
        findings = doctor(url)
    assert "web pages can ask" in about(findings, "host", "problem")
    assert "none are asked for" in about(findings, "keys", "ok")  # only this machine reaches it


def test_what_goes_wrong_in_a_service_is_in_its_metrics(run: DigitsRun) -> None:
    hosted = [Hosted("digits", run.index, run.task), Hosted("gone", run.index.with_name("gone"), run.task)]
    shutil.copytree(run.index, hosted[1].path)
    with serving_when_ready(create_service(hosted, Settings(processes=0))) as url:
        shutil.rmtree(hosted[1].path)
        doctor(url)
        flip_a_byte(run)
        write_manifest(run.index, MANIFEST_NAME, read_manifest(run.index).model_copy(update={"generation": 2}))
        findings = doctor(url)
    assert "gone: its manifest cannot be read" in about(findings, "indexes", "problem")
    assert "from generation 1, and 2 is published" in about(findings, "generations", "warning")


def test_a_service_that_is_not_there_or_is_another_is_said(run: DigitsRun) -> None:
    assert "is `gradtrace serve` running there?" in about(doctor("http://127.0.0.1:9"), "reachable", "problem")
    server = HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    findings = doctor(f"http://127.0.0.1:{server.server_port}")
    server.shutdown()
    thread.join()
    server.server_close()
    assert "not a Gradtrace service" in about(findings, "reachable", "problem")


@pytest.mark.parametrize("words", [["http://h", "--api-key", "g\u00e4h"], ["http://h:x"]])
def test_what_is_no_address_or_no_key_is_refused_without_showing_the_key(words: list[str]) -> None:
    with pytest.raises(QueryError, match=r"copy it again|is not an address") as refusal:
        CliRunner().invoke(cli.app, ["doctor", *words], catch_exceptions=False)
    assert "g\u00e4h" not in str(refusal.value)


def odd_service(**headers: str) -> FastAPI:
    """One that is alive, and refuses everything else; with these headers."""
    app = FastAPI()

    @app.get("/healthz")
    def healthz(response: Response) -> None:
        response.headers.update(headers)

    return app


def test_another_version_and_another_time_are_said() -> None:
    with uvicorn_serving(odd_service(**{VERSION_HEADER: "9.1.0"})) as url:
        assert "pip install 'gradtrace-client==9.1.0'" in about(doctor(url), "versions", "problem")
    late = {VERSION_HEADER: "0.1.0", "Date": formatdate(time.time() - 3600, usegmt=True)}
    app = odd_service(**late)
    with uvicorn_serving(app, date_header=False) as url:
        findings = doctor(url)
    assert "3600 s behind" in about(findings, "clock", "warning") or "behind" in about(findings, "clock", "warning")
    assert "/readyz 404" in about(findings, "health", "problem")
    assert about(findings, "indexes", "problem")


@contextmanager
def uvicorn_serving(app: FastAPI, **options: Any) -> Iterator[str]:
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", **options))
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_until(lambda: server.started)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"{'https' if options.get('ssl_certfile') else 'http'}://localhost:{port}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the command openssl")
def test_a_certificate_that_ends_soon_is_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    words = "req -x509 -newkey rsa:2048 -nodes -days 3 -subj /CN=localhost -addext subjectAltName=DNS:localhost"
    files = ["-keyout", str(key), "-out", str(certificate)]
    subprocess.run(["openssl", *words.split(), *files], check=True, capture_output=True)
    app = odd_service(**{VERSION_HEADER: "0.1.0"})
    with uvicorn_serving(app, ssl_keyfile=str(key), ssl_certfile=str(certificate)) as url:
        unknown = doctor(url)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        findings = doctor(url)
    assert "CERTIFICATE_VERIFY_FAILED" in about(unknown, "reachable", "problem")
    assert "the certificate ends in 3 days" in about(findings, "transport", "warning")
    assert "renew it" in about(findings, "transport", "warning")
