"""Any sequence of updates, against a plain list of rows."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from conftest import examples
from gradtrace import Checkpoint, QueryError, open_index
from gradtrace.store.manifest_file import read_manifest
from gradtrace_indexer import (
    add_checkpoints,
    append_rows,
    build_index,
    compact,
    delete_rows,
    kept_generations,
    prune,
    roll_back,
    verify,
)
from gradtrace_indexer.build import begin
from gradtrace_indexer.build.builder import Builder
from tiny import ClassTask

ROWS, QUERIES = tiny.classes(60), tiny.classes(2, seed=5)
FIRST, CHECKPOINTS = 12, 4


@pytest.fixture(scope="module", params=["gaussian", "gauss-newton"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of the first rows at one checkpoint, and exact rows of all at all checkpoints."""
    directory = tmp_path_factory.mktemp("life")
    found = tiny.checkpoints(task(FIRST), directory / "checkpoints", CHECKPOINTS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(begin, "_SHARD_ROWS", 5)
        build_index(
            task(FIRST),
            found[:1],
            directory / "index",
            dimensions=12,
            basis=request.param,
            precision="float16",
            progress=False,
        )
    return directory


def task(rows: int) -> ClassTask:
    return ClassTask(tiny.mlp, ROWS[:rows])


@pytest.fixture(scope="module")
def parts(base: Path) -> torch.Tensor:
    """<query, row> at each checkpoint in the index's basis, times the learning rate. [checkpoints, queries, rows]."""
    whole = task(60)
    builder = Builder(whole, base / "index", device="cpu", progress=False)
    (basis,) = builder.bases_of(read_manifest(base / "index"))
    found = []
    for checkpoint in tiny.checkpoints(whole, base / "checkpoints", CHECKPOINTS):
        model = builder.model(checkpoint)
        rows, queries = (model.encode(basis, model.batch(examples))[0] for examples in (ROWS, QUERIES))
        found.append(checkpoint.learning_rate * queries @ rows.T)
    return torch.stack(found)


@dataclass
class Model:
    """What the index must answer like, with every generation that is kept."""

    rows: int = FIRST
    checkpoints: int = 1
    deleted: frozenset[int] = frozenset()
    generation: int = 1
    kept: dict[int, tuple[int, int, frozenset[int]]] = field(default_factory=dict)

    def present(self) -> list[int]:
        return [row for row in range(self.rows) if row not in self.deleted]

    def publish(self, rows: int, checkpoints: int, deleted: frozenset[int]) -> None:
        self.kept[self.generation] = (self.rows, self.checkpoints, self.deleted)
        self.generation += 1
        self.rows, self.checkpoints, self.deleted = rows, checkpoints, deleted


Step = tuple[str, int]
STEPS = st.lists(
    st.tuples(st.sampled_from(["append", "add", "delete", "delete", "compact", "roll back", "prune"]),
              st.integers(0, 2**31)),
    max_size=7,
)  # fmt: skip


def take(step: Step, model: Model, path: Path) -> None:
    """The same step in both."""
    name, number = step
    if name == "append":
        rows = min(60, model.rows + number % 9)
        append_rows(path, task(rows), progress=False)
        if rows > model.rows:
            model.publish(rows, model.checkpoints, model.deleted)
    elif name == "add":
        count = min(CHECKPOINTS, model.checkpoints + number % 3)
        files = path.parent / "checkpoints"
        found = [Checkpoint(files / f"{n}.pt", 5 * n * (n + 1), 0.1 / n, learning_rate_sum=float(n))
                 for n in range(1, count + 1)]  # fmt: skip
        add_checkpoints(path, task(model.rows), found, progress=False)
        if count > model.checkpoints:
            model.publish(model.rows, count, model.deleted)
    elif name == "delete":
        random = np.random.default_rng(number)
        chosen = random.choice(model.rows, size=random.integers(1, 1 + model.rows // 2), replace=False).tolist()
        delete(model, path, chosen)
    elif name == "compact":
        before = model.generation
        generation = compact(path, progress=False).generation
        if generation > before:
            model.publish(model.rows, model.checkpoints, model.deleted)
    elif name == "roll back" and model.kept:
        generation = sorted(model.kept)[number % len(model.kept)]
        roll_back(path, generation)
        model.publish(*model.kept[generation])
    elif name == "prune":
        prune(path, keep=1 + number % 3)
        model.kept = {n: kept for n, kept in model.kept.items() if n > model.generation - 1 - number % 3}


def delete(model: Model, path: Path, rows: list[int]) -> None:
    after = model.deleted | set(rows)
    if len(after) == model.rows and after != model.deleted:
        with pytest.raises(QueryError, match="would be left"):
            delete_rows(path, rows)
        return
    delete_rows(path, rows)
    if after != model.deleted:
        model.publish(model.rows, model.checkpoints, after)


def check(model: Model, path: Path, parts: Any) -> None:
    index = open_index(path, task(model.rows))
    present = model.present()
    assert index.manifest.generation == model.generation
    assert len(index.manifest.checkpoints) == model.checkpoints
    assert np.flatnonzero(index.present).tolist() == present
    expected = parts[: model.checkpoints].sum(0)[:, : model.rows].numpy().copy()
    expected[:, sorted(model.deleted)] = 0
    slack = float(2e-3 * np.max(np.abs(expected)))
    np.testing.assert_allclose(index.scores(QUERIES), expected, rtol=5e-3, atol=slack)
    for line, result in zip(expected, index.influence(QUERIES, k=60), strict=True):
        hits = [*result.proponents, *result.opponents]
        assert sorted(hit.row for hit in hits) == present
        for hit in hits:
            assert hit.score == pytest.approx(line[hit.row], rel=5e-3, abs=slack)
            assert hit.label == ROWS[hit.row][1]
            assert len(hit.parts) == model.checkpoints
    assert np.flatnonzero(index.self_influence(method="repsim") > -np.inf).tolist() == present
    (alike,) = index.influence([ROWS[present[-1]]], k=1, method="repsim", similarity="l2")
    assert alike.proponents[0].row == present[-1]
    assert alike.proponents[0].parts.keys() == {f"{model.checkpoints}.pt"}
    assert [kept.generation for kept in kept_generations(path)] == sorted(model.kept)
    assert verify(path, all_generations=True) == []


@settings(max_examples=examples(15))
@given(steps=STEPS)
def test_any_life(base: Path, parts: torch.Tensor, steps: list[Step]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "run"
        shutil.copytree(base, directory)
        model = Model()
        for step in steps:
            take(step, model, directory / "index")
        check(model, directory / "index", parts)
