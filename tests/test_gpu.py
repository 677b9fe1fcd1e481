"""What must hold on a CUDA device as on the CPU. These run by themselves where there is one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import gradtrace as gt
import tiny
from conftest import DigitsRun
from digits_task import TASK
from gradtrace import random_numbers
from gradtrace.search.exact_search import ProgressiveSearcher
from gradtrace_indexer import build_index

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


def test_the_same_answers_on_either_device(digits_index: DigitsRun) -> None:
    on_cpu = gt.open_index(digits_index.index, TASK, device="cpu")
    on_gpu = gt.open_index(digits_index.index, TASK, device="cuda")
    queries = [TASK.query[row] for row in range(5)]
    for method in on_cpu.methods:
        np.testing.assert_allclose(
            on_gpu.scores(queries, method=method), on_cpu.scores(queries, method=method), rtol=1e-3, atol=1e-6
        )
    for here, there in zip(on_cpu.influence(queries), on_gpu.influence(queries), strict=True):
        scores = [hit.score for hit in here.proponents + here.opponents]
        np.testing.assert_allclose([hit.score for hit in there.proponents + there.opponents], scores, rtol=1e-3)


def test_tf32_costs_the_search_no_hit(digits_index: DigitsRun) -> None:
    on_cpu = gt.open_index(digits_index.index, TASK, device="cpu")
    store, vectors = on_cpu.contents.store, tiny.stored(on_cpu)[:20]
    blocks = range(store.checkpoints)
    torch.set_float32_matmul_precision("high")
    try:
        found = ProgressiveSearcher(store, "cuda").search(vectors, blocks, 10)
    finally:
        torch.set_float32_matmul_precision("highest")
    for one, other in zip(found, ProgressiveSearcher(store).search(vectors, blocks, 10), strict=True):
        assert one.top.rows.tolist() == other.top.rows.tolist()
        assert one.bottom.rows.tolist() == other.bottom.rows.tolist()


@pytest.mark.parametrize("method", ["tracin", "cosine"])
def test_rescored_and_by_layer_on_either_device(digits_index: DigitsRun, method: str) -> None:
    queries = [TASK.query[row] for row in range(5)]
    for rescore in (False, True):
        asked = {"method": method, "rescore": rescore, "include": ["layers", "percentiles"]}
        here, there = (
            gt.open_index(digits_index.index, TASK, device=d).influence(queries, **asked) for d in ("cpu", "cuda")
        )
        for one, other in zip(here, there, strict=True):
            for a, b in zip(one.proponents, other.proponents, strict=True):
                assert a.layers is not None
                assert b.layers is not None
                np.testing.assert_allclose(list(b.layers.values()), list(a.layers.values()), rtol=1e-2, atol=1e-4)


def test_an_index_built_on_the_device(digits_index: DigitsRun, tmp_path: Path) -> None:
    """Rows agree in what any rotation leaves alone: their norms and the scores between them."""
    checkpoints = gt.load_checkpoints(digits_index.checkpoints)
    built = build_index(TASK, checkpoints, tmp_path / "index", dimensions=256, device="cuda", progress=False)
    there = gt.open_index(digits_index.index, TASK, device="cuda")
    queries = [TASK.query[row] for row in range(5)]
    for ours, theirs in zip(built.scores(queries), there.scores(queries), strict=True):
        assert np.corrcoef(ours, theirs)[0, 1] > 0.999


@pytest.mark.parametrize("draw", [random_numbers.rademacher, random_numbers.gaussian])
def test_random_draws(draw: object) -> None:
    assert callable(draw)
    torch.testing.assert_close(draw(3, 1, 7, 1000, "cuda").cpu(), draw(3, 1, 7, 1000, "cpu"), rtol=1e-6, atol=1e-7)
