"""Builds and updates whose work several workers share: the same bytes, whoever did what."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import tiny
from conftest import DigitsRun, mostly_long
from gradtrace import open_index
from gradtrace_indexer import add_checkpoints, append_rows, build_index
from gradtrace_indexer.work.sharing import Rank
from shared_work import BadRowsTask, SharedTask, alone, built, checkpoints, small_steps

assert alone  # a fixture, as the next
assert small_steps
pytestmark = pytest.mark.usefixtures("small_steps")


GRADTRACE = Path(sys.executable).with_name("gradtrace")
WAYS: dict[str, dict[str, Any]] = {
    "two processes": {"workers": 2},
    "four processes": {"workers": 4},
    "a rank alone": {"rank": Rank(1, 4)},
    "two actors of Ray": {"ray": "local", "workers": 2},
}


@pytest.mark.parametrize("way", mostly_long(WAYS, "two processes", "two actors of Ray"))
def test_the_bytes_are_the_same_whoever_builds(alone: dict[str, bytes], tmp_path: Path, way: str) -> None:
    assert built(SharedTask(), tmp_path / "index", **WAYS[way]) == alone


def test_ranks_one_after_another(alone: dict[str, bytes], tmp_path: Path) -> None:
    for number in (2, 0, 3, 1):
        assert built(SharedTask(), tmp_path / "index", rank=Rank(number, 4)) == alone


@pytest.mark.parametrize("options", mostly_long(
    [{"basis": "spectral"}, {"basis": "gaussian", "precision": "int4"}, {"rows": "sparse", "dimensions": 6}],
    {"rows": "sparse", "dimensions": 6},
), ids=lambda options: "-".join(map(str, options.values())))  # fmt: skip
def test_other_kinds_of_rows(tmp_path: Path, options: dict[str, Any]) -> None:
    whole = built(SharedTask(), tmp_path / "alone", **options)
    assert built(SharedTask(), tmp_path / "shared", workers=2, **options) == whole


@pytest.mark.long
def test_the_command_line_shares_work(digits_index: DigitsRun, tmp_path: Path, small_steps: None) -> None:
    for name, words in (("alone", []), ("shared", ["--workers", "2"])):
        command = ["build", digits_index.task, "--checkpoints", str(digits_index.checkpoints), "--dimensions", "32"]
        subprocess.run([GRADTRACE, *command, "--out", str(tmp_path / name), *words], check=True)
    assert tiny.files(tmp_path / "shared") == tiny.files(tmp_path / "alone")
    told = subprocess.run([GRADTRACE, "info", str(tmp_path / "alone"), "--tasks"], capture_output=True, check=True)
    assert b"no shared build or update is unfinished" in told.stdout


def test_bad_rows_are_the_same_whoever_finds_them(tmp_path: Path) -> None:
    whole = built(BadRowsTask(), tmp_path / "alone", skip_bad_rows=True)
    assert built(BadRowsTask(), tmp_path / "shared", skip_bad_rows=True, workers=2) == whole
    index = open_index(tmp_path / "alone", BadRowsTask())
    assert (
        {5, 7, 48, 89} <= set(index.manifest.skipped) <= {row for row in range(200) if row % 41 == 7 or row % 37 == 5}
    )


def test_updates_are_shared(tmp_path: Path) -> None:
    for name, workers in (("alone", 1), ("shared", 2)):
        path, found = tmp_path / name, checkpoints(tmp_path / "checkpoints")
        build_index(SharedTask(130), found[:2], path, batch_size=16, progress=False)
        append_rows(path, SharedTask(), batch_size=16, progress=False, workers=workers)
        add_checkpoints(path, SharedTask(), found, batch_size=16, progress=False, workers=workers)
    assert tiny.files(tmp_path / "shared") == tiny.files(tmp_path / "alone")
