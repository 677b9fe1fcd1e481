"""The code of docs/how-it-works.md, run as it stands there, gives the library's scores."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tiny
from gradtrace import Checkpoint, Index
from gradtrace.checkpoints import Optimizer
from gradtrace_indexer import build_index

pytestmark = pytest.mark.unit

PAGE = (Path(__file__).parents[1] / "docs" / "how-it-works.md").read_text()
(CODE,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 4, bias=False), nn.Tanh(), nn.Linear(4, 3, bias=False))


def examples(x: Tensor, y: Tensor) -> list[tuple[Tensor, int]]:
    return list(zip(x.float(), y.tolist(), strict=True))


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    """The names that the code of the page leaves."""
    names: dict[str, Any] = {}
    exec(CODE, names)
    return names


@pytest.fixture(scope="module")
def index(page: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Index:
    """The library's index of the page's rows at its checkpoints, with all coordinates."""
    directory = tmp_path_factory.mktemp("how-it-works")
    checkpoints, total = [], 0.0
    for number, (weights, rate, rate_sum) in enumerate(page["checkpoints"], 1):
        total += rate_sum  # the library's sums count from step 0
        path = directory / f"{number}.pt"
        torch.save({"0.weight": weights[0].float(), "2.weight": weights[1].float()}, path)
        checkpoints.append(Checkpoint(path, 20 * number, rate, Optimizer("sgd"), learning_rate_sum=total))
    task = tiny.ClassTask(network, examples(page["x"], page["y"]))
    return build_index(task, checkpoints, directory / "index", basis="spectral", precision="float16", progress=False)


@pytest.mark.parametrize("method", ["tracin", "influence", "source"])
def test_the_page_computes_the_scores_of_the_library(method: str, page: dict[str, Any], index: Index) -> None:
    """`pairs` computes the rows anew and does not round them; what the index stores is rounded to float16."""
    expected = page[method].numpy()
    rows, queries = examples(page["x"], page["y"]), examples(page["x_query"], page["y_query"])
    computed, stored = index.pairs(rows, queries, method=method), index.scores(queries, method=method)
    assert np.linalg.norm(computed - expected) <= 1e-5 * np.linalg.norm(expected)
    assert np.linalg.norm(stored - expected) <= 1e-3 * np.linalg.norm(expected)


def test_the_page_is_short_and_has_no_classes() -> None:
    lines = [line for line in CODE.splitlines() if line.strip() and not line.startswith("#")]
    assert len(lines) <= 65
    assert "class " not in CODE
