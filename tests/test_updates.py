"""What an index holds after checkpoints and rows were added, rows deleted, and shards compacted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import tiny
from conftest import mostly_long
from gradtrace import (
    Checkpoint,
    CheckpointError,
    CorruptIndexError,
    Index,
    MismatchError,
    QueryError,
    RowFilter,
    StoreError,
    open_index,
)
from gradtrace.store.manifest import ShardEntry
from gradtrace.store.manifest_file import read_manifest
from gradtrace_indexer import add_checkpoints, append_rows, build_index, compact, delete_rows, discard, prune, verify
from gradtrace_indexer.build import begin
from same_basis import fresh_build
from tiny import ClassTask

ROWS, QUERIES = tiny.classes(50), tiny.classes(4, seed=5)


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of 8 rows."""
    monkeypatch.setattr(begin, "_SHARD_ROWS", 8)


def task(rows: Sequence[Any] = ROWS) -> ClassTask:
    return ClassTask(tiny.mlp, list(rows))


def checkpoints(directory: Path, count: int) -> list[Checkpoint]:
    return tiny.checkpoints(task(), directory / "checkpoints", count)


def built(directory: Path, rows: Sequence[Any] = ROWS, count: int = 2, basis: Any = "gaussian") -> Path:
    build_index(task(rows), checkpoints(directory, count), directory / "index", dimensions=20, basis=basis,
                progress=False)  # fmt: skip
    return directory / "index"


def add(path: Path, new: Sequence[Checkpoint], rows: Sequence[Any] = ROWS) -> Index:
    return add_checkpoints(path, task(rows), new, progress=False)


def append(path: Path, rows: Sequence[Any]) -> Index:
    return append_rows(path, task(rows), progress=False)


def shard_bytes(directory: Path, shard: ShardEntry) -> tuple[bytes, bytes]:
    return (directory / shard.rows.path).read_bytes(), (directory / shard.columns.path).read_bytes()


def by_place(directory: Path) -> dict[tuple[int, int], tuple[bytes, bytes]]:
    """What the current generation's shards hold, by checkpoint and first row."""
    return {(s.checkpoint, s.start): shard_bytes(directory, s) for s in read_manifest(directory).shards}


def answers(index: Index) -> list[list[tuple[int, float]]]:
    found = index.influence(QUERIES, k=7)
    return [[(hit.row, hit.score) for hit in [*one.proponents, *one.opponents]] for one in found]


def agrees(index: Index, fresh: Index, present: Sequence[int]) -> None:
    """Scores, self-influence, columns and hits are those of a fresh build on the rows `present`, in their order."""
    missing = np.setdiff1d(np.arange(index.rows), present)
    for method in ("tracin", "cosine"):
        found, expected = index.scores(QUERIES, method=method), fresh.scores(QUERIES, method=method)
        np.testing.assert_allclose(found[:, present], expected, rtol=2e-3, atol=1e-5)
        assert not found[:, missing].any()
    selfs = index.self_influence()
    np.testing.assert_allclose(selfs[present], fresh.self_influence(), rtol=2e-3, atol=1e-6)
    assert np.isneginf(selfs[missing]).all()
    assert index.columns["label"][present].tolist() == fresh.columns["label"].tolist()
    np.testing.assert_allclose(index.columns["loss"][present].astype(float), fresh.columns["loss"], rtol=1e-5)
    for ours, theirs in zip(index.influence(QUERIES, k=3), fresh.influence(QUERIES, k=3), strict=True):
        for hit, other in zip(
            [*ours.proponents, *ours.opponents], [*theirs.proponents, *theirs.opponents], strict=True
        ):
            assert hit.score == pytest.approx(other.score, rel=2e-3, abs=1e-5)
            assert hit.row in present
            assert (hit.label, type(hit.label)) == (index.task.train[hit.row][1], int)
        assert ours.rows_searched == len(present)


# Checkpoints


@pytest.mark.parametrize(
    ("basis", "first", "steps"),
    mostly_long(
        [("spectral", 5, [6]), ("gauss-newton", 5, [6]), ("gauss-newton", 2, [4, 5]), ("gauss-newton", 1, [3])],
        ("spectral", 5, [6]),
        ("gauss-newton", 2, [4, 5]),
    ),
)
def test_added_checkpoints_equal_a_full_build_with_the_same_basis(
    tmp_path: Path, basis: str, first: int, steps: list[int]
) -> None:
    """Byte for byte: rows, columns, curvature, and what identifies the task."""
    path = built(tmp_path, count=first, basis=basis)
    before = tiny.files(path)
    for count in steps:
        index = add(path, checkpoints(tmp_path, count))  # those that are there already are passed over
    fresh_build(task(), checkpoints(tmp_path, steps[-1]), tmp_path / "fresh", like=path)
    ours, theirs = read_manifest(path), read_manifest(tmp_path / "fresh")
    assert ours.generation == 1 + len(steps)
    assert by_place(path) == by_place(tmp_path / "fresh")
    assert (ours.checkpoints, ours.task, ours.basis) == (theirs.checkpoints, theirs.task, theirs.basis)
    for mine, other in zip(ours.curvature, theirs.curvature, strict=True):
        assert (path / mine.path).read_bytes() == (tmp_path / "fresh" / other.path).read_bytes()
    assert answers(index) == answers(open_index(tmp_path / "fresh", task()))
    after = tiny.files(path)
    assert {name: after[name] for name in before if name != "manifest.json"} == {
        name: content for name, content in before.items() if name != "manifest.json"
    }
    assert after["generations/1.json"] == before["manifest.json"]


@pytest.mark.parametrize("basis", ["gauss-newton", "spectral"])
def test_nothing_is_computed_at_the_old_checkpoints(tmp_path: Path, basis: str) -> None:
    path = built(tmp_path, count=3, basis=basis)
    seen: list[bytes] = []

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        if len(batch[1]) == 8:  # a stretch: other batches are probes and samples
            seen.append(next(model.parameters()).detach().numpy().tobytes())
        return ClassTask.loss(task(), model, batch)

    found = checkpoints(tmp_path, 4)
    add_checkpoints(path, ClassTask(tiny.mlp, ROWS, loss), found, progress=False)
    assert set(seen) == {tiny.loaded(task(), found[-1])[0].weight.detach().numpy().tobytes()}  # type: ignore[index]


def test_no_new_checkpoint_changes_nothing(tmp_path: Path) -> None:
    path = built(tmp_path)
    before = tiny.files(path)
    assert add(path, checkpoints(tmp_path, 2)).manifest.generation == 1
    assert tiny.files(path) == before


def test_checkpoints_that_cannot_be_added(tmp_path: Path) -> None:
    path = built(tmp_path, count=2)
    before = tiny.files(path)
    old, *_, new = checkpoints(tmp_path, 3)
    early = Checkpoint(new.path, old.step + 1, 0.1)
    (tmp_path / "other").mkdir()
    other = Checkpoint(tmp_path / "other" / old.name, new.step, 0.1)
    other.path.write_bytes(new.path.read_bytes())
    misfit = Checkpoint(tmp_path / "other" / "9.pt", 99, 0.1)
    torch.save(nn.Linear(2, 2).state_dict(), misfit.path)
    for wrong, words in (
        ([], "must be given"),
        ([new, new], "each once"),
        ([new, early], "each once"),
        ([early], "only later checkpoints"),
        ([other], "other weights"),
        ([new, misfit], "does not fit"),
    ):
        with pytest.raises(CheckpointError, match=words):
            add(path, wrong)
    assert tiny.files(path) == before


@pytest.mark.parametrize("change", ["rows", "loss", "longer"])
def test_updates_by_another_task_are_refused(tmp_path: Path, change: str) -> None:
    path = built(tmp_path)
    before = tiny.files(path)
    other = {
        "rows": task(tiny.classes(50, seed=1)),
        "loss": ClassTask(tiny.mlp, ROWS, lambda model, batch: 2 * ClassTask.loss(task(), model, batch)),
        "longer": task(tiny.classes(60, seed=1)),
    }[change]
    with pytest.raises(MismatchError):
        add_checkpoints(path, other, checkpoints(tmp_path, 3), progress=False)
    with pytest.raises(MismatchError):
        append_rows(path, other, progress=False)
    assert tiny.files(path) == before


@pytest.mark.parametrize("basis", mostly_long(["gauss-newton", "spectral"], "gauss-newton"))
def test_curvature_is_of_the_rows_that_the_basis_was_fitted_on(tmp_path: Path, basis: str) -> None:
    """Eigenvalues depend neither on rows that were appended before the checkpoint came nor on those deleted again."""
    first, later = built(tmp_path / "a", basis=basis), built(tmp_path / "b", basis=basis)
    grown = [*ROWS, *tiny.classes(30, seed=9)]
    add(first, checkpoints(tmp_path / "a", 3))
    append(later, grown)
    delete_rows(later, [60])
    add(later, checkpoints(tmp_path / "b", 3), grown)
    contents = [(path / read_manifest(path).curvature[-1].path).read_bytes() for path in (first, later)]
    assert contents[0] == contents[1]


# Rows


def test_appended_rows_equal_a_fresh_build(tmp_path: Path) -> None:
    rows = [*ROWS, *tiny.classes(43, seed=7)]
    path = built(tmp_path)
    for count in (51, 93, 93):
        index = append(path, rows[:count])
    assert index.rows == 93
    assert index.manifest.generation == 3  # nothing was new the third time
    assert index.manifest.row_ids is None
    assert index.manifest.stretches()[-8:-5] == [(48, 50), (50, 51), (51, 59)]
    agrees(index, fresh_build(task(rows), checkpoints(tmp_path, 2), tmp_path / "fresh", like=path), range(93))
    index = add(path, checkpoints(tmp_path, 3), rows)
    agrees(index, fresh_build(task(rows), checkpoints(tmp_path, 3), tmp_path / "fresh3", like=path), range(93))


def test_a_longer_or_changed_data_set_is_told_what_to_do(tmp_path: Path) -> None:
    path = built(tmp_path)
    rows = [*ROWS, *tiny.classes(10, seed=7)]
    with pytest.raises(MismatchError, match="append the new ones with `gradtrace append`"):
        open_index(path, task(rows))
    with pytest.raises(MismatchError, match=r"train\[49\] is not the example"):
        append(path, [*ROWS[:49], *rows[50:]])
    append(path, rows)
    with pytest.raises(MismatchError, match=r"60 training rows, task\.train has 50"):
        open_index(path, task(ROWS))
    with pytest.raises(MismatchError, match=r"train\[59\] is not the example"):  # new rows are known by content, too
        open_index(path, task([*rows[:59], rows[0]]))


def test_deleted_rows_are_gone_from_every_answer(tmp_path: Path) -> None:
    path = built(tmp_path)
    first = open_index(path, task())
    best = sorted({row for row, _ in answers(first)[0]})
    other = next(row for row in range(50) if row not in best)
    delete_rows(path, best)
    delete_rows(path, [best[0], other])  # one that is deleted already
    assert delete_rows(path, np.array([other])).generation == 3
    index = open_index(path, task())
    present = [row for row in range(50) if row not in {*best, other}]
    assert np.flatnonzero(index.present).tolist() == present
    kept = task([ROWS[row] for row in present])
    agrees(index, fresh_build(kept, checkpoints(tmp_path, 2), tmp_path / "fresh", like=path), present)
    assert answers(first) == answers(first)  # the reader of the first generation is not disturbed


def test_filters_and_deleted_rows(tmp_path: Path) -> None:
    path = built(tmp_path)
    delete_rows(path, range(10))
    index = open_index(path, task())

    def found(row_filter: RowFilter) -> list[int]:
        (result,) = index.influence(QUERIES[:1], k=50, filter=row_filter)
        return sorted(hit.row for hit in [*result.proponents, *result.opponents])

    assert found(RowFilter(rows=range(5, 15))) == list(range(10, 15))
    assert found(RowFilter(exclude_rows=range(5, 45))) == list(range(45, 50))
    assert found(RowFilter(labels=[1])) == [row for row in range(10, 50) if ROWS[row][1] == 1]
    with pytest.raises(QueryError, match="no training row but deleted ones"):
        found(RowFilter(rows=range(10)))


def test_deletions_that_are_refused(tmp_path: Path) -> None:
    path = built(tmp_path)
    before = tiny.files(path)
    for rows, words in (
        ([50], "no row 50"),
        ([-1], "no row -1"),
        ([0.5], "row numbers"),
        (range(50), "would be left"),
    ):
        with pytest.raises(QueryError, match=words):
            delete_rows(path, rows)  # type: ignore[arg-type]
    assert delete_rows(path, []).generation == 1
    assert tiny.files(path) == before


def test_deleted_examples_may_be_replaced_in_the_data_set(tmp_path: Path) -> None:
    """An index does not rely on their content, before and after later updates."""
    path = built(tmp_path)
    delete_rows(path, range(0, 50, 2))
    blank = [(torch.zeros(5), 0) if row % 2 == 0 else ROWS[row] for row in range(50)]
    open_index(path, task(blank))
    add(path, checkpoints(tmp_path, 3), blank)
    append(path, [*blank, *tiny.classes(5, seed=3)])
    delete_rows(path, range(1, 54))
    assert verify(path, all_generations=True) == []


def test_an_index_whose_probed_rows_are_all_deleted_still_opens(tmp_path: Path) -> None:
    path = built(tmp_path)
    probed = read_manifest(path).task.probe.rows
    delete_rows(path, probed)
    index = open_index(path, task())
    assert int(index.present.sum()) == 50 - len(probed)
    assert read_manifest(path).task.probe.rows == []
    assert len(append(path, [*ROWS, *QUERIES]).manifest.task.probe.rows) == min(32, 54 - len(probed))


# Compaction


@pytest.mark.parametrize("precision", ["float16", "int8"])
def test_compaction_changes_no_answer(tmp_path: Path, precision: Any) -> None:
    rows = [*ROWS, *tiny.classes(23, seed=7)]
    build_index(task(), checkpoints(tmp_path, 2), tmp_path / "index", dimensions=20, precision=precision,
                progress=False)  # fmt: skip
    path = tmp_path / "index"
    append(path, rows[:53])
    append(path, rows)
    delete_rows(path, [0, 9, 10, *range(24, 33), 52, 72])
    before = open_index(path, task(rows))
    compact(path, progress=False)
    after = open_index(path, task(rows))
    assert after.manifest.rows == 73 - 14
    assert after.manifest.deleted is None
    assert all(stop - start <= 8 for start, stop in after.manifest.stretches())
    assert len(after.manifest.stretches()) < len(before.manifest.stretches())
    assert answers(after) == answers(before)
    for method in ("tracin", "cosine"):
        scores = after.scores(QUERIES, method=method), before.scores(QUERIES, method=method)
        np.testing.assert_allclose(*scores, rtol=1e-5, atol=1e-6)
    assert np.array_equal(after.self_influence(), before.self_influence(), equal_nan=True)
    assert set(after.columns) == set(before.columns)
    for name, column in after.columns.items():
        assert column.dtype == before.columns[name].dtype
        assert [str(value) for value in column] == [str(value) for value in before.columns[name]]
    stored = before.contents.store.row_ids.live()
    assert torch.equal(tiny.stored(after), tiny.stored(before)[torch.from_numpy(stored)])  # bit for bit
    assert delete_rows(path, [0, 72]).generation == after.manifest.generation  # compacted rows are deleted rows
    assert compact(path, progress=False).generation == after.manifest.generation  # nothing left to do


def test_compaction_uses_untouched_shards_as_they_are(tmp_path: Path) -> None:
    path = built(tmp_path)
    delete_rows(path, [17])
    before = read_manifest(path)
    compact(path, progress=False)
    after = read_manifest(path)
    new = {shard.rows.path for shard in after.shards} - {shard.rows.path for shard in before.shards}
    assert len(new) == 2  # of 14: one stretch at two checkpoints
    assert [stop - start for start, stop in after.stretches()] == [8, 8, 7, 8, 8, 8, 2]
    delete_rows(path, range(8, 16))  # a whole shard
    assert len(compact(path, progress=False).shards) == 12
    assert np.flatnonzero(~open_index(path, task()).present).tolist() == [*range(8, 16), 17]


def test_updates_after_compaction_keep_ids(tmp_path: Path) -> None:
    rows = [*ROWS, *tiny.classes(20, seed=7)]
    path = built(tmp_path)
    delete_rows(path, range(5, 30))
    compact(path, progress=False)
    append(path, rows[:60])
    delete_rows(path, [0, 55])
    index = add(path, checkpoints(tmp_path, 3), rows[:60])
    present = [*range(1, 5), *range(30, 55), *range(56, 60)]
    kept = task([rows[row] for row in present])
    agrees(index, fresh_build(kept, checkpoints(tmp_path, 3), tmp_path / "fresh", like=path), present)
    compact(path, progress=False)
    index = append(path, rows)
    assert np.flatnonzero(index.present).tolist() == [*present, *range(60, 70)]
    prune(path)
    assert verify(path) == []


def test_compaction_copies_no_damage(tmp_path: Path) -> None:
    """Else a wrong value would come out with a checksum that fits."""
    path = built(tmp_path)
    delete_rows(path, [1])
    for file in (read_manifest(path).shards[0].rows, read_manifest(path).shards[0].columns):
        whole = (path / file.path).read_bytes()
        (path / file.path).write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
        with pytest.raises(CorruptIndexError, match="does not match its checksum"):
            compact(path, progress=False)
        (path / file.path).write_bytes(whole)
    assert compact(path, progress=False).rows == 49


def test_where_there_is_no_index(tmp_path: Path) -> None:
    new = checkpoints(tmp_path, 1)
    for change in (
        lambda path: add(path, new),
        lambda path: append(path, ROWS),
        lambda path: delete_rows(path, [0]),
        compact,
        prune,
        discard,
    ):
        with pytest.raises(StoreError, match="no index at"):
            change(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
