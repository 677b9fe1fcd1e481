"""Generations: killed, resumed, given up, rolled back and pruned, while earlier ones stay readable."""

from __future__ import annotations

import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import tiny
from conftest import mostly_long
from gradtrace import Checkpoint, CorruptIndexError, IncompleteIndexError, Index, StoreError, open_index
from gradtrace.store.manifest_file import read_manifest
from gradtrace_indexer import (
    add_checkpoints,
    add_kernels,
    append_rows,
    build_index,
    compact,
    delete_rows,
    discard,
    kept_generations,
    prune,
    roll_back,
    verify,
)
from gradtrace_indexer.build import begin
from gradtrace_indexer.generations import read_pending
from tiny import ClassTask

ROWS, QUERIES = tiny.classes(40), tiny.classes(3, seed=5)
GROWN = [*ROWS, *tiny.classes(20, seed=7)]


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(begin, "_SHARD_ROWS", 24)


def grown() -> ClassTask:
    return ClassTask(tiny.mlp, GROWN)


def task() -> ClassTask:
    return ClassTask(tiny.mlp, ROWS)


def found(directory: Path, count: int) -> list[Checkpoint]:
    """The first checkpoints beside an index, as they lie there now."""
    files = [directory.parent / "checkpoints" / f"{number}.pt" for number in range(1, count + 1)]
    return [
        Checkpoint(file, 5 * number * (number + 1), 0.1 / number, learning_rate_sum=float(number))
        for number, file in enumerate(files, 1)
    ]


Change = Callable[[Path], object]
CHANGES: dict[str, Change] = {
    "build": lambda path: build_index(task(), found(path, 2), path, dimensions=20, progress=False),
    "add": lambda path: add_checkpoints(path, task(), found(path, 3), progress=False),
    "append": lambda path: append_rows(path, grown(), progress=False),
    "delete": lambda path: delete_rows(path, [3, 39]),
    "compact": lambda path: compact(path, progress=False),
    "kernels": lambda path: add_kernels(path, progress=False),
    "roll back": lambda path: roll_back(path, 1),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of two generations: built, and some rows deleted."""
    directory = tmp_path_factory.mktemp("base") / "index"
    tiny.checkpoints(task(), directory.parent / "checkpoints", 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(begin, "_SHARD_ROWS", 24)
        CHANGES["build"](directory)
    delete_rows(directory, [5, 6, 17])
    return directory


def begun(base: Path, directory: Path, name: str) -> Path:
    """Where a change starts from."""
    shutil.copytree(base.parent / "checkpoints", directory / "checkpoints")
    if name != "build":
        shutil.copytree(base, directory / "index")
    return directory / "index"


def scores(index: Index) -> list[str]:
    return [f"{value:.5g}" for value in index.scores(QUERIES).flatten().tolist()]


def opened(path: Path) -> Index:
    rows = read_manifest(path).task.train_rows
    return open_index(path, task() if rows == len(ROWS) else grown())


class Died(BaseException):
    """As good as SIGKILL: no handler of ours catches it."""


@pytest.fixture
def dies_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], None]:
    """From now on, the n-th file that is given its name is the last thing that happens."""
    replace, left = Path.replace, [0]

    def counted(self: Path, target: Path) -> Path:
        moved = replace(self, target)
        left[0] -= 1
        if left[0] == 0:
            raise Died
        return moved

    def arm(count: int | None) -> None:
        left[0] = count or 0

    monkeypatch.setattr(Path, "replace", counted)
    return arm


@pytest.mark.parametrize("name", mostly_long(CHANGES, "build", "delete", "compact", "roll back"))
def test_death_after_every_single_file(
    base: Path, tmp_path: Path, name: str, dies_after: Callable[[int | None], None]
) -> None:
    """The generation before answers as ever, or the new one does; run again, the change ends in the same bytes."""
    whole = begun(base, tmp_path / "whole", name)
    before = scores(opened(whole)) if name != "build" else None
    CHANGES[name](whole)
    after, expected, deaths = scores(opened(whole)), tiny.files(whole), 0
    while True:
        deaths += 1
        path = begun(base, tmp_path / f"died-{deaths}", name)
        dies_after(deaths)
        try:
            CHANGES[name](path)
            break
        except Died:
            pass
        finally:
            dies_after(None)
        if before is None and not (path / "manifest.json").exists():
            with (
                pytest.raises(StoreError, match="no index at")
                if not (path / "pending.json").exists()
                else (pytest.raises(IncompleteIndexError))
            ):
                opened(path)
        else:
            assert verify(path, all_generations=True) == []
            new = read_manifest(path).generation == read_manifest(whole).generation
            assert scores(opened(path)) == (after if new else before)
        if name == "roll back":  # another generation each time it is asked for
            assert scores(opened(path)) in (before, after)
            continue
        CHANGES[name](path)
        assert tiny.files(path) == expected
    least = {"build": 10, "add": 10, "append": 7, "delete": 2, "compact": 10, "kernels": 4, "roll back": 1}
    assert deaths > least[name]


def leave_unfinished(path: Path, name: str, dies_after: Callable[[int | None], None], files: int = 4) -> None:
    """Leave a change unfinished."""
    dies_after(files)
    with pytest.raises(Died):
        CHANGES[name](path)
    dies_after(None)
    assert read_pending(path) is not None


@pytest.mark.parametrize("name", ["add", "append", "compact", "kernels"])
def test_an_unfinished_update_is_finished_or_given_up(
    base: Path, tmp_path: Path, name: str, dies_after: Callable[[int | None], None]
) -> None:
    path = begun(base, tmp_path, name)
    before = tiny.files(path)
    leave_unfinished(path, name, dies_after)
    for other, change in CHANGES.items():
        if other in (name, "build"):
            continue
        with pytest.raises(StoreError, match=r"run it again to finish it, or give it up with `gradtrace discard`"):
            change(path)
    discard(path)
    assert tiny.files(path) == before
    CHANGES["delete"](path)
    CHANGES[name](path)
    assert verify(path, all_generations=True) == []


def test_an_unfinished_build_is_given_up(base: Path, tmp_path: Path, dies_after: Callable[[int | None], None]) -> None:
    path = begun(base, tmp_path, "build")
    leave_unfinished(path, "build", dies_after)
    discard(path)
    assert tiny.files(path) == {}
    CHANGES["build"](path)


def test_what_an_interrupted_update_began_is_finished_before_more_is_done(
    base: Path, tmp_path: Path, dies_after: Callable[[int | None], None]
) -> None:
    """The data set and the directory of checkpoints go on growing meanwhile."""
    path = begun(base, tmp_path, "append")
    leave_unfinished(path, "append", dies_after)
    more = ClassTask(tiny.mlp, [*GROWN, *tiny.classes(5, seed=8)])
    index = append_rows(path, more, progress=False)
    assert [kept.rows for kept in kept_generations(path)] == [40, 40, 60]
    assert index.rows == 65
    dies_after(5)
    with pytest.raises(Died):
        add_checkpoints(path, more, found(path, 3), progress=False)
    dies_after(None)
    assert len(add_checkpoints(path, more, found(path, 4), progress=False).manifest.checkpoints) == 4
    assert [len(kept.checkpoints) for kept in kept_generations(path)] == [2, 2, 2, 2, 3]


def test_a_reader_of_an_earlier_generation_is_not_disturbed(base: Path, tmp_path: Path) -> None:
    path = begun(base, tmp_path, "add")
    reader = opened(path)
    before = scores(reader)
    for name in ("add", "compact", "append"):
        CHANGES[name](path)
        assert scores(reader) == before
    prune(path)
    assert scores(reader) == before  # its files stay mapped
    assert reader.influence(QUERIES)[0].rows_searched == 37


def test_rolling_back(base: Path, tmp_path: Path) -> None:
    path = begun(base, tmp_path, "add")
    answers = {2: scores(opened(path))}
    CHANGES["add"](path)
    answers[3] = scores(opened(path))
    assert roll_back(path, 2).generation == 4
    assert scores(opened(path)) == answers[2]
    for checkpoint in found(path, 3)[2:]:  # the same names, other weights: files of generation 3 stay as they are
        torch.save({name: value * 2 for name, value in checkpoint.load().items()}, checkpoint.path)
    add_checkpoints(path, task(), found(path, 3), progress=False)
    assert scores(opened(path)) != answers[3]
    assert verify(path, all_generations=True) == []
    assert [kept.made_by for kept in kept_generations(path)] == [
        "build", "delete rows", "add checkpoints", "roll back"
    ]  # fmt: skip
    for generation in (0, 5, 9):
        with pytest.raises(StoreError, match=r"kept: 1, 2, 3, 4"):
            roll_back(path, generation)
    damaged = path / kept_generations(path)[2].shards[-1].rows.path
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\xff")
    assert [problem[:13] for problem in verify(path, all_generations=True)] == ["generation 3:"]
    with pytest.raises(CorruptIndexError, match="generation 3"):
        roll_back(path, 3)


def test_pruning(base: Path, tmp_path: Path) -> None:
    path = begun(base, tmp_path, "compact")
    CHANGES["compact"](path)
    CHANGES["delete"](path)
    stray = path / "rows" / "1.pt" / "000000000.9.rows.tmp"
    stray.write_bytes(b"left by a killed process")
    (path / "notes.txt").write_text("the user's")
    with pytest.raises(StoreError, match="keep must be at least 1"):
        prune(path, keep=0)
    prune(path, keep=2)
    assert [kept.generation for kept in kept_generations(path)] == [3]
    assert verify(path, all_generations=True) == []
    assert not stray.exists()
    before = scores(opened(path))
    prune(path)
    named = {entry.path for entry in read_manifest(path).files()}
    assert set(tiny.files(path)) == named | {"manifest.json", "notes.txt"}
    assert scores(opened(path)) == before


@pytest.mark.parametrize("name", [name for name in CHANGES if name != "build"])
@pytest.mark.parametrize("limit", mostly_long([10, 1000, 5000], 1000))
def test_full_disk(base: Path, tmp_path: Path, name: str, limit: int, largest_file: Callable[[int], None]) -> None:
    path = begun(base, tmp_path, name)
    before, current = scores(opened(path)), (path / "manifest.json").read_bytes()
    largest_file(limit)
    with pytest.raises(StoreError, match=r"could not be written.*free some space.*run the same again"):
        CHANGES[name](path)
    largest_file(resource.RLIM_INFINITY)
    assert (path / "manifest.json").read_bytes() == current
    assert verify(path, all_generations=True) == []
    assert scores(opened(path)) == before
    CHANGES[name](path)
    assert verify(path, all_generations=True) == []
