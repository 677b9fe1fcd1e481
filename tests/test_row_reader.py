"""Training data read in worker processes, and rows that cannot be indexed."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tiny
from conftest import mostly_long
from gradtrace import Checkpoint, DatasetError, Index, LossError, StoreError, open_index
from gradtrace.store.manifest_file import read_manifest
from gradtrace_indexer import add_checkpoints, append_rows, build_index, compact, generations
from gradtrace_indexer.build import begin
from gradtrace_indexer.build.row_reader import RowReader
from gradtrace_indexer.description import details
from gradtrace_service.answers.questions import row_examples
from gradtrace_service.errors import FieldError
from tiny import ClassTask

ROWS = tiny.classes(60)
PARTS = [[0, 1, 2], [5, 9], [59]]


class Rows:
    """Examples of which some fail, or do something else."""

    def __init__(self, rows: list[Any], faults: dict[int, Callable[[], Any]]) -> None:
        self.rows, self.faults = rows, faults

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Any:
        return self.faults.get(row, lambda: self.rows[row])()


def unreadable() -> Any:
    raise OSError("no such image")


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_worker_processes_give_what_the_data_set_gives(kind: torch.dtype) -> None:
    images = [
        (torch.randn(2, 3).to(kind).t(), torch.tensor(row, dtype=kind), np.arange(row), {"text": "é" * row})
        for row in range(60)
    ]
    images[9] = (torch.zeros(0, 3, dtype=kind), *images[9][1:])
    reader = RowReader(images, workers=2)
    for parts in (PARTS, PARTS[::-1], []):  # the processes stay
        read = list(reader.batches(parts))
        assert [len(batch) for batch in read] == [len(part) for part in parts]
        for batch, part in zip(read, parts, strict=True):
            for (image, number, array, more), row in zip(batch, part, strict=True):
                assert image.dtype == number.dtype == kind
                assert torch.equal(image, images[row][0])
                assert torch.equal(number, images[row][1])
                assert array.tolist() == list(range(row))
                assert more == images[row][3]


def test_an_index_has_the_same_bytes_however_its_data_is_read(tmp_path: Path) -> None:
    for name, workers in (("alone", 0), ("workers", 2)):
        tiny.build(ClassTask(tiny.mlp, ROWS), tmp_path / name, batch_size=16, num_workers=workers, basis="gauss-newton")
    assert tiny.files(tmp_path / "alone") == tiny.files(tmp_path / "workers")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_row_that_cannot_be_read_is_named_with_the_users_line(tmp_path: Path, workers: int) -> None:
    task = ClassTask(tiny.mlp, Rows(ROWS, {41: unreadable}))
    with pytest.raises(DatasetError, match="reading row 41 of the data set failed: OSError: no such image"):
        tiny.build(task, tmp_path, num_workers=workers, basis="none")


def test_workers_that_die_or_cannot_send_say_what_to_do(tmp_path: Path) -> None:
    killed = Rows(ROWS, {5: lambda: os.kill(os.getpid(), signal.SIGKILL)})
    with pytest.raises(DatasetError, match=r"a worker process that reads the training data ended .*fewer workers"):
        list(RowReader(killed, workers=1).batches(PARTS))
    lambdas = Rows(ROWS, {5: lambda: lambda: 3})
    with pytest.raises(DatasetError, match=r"rows 5 to 9 cannot be sent from a worker process .*num_workers=0"):
        list(RowReader(lambdas, workers=1).batches(PARTS))
    with pytest.raises(StoreError, match="num_workers must be 0 or more, not -1"):
        RowReader(ROWS, workers=-1)


NAN = float("nan")


def nan_input() -> tuple[Tensor, int]:
    return torch.full((5,), NAN), 1


class Root(nn.Module):
    """Finite everywhere; its gradient is not, at zero."""

    def forward(self, x: Tensor) -> Tensor:
        return x.abs().sqrt()


def rooted() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 4, bias=False), Root(), nn.Linear(4, 3))


BAD: dict[int, Callable[[], Any]] = {
    0: unreadable,
    1: nan_input,
    17: nan_input,
    33: lambda: (torch.zeros(5), 2),
    59: unreadable,
}
READ = [number for number in range(60) if number not in BAD]


def bad_task(rows: list[Any] = ROWS, faults: dict[int, Callable[[], Any]] = BAD) -> ClassTask:
    return ClassTask(rooted, Rows(rows, faults))


def skipping(directory: Path, **arguments: Any) -> Index:
    return tiny.build(bad_task(), directory, batch_size=8, skip_bad_rows=True, **{"dimensions": 20, **arguments})


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("precision", mostly_long(["float16", "int8", "int4"], "int4"))
def test_bad_rows_are_marked_and_never_found(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, workers: int, precision: str
) -> None:
    index = skipping(tmp_path, num_workers=workers, precision=precision, basis="gauss-newton")
    skipped = index.manifest.skipped
    assert list(skipped) == sorted(BAD)
    assert skipped[0].startswith("reading row 0 of the data set failed: OSError: no such image")
    assert skipped[33] == skipped[1] == "its loss or gradient is NaN or infinite at 1.pt"
    assert np.flatnonzero(~index.present).tolist() == sorted(BAD)
    (result,) = index.influence([ROWS[3]], k=60)
    assert {hit.row for hit in [*result.proponents, *result.opponents]} <= set(READ)
    assert index.columns["label"][READ].tolist() == [ROWS[row][1] for row in READ]
    assert all(isinstance(hit.label, int) for hit in result.proponents)
    told = list(details(tmp_path / "index"))
    assert "  5 row(s) are not indexed and will not be found, as deleted rows are not:" in told
    assert "    row 17: its loss or gradient is NaN or infinite at 1.pt" in told
    assert sum("row 17:" in line for line in caplog.messages) == 1
    with pytest.raises(FieldError, match=r"row 17 .* left bad rows out: its loss or"):
        row_examples(index, "train", [3, 17])


def test_the_other_rows_are_those_of_the_data_without_the_bad_ones(tmp_path: Path) -> None:
    index = skipping(tmp_path / "with", basis="none")
    clean = tiny.build(ClassTask(rooted, [ROWS[row] for row in READ]), tmp_path / "without", basis="none")
    torch.testing.assert_close(tiny.stored(index)[READ], tiny.stored(clean), rtol=2e-3, atol=1e-5)
    assert not tiny.stored(index)[sorted(BAD)].any()
    queries = tiny.classes(3, seed=5)
    np.testing.assert_allclose(index.scores(queries)[:, READ], clean.scores(queries), rtol=1e-2, atol=1e-5)


def test_an_index_with_bad_rows_lives_on(tmp_path: Path) -> None:
    skipping(tmp_path, basis="gauss-newton")
    path, queries = tmp_path / "index", tiny.classes(3, seed=5)
    later = tiny.checkpoints(bad_task(), tmp_path / "checkpoints", 3)
    grown = bad_task([*ROWS, *tiny.classes(20, seed=7)], {**BAD, 70: nan_input, 71: unreadable})
    assert add_checkpoints(path, bad_task(), later, progress=False).present.sum() == len(READ)
    with pytest.raises(LossError, match=r"training row\(s\) 70"):
        append_rows(path, bad_task([*ROWS, *tiny.classes(20, seed=7)], {**BAD, 70: nan_input}), progress=False)
    generations.discard(path)
    index = append_rows(path, grown, skip_bad_rows=True, progress=False)
    assert list(index.manifest.skipped) == [*sorted(BAD), 70, 71]
    scores = index.scores(queries)
    compact(path, progress=False)
    again = open_index(path, grown)
    assert again.present.tolist() == index.present.tolist()
    np.testing.assert_allclose(again.scores(queries), scores, rtol=1e-5, atol=1e-6)


def test_a_killed_build_that_skips_rows_resumes_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(begin, "_SHARD_ROWS", 24)
    skipping(tmp_path / "whole", basis="gauss-newton")
    for survived in range(1, 8):
        with monkeypatch.context() as patch:
            end_at_commit(patch, survived)
            with pytest.raises(KeyboardInterrupt):
                skipping(tmp_path / f"killed{survived}", basis="gauss-newton")
        assert not (tmp_path / f"killed{survived}" / "index" / "manifest.json").exists()
        skipping(tmp_path / f"killed{survived}", basis="gauss-newton")
        assert tiny.files(tmp_path / f"killed{survived}") == tiny.files(tmp_path / "whole")


def end_at_commit(patch: pytest.MonkeyPatch, number: int) -> None:
    """Interrupt a build at its commit of this number, counted from 1, before it is made."""
    commits = iter(range(1, 100))
    save = generations.save_pending

    def interrupted(directory: Path, manifest: Any) -> Any:
        if next(commits) == number:
            raise KeyboardInterrupt
        return save(directory, manifest)

    for module in ("begin", "completion"):
        patch.setattr(f"gradtrace_indexer.build.{module}.save_pending", interrupted)


def test_a_checkpoint_that_diverged_is_not_skipped_row_by_row(tmp_path: Path) -> None:
    task = ClassTask(tiny.mlp, ROWS)
    path = tmp_path / "1.pt"
    torch.save({name: torch.full_like(value, NAN) for name, value in task.model().state_dict().items()}, path)
    with pytest.raises(LossError, match=r"60 of 60 rows are bad .* check the data, and the checkpoint for divergence"):
        build_index(task, [Checkpoint(path, 1, 0.1)], tmp_path / "index", skip_bad_rows=True, progress=False)


def test_without_the_option_bad_rows_stop_the_build(tmp_path: Path) -> None:
    with pytest.raises(LossError, match=r"training row\(s\) 17"):
        tiny.build(ClassTask(tiny.mlp, Rows(ROWS, {17: nan_input})), tmp_path, basis="none")
    assert not (tmp_path / "index" / "manifest.json").exists()
    assert read_manifest(skipping(tmp_path / "other").directory).skipped
