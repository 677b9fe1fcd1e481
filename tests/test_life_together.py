"""Updates beside searchers, precisions and selections: what only shows where these meet."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient

import tiny
from gradtrace import CheckpointError, QueryError, StoreError, open_index
from gradtrace.checkpoints import Checkpoint
from gradtrace.store.manifest_file import read_manifest
from gradtrace_indexer import (
    add_checkpoints,
    add_kernels,
    append_rows,
    compact,
    delete_rows,
    fit_representer,
    prune,
    set_searcher,
    verify,
)
from gradtrace_indexer.description import details
from gradtrace_indexer.update.add_checkpoints import still_to_come
from gradtrace_indexer.update.update import _state
from gradtrace_service.answers.documents import index_info
from gradtrace_service.app import create_app
from tiny import ClassTask

ROWS, QUERY = tiny.classes(40), tiny.classes(1, seed=5)


def test_an_open_index_with_a_searcher_outlives_its_generation(tmp_path: Path) -> None:
    index = tiny.build(ClassTask(tiny.mlp, ROWS), tmp_path, searcher="faiss:Flat")
    before = index.scores(QUERY)
    delete_rows(tmp_path / "index", [1, 2])
    compact(tmp_path / "index", progress=False)
    prune(tmp_path / "index", keep=1)
    assert len(index.influence(QUERY, k=2)[0].proponents) == 2
    np.testing.assert_array_equal(index.scores(QUERY), before)


def test_what_an_index_holds_is_told(tmp_path: Path) -> None:
    task, path = ClassTask(tiny.mlp, ROWS), tmp_path / "index"
    tiny.build(task, tmp_path, count=3, basis="gauss-newton", dimensions=20, average_segments=1)
    add_kernels(path, progress=False)
    fit_representer(path)
    told = "\n".join(details(path))
    assert "safetensors: step 60, learning rate 0.05 (sum so far 3), the average of a segment's weights\n" in told
    assert "3.pt: step 60, learning rate 0.0333333 (sum so far 3)\n" in told
    assert "1 kernel(s) for trak, damping 0.3\n" in told
    assert "last layer refitted on them with l2 0.003" in told
    later = tiny.checkpoints(task, tmp_path / "checkpoints", 4)[3:]
    index = add_checkpoints(path, task, later, progress=False)
    told = "\n".join(details(path))
    assert "1 kernel(s) for trak, damping 0.3, 1 checkpoint(s) lack theirs: run `gradtrace kernels`" in told
    assert "last layer refitted on other ones: run `gradtrace representer` again" in told
    assert [one.kind for one in index_info(index).checkpoints] == ["average", "weights", "weights"]


def test_a_searcher_is_measured_beside_methods_that_refuse_some_queries(tmp_path: Path) -> None:
    """The refitted layer has no output for a held-out query's class that no row has."""
    task = ClassTask(tiny.mlp, [(x, y % 2) for x, y in tiny.classes(200)])
    task.query = [(QUERY[0][0], 2)]
    tiny.build(task, tmp_path)
    fit_representer(tmp_path / "index")
    index = set_searcher(tmp_path / "index", task, "faiss:Flat", progress=False)
    with pytest.raises(QueryError, match="classes 0 to 1"):
        index.influence(task.query, method="representer")
    assert index.manifest.searcher is not None
    assert set(index.manifest.searcher.recall) == {"tracin", "graddot"}


def test_deleted_examples_are_not_read_for_new_checkpoints(tmp_path: Path) -> None:
    """They may be blanked in the data set, and curvature does not depend on them."""
    tiny.build(ClassTask(tiny.mlp, ROWS), tmp_path, basis="gauss-newton", dimensions=20)
    delete_rows(tmp_path / "index", [3, 4])
    compact(tmp_path / "index", progress=False)
    blank = list(ROWS)
    blank[3] = blank[4] = (torch.full((5,), torch.nan), 0)
    task = ClassTask(tiny.mlp, blank)
    later = tiny.checkpoints(ClassTask(tiny.mlp, ROWS), tmp_path / "checkpoints", 3)
    assert len(add_checkpoints(tmp_path / "index", task, later, progress=False).manifest.checkpoints) == 3


def test_a_deleted_row_does_not_set_the_measure_for_cosines(tmp_path: Path) -> None:
    rows = [(x * 1e-18, y) for x, y in tiny.values(12)]
    rows[5] = (rows[5][0] * 1e32, rows[5][1])

    def model() -> torch.nn.Module:
        return torch.nn.Linear(5, 1, bias=False)

    tiny.build(tiny.ValueTask(model, rows), tmp_path, count=1)
    delete_rows(tmp_path / "index", [5])
    index = open_index(tmp_path / "index", tiny.ValueTask(model, rows))
    (result,) = index.influence([rows[0]], method="cosine", k=1)
    assert result.proponents[0].score == pytest.approx(1, abs=1e-3)
    compact(tmp_path / "index", progress=False)
    (again,) = open_index(tmp_path / "index", tiny.ValueTask(model, rows)).influence([rows[0]], method="cosine", k=1)
    assert again.proponents == result.proponents


def test_checkpoints_that_a_selection_left_out_stay_out(tmp_path: Path) -> None:
    task = ClassTask(tiny.mlp, ROWS)
    found = tiny.checkpoints(task, tmp_path / "checkpoints", 4)
    index = tiny.build_index(task, [found[0], found[2]], tmp_path / "index", basis="none", progress=False)
    wanted = still_to_come(found, index.manifest)
    assert wanted == [found[0], found[2], found[3]]
    grown = add_checkpoints(tmp_path / "index", task, wanted, progress=False)
    assert [entry.name for entry in grown.manifest.checkpoints] == ["1.pt", "3.pt", "4.pt"]


def test_a_watched_directory_of_weights_settles_with_its_files(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-5"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"half")
    checkpoint = Checkpoint(folder, 5, 0.1)
    before = _state(checkpoint)
    (folder / "model.safetensors").write_bytes(b"half and half")
    assert _state(checkpoint) != before


def test_a_deleted_row_is_no_query_over_http(tmp_path: Path) -> None:
    task = ClassTask(tiny.mlp, ROWS)
    tiny.build(task, tmp_path)
    delete_rows(tmp_path / "index", [3])
    with TestClient(create_app(open_index(tmp_path / "index", task))) as client:
        answer = client.post("/influence", json={"train_rows": [0, 3]})
        assert answer.status_code == 422
        assert "train_rows[1]: row 3 of the training data was deleted" in answer.json()["detail"]


def test_every_damaged_file_is_named(tmp_path: Path) -> None:
    tiny.build(ClassTask(tiny.mlp, ROWS), tmp_path, precision="int4")
    manifest = read_manifest(tmp_path / "index")
    damaged = [manifest.column_scales[0].path, manifest.shards[0].rows.path]
    for name in damaged:
        (tmp_path / "index" / name).write_bytes(b"")
    problems = verify(tmp_path / "index")
    assert len(problems) == 2
    assert all(any(name in problem for problem in problems) for name in damaged)


def test_updates_that_could_not_be_opened_are_refused_before_anything_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grown = ClassTask(tiny.mlp, ROWS)
    tiny.build(ClassTask(tiny.mlp, ROWS[:30]), tmp_path, searcher="faiss:Flat")
    generation = read_manifest(tmp_path / "index").generation
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "faiss", None)
        with pytest.raises(StoreError, match="faiss"):
            append_rows(tmp_path / "index", grown, progress=False)
    (tmp_path / "checkpoints" / "1.pt").rename(tmp_path / "moved.pt")
    with pytest.raises(CheckpointError, match=r"1\.pt are not at"):
        append_rows(tmp_path / "index", grown, progress=False)
    assert read_manifest(tmp_path / "index").generation == generation
