"""Damage on the disk: told of, never answered from; and what is not of the index is left alone."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import tiny
from damaged_index import COMMANDS, QUERIES, TASK, opened, outside, refused
from gradtrace import CorruptIndexError, GradtraceError
from gradtrace.store.manifest_file import read_manifest
from gradtrace_indexer import (
    compact,
    delete_rows,
    discard,
    prune,
    roll_back,
    set_searcher,
    verify,
)
from gradtrace_indexer.description import details


@pytest.fixture
def path(home: Path) -> Path:
    return home / "index"


def test_the_base_of_these_tests_is_whole(path: Path) -> None:
    assert verify(path, all_generations=True, progress=False) == []
    for name in ("open", "open without verifying", "info", "roll back", "append"):
        COMMANDS[name](path)


def linked(path: Path, name: str) -> Path:
    """Move a file or folder of an index out of it, and leave a link."""
    target = path.parent / "outside" / "moved"
    shutil.move(path / name, target)
    (path / name).symlink_to(target)
    return target


@pytest.mark.parametrize("name", ["rows", "rows/4.pt", "manifest.json", "curvature/4.pt.1.safetensors", "averages"])
def test_links_inside_an_index_are_not_followed(home: Path, path: Path, name: str) -> None:
    linked(path, name)
    before = outside(home)
    refused(path, "is a symbolic link, which is not followed inside of an index")
    for command in COMMANDS.values():
        with contextlib.suppress(GradtraceError):
            command(path)
    assert {name: content for name, content in outside(home).items() if name in before} == before


def test_the_index_itself_may_be_reached_by_a_link(home: Path, path: Path) -> None:
    (home / "link").symlink_to(path)
    assert verify(home / "link", progress=False) == []
    opened(home / "link").influence(QUERIES)


@pytest.mark.parametrize(
    "name", ["rows/4.pt/000000000.1.rows", "bases/0.1.safetensors", "manifest.json", "deleted/2.ids"]
)
def test_what_is_not_a_file_is_not_read(path: Path, name: str) -> None:
    """Reading a FIFO would never end."""
    (path / name).unlink()
    os.mkfifo(path / name)
    refused(path, f"{name} is not a regular file")


@pytest.mark.parametrize("target", ["fifo", "/dev/zero"])
def test_weights_that_are_not_files_are_not_read(home: Path, path: Path, target: str) -> None:
    weights = home / "checkpoints" / "4.pt"
    weights.unlink()
    os.mkfifo(weights) if target == "fifo" else weights.symlink_to(target)
    assert [problem for problem in verify(path, progress=False) if "is not a file" in problem]
    with pytest.raises(GradtraceError, match="is not a file"):
        opened(path)


def test_temporary_names_that_are_links_are_not_written_through(home: Path, path: Path) -> None:
    before = outside(home)
    secret = home / "outside" / "secret"
    for name in ("manifest.json.tmp", "deleted/6.ids.tmp", "generations/5.json.tmp", "pending.json.tmp"):
        (path / name).symlink_to(secret)
    assert delete_rows(path, [5]).generation == 6
    assert outside(home) == before
    assert verify(path, all_generations=True, progress=False) == []


STRAYS = [
    *("generations/1 (copy).json", "generations/01.json", "generations/99.json", "generations/notes", "rows.txt"),
    *("rows/README.txt", "searchers/backup/a.1", "bases/old.safetensors", "jobs/a.json"),
]


def strays(path: Path) -> None:
    for name in STRAYS:
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text("{}")
    (path / "generations" / "7.json").mkdir()
    os.mkfifo(path / "generations" / "8.json")
    (path / "generations" / "0.json").symlink_to(path / "manifest.json")


@pytest.mark.parametrize("name", COMMANDS)
def test_strays_are_passed_over(path: Path, name: str) -> None:
    strays(path)
    COMMANDS[name](path)
    assert verify(path, all_generations=True, progress=False) == []
    assert all((path / stray).exists() for stray in STRAYS)


@pytest.mark.parametrize("command", [prune, discard])
def test_only_files_of_the_format_are_removed_and_nothing_behind_a_link(
    home: Path, path: Path, command: Callable[[Path], object]
) -> None:
    others = home / "outside" / "rows" / "4.pt"
    others.mkdir(parents=True)
    (others / "000000000.9.rows").write_text("of another index")
    (path / "rows" / "linked").symlink_to(others)
    (path / "rows" / "9.pt").mkdir()
    (path / "rows" / "9.pt" / "000000000.9.rows").symlink_to(others / "000000000.9.rows")
    (path / "rows" / "9.pt" / "000000001.9.rows").write_text("left of a killed process")
    (path / "representer").rename(home / "outside" / "representer")
    (path / "representer").symlink_to(home / "outside" / "representer")
    strays(path)
    before = outside(home)
    command(path)
    assert outside(home) == before
    assert all((path / stray).exists() for stray in STRAYS)
    assert not (path / "rows" / "9.pt" / "000000001.9.rows").exists()


def test_a_damaged_earlier_generation_stops_nothing(path: Path) -> None:
    compact(path, progress=False)
    third = path / "generations" / "3.json"
    third.write_bytes(third.read_bytes()[:-9])
    assert [problem[:13] for problem in verify(path, progress=False)] == ["generation 3:"]
    assert any("generation 3 cannot be read" in line for line in details(path))
    with pytest.raises(CorruptIndexError, match=r"generation 3 of .* is damaged"):
        roll_back(path, 3)
    opened(path)
    (path / "rows" / "1.pt").mkdir()
    (path / "rows" / "1.pt" / "000000000.9.rows").write_text("left of a killed process")
    files = set(tiny.files(path))
    discard(path)  # what generation 3 may name stays
    assert files - set(tiny.files(path)) == {"rows/1.pt/000000000.9.rows"}
    delete_rows(path, [5])
    prune(path)
    assert verify(path, all_generations=True, progress=False) == []
    assert set(tiny.files(path)) < files | {"deleted/7.ids"}


def test_a_damaged_unfinished_generation_is_told_and_given_up(path: Path) -> None:
    (path / "pending.json").write_text("{}")
    opened(path)
    assert any("gradtrace discard" in problem for problem in verify(path, progress=False))
    for name in ("prune", "delete", "compact"):
        with pytest.raises(CorruptIndexError, match="gradtrace discard"):
            COMMANDS[name](path)
    discard(path)
    assert verify(path, progress=False) == []


def test_verify_reports_every_problem(home: Path, path: Path) -> None:
    manifest = read_manifest(path)
    rows, basis = path / manifest.shards[0].rows.path, path / manifest.basis.files[0].path
    rows.write_bytes(bytes([rows.read_bytes()[0] ^ 1]) + rows.read_bytes()[1:])
    basis.write_bytes(b"short")
    (path / manifest.curvature[0].path).unlink()
    average = path / manifest.checkpoints[0].file
    average.write_bytes(average.read_bytes()[:-1] + b"\x07")
    torch.save({}, home / "checkpoints" / "4.pt")
    (path / "generations" / "1.json").write_text("{}")
    problems = verify(path, progress=False)
    for words in ("rows/", "bases/0.1.safetensors has 5 bytes", "is missing", "averages/", "4.pt", "generation 1:"):
        assert any(words in problem for problem in problems), words
    assert len(problems) >= 6


def test_moved_weights_are_verified_where_they_are(home: Path, path: Path) -> None:
    (home / "checkpoints").rename(home / "weights")
    assert any("4.pt" in problem for problem in verify(path, progress=False))
    assert verify(path, checkpoints=home / "weights", progress=False) == []


def test_what_is_not_verified_is_said(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert opened(path).verified
    assert "not verified" not in repr(opened(path))
    index = opened(path, verify=False)
    assert not index.verified
    assert "not verified" in repr(index)
    assert "without comparing the checksums" in caplog.text


def test_without_verifying_damaged_rows_are_read_and_nothing_else(path: Path) -> None:
    """Any bytes of rows can be read; of all other files, which other libraries read, the checksums are compared."""
    manifest = read_manifest(path)
    of_rows = {file for shard in manifest.shards for file in (shard.rows, shard.representations) if file}
    for entry in manifest.files():
        intact = (path / entry.path).read_bytes()
        (path / entry.path).write_bytes(bytes(byte ^ 0xFF for byte in intact))
        if entry in of_rows:
            index = opened(path, verify=False, searcher="progressive")
            for method in index.methods:
                with contextlib.suppress(GradtraceError):
                    index.scores(QUERIES, method=method)
                    index.influence(QUERIES, k=5, method=method)
        else:
            with pytest.raises(CorruptIndexError, match="does not match its checksum"):
                opened(path, verify=False)
        (path / entry.path).write_bytes(intact)


@pytest.mark.parametrize("name", ["faiss:Flat", "annoy:2"])
def test_a_searcher_s_file_truncated_under_an_open_index(path: Path, name: str) -> None:
    set_searcher(path, TASK, name, progress=False)
    index, searcher = opened(path), read_manifest(path).searcher
    assert searcher is not None
    index.influence(QUERIES, k=1)
    with (path / searcher.file.path).open("r+b") as file:
        file.truncate(0)
    with pytest.raises(CorruptIndexError, match="was truncated or replaced while it was open"):
        index.influence(QUERIES, k=1)


@pytest.mark.parametrize("size", [0, 100, -64])
def test_files_truncated_under_an_open_index(path: Path, size: int) -> None:
    """Reading what was mapped would end the process."""
    index = opened(path, searcher="progressive")
    index.influence(QUERIES)
    for shard in read_manifest(path).shards:
        with (path / shard.rows.path).open("r+b") as file:
            file.truncate(max(0, size if size >= 0 else shard.rows.bytes + size))
    for ask in (index.influence, index.scores):
        with pytest.raises(CorruptIndexError, match="was truncated or replaced"):
            ask(QUERIES)
    for entry in read_manifest(path).files():
        with (path / entry.path).open("r+b") as file:
            file.truncate(0)
    assert index.columns["label"].shape == (40,)
    assert index.label(QUERIES[0]) == QUERIES[0][1]
    with pytest.raises(CorruptIndexError, match="was truncated or replaced"):
        index.influence(QUERIES)
