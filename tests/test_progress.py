"""How progress is shown where stderr is a terminal, and where it is a pipe."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

import tiny
from gradtrace_indexer import build_index, progress
from gradtrace_indexer.progress import LINE_SECONDS

SCRIPT = """
from gradtrace_indexer import progress
progress.LINE_SECONDS = {seconds}
with progress.progress_bar("index", 2000, " rows") as bar:
    for _ in range(1000):
        bar.update(2)
for _ in progress.progress_bar("kernels", 3, items=range(3)):
    pass
with progress.progress_bar("hidden", 10, " rows", shown=False) as bar:
    bar.update(10)
progress.note("a line of its own")
"""
LINE = r"(index|kernels): +\d+% \d+/\d+ \[\d\d:\d\d<(\d\d:\d\d|\?), .*(rows|it)/s\]"


def piped(seconds: float) -> list[str]:
    """What the script writes to a pipe, line by line."""
    command = [sys.executable, "-c", SCRIPT.format(seconds=seconds)]
    text = subprocess.run(command, capture_output=True, check=True).stderr.decode()
    assert "\r" not in text
    assert text.endswith("\n")
    return text.splitlines()


def test_a_log_gets_the_beginning_and_the_end_of_what_takes_less_than_ten_seconds() -> None:
    *bars, note = piped(LINE_SECONDS)
    assert note == "a line of its own"
    assert all(re.fullmatch(LINE, line) for line in bars), bars
    shares = [re.search(r"^(.*): +(\d+)%", line) for line in bars]
    assert [(match[1], match[2]) for match in shares if match] == [
        ("index", "0"),
        ("index", "100"),
        ("kernels", "0"),
        ("kernels", "100"),
    ]


@pytest.mark.long
def test_a_log_gets_a_line_for_each_interval() -> None:
    lines = piped(0.0)
    assert all(re.fullmatch(LINE, line) for line in lines[:-1]), lines
    assert len(lines) > 500


def test_the_log_of_a_build_says_which_checkpoint_it_is_at(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the next line that is due, without one of its own for each checkpoint."""
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    task = tiny.PairTask(tiny.mlp, tiny.classes(30))
    build_index(task, tiny.checkpoints(task, tmp_path), tmp_path / "index", batch_size=10)
    lines = [line for line in capsys.readouterr().err.splitlines() if "rows/s" in line]
    of_fit, of_index = ([line for line in lines if line.startswith("rotation") == fit] for fit in (True, False))
    assert re.fullmatch(r"rotation: 100% 60/60 \[.*rows/s\]", of_fit[-1]), lines
    assert any(re.fullmatch(r"rows at 2\.pt: 100% 60/60 \[.*rows/s\]", line) for line in of_index), lines
    monkeypatch.setattr(progress, "LINE_SECONDS", 1e6)
    build_index(task, tiny.checkpoints(task, tmp_path), tmp_path / "other", batch_size=10)
    assert len([line for line in capsys.readouterr().err.splitlines() if "rows/s" in line]) == 4  # of two bars


def test_a_terminal_has_a_bar_that_is_redrawn() -> None:
    main, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    subprocess.run([sys.executable, "-c", SCRIPT.format(seconds=LINE_SECONDS)], stderr=terminal, check=True)
    os.close(terminal)
    written = b""
    while True:
        try:
            written += os.read(main, 1 << 16)
        except OSError:  # the end, on Linux
            break
    os.close(main)
    assert re.search(rb"\rindex: 100%\|", written)
    assert b"a line of its own" in written
