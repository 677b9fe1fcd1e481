"""What a new user meets in the first hour: mistakes, bad rows, what is lost and how it comes back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tiny
from gradtrace import Index, LossError, open_index
from gradtrace_indexer import fit_representer
from tiny import ClassTask

ROWS, QUERIES = tiny.classes(60), tiny.classes(70, seed=5)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a small index that answers by most methods."""
    directory = tmp_path_factory.mktemp("index")
    tiny.build(ClassTask(tiny.mlp, ROWS), directory, basis="spectral", dimensions=30)
    fit_representer(directory / "index")
    return directory / "index"


@pytest.fixture(scope="module")
def index(directory: Path) -> Index:
    return open_index(directory, ClassTask(tiny.mlp, ROWS))


BAD = (torch.full((5,), float("nan")), 1)


@pytest.mark.parametrize("method", ["tracin", "cosine", "influence", "repsim", "representer"])
@pytest.mark.parametrize("bad", [{1}, {0, 2}, {65, 68}], ids=str)
def test_queries_without_a_finite_loss_are_named(index: Index, method: str, bad: set[int]) -> None:
    queries = [BAD if number in bad else query for number, query in enumerate(QUERIES)]
    numbers = ", ".join(map(str, sorted(bad)))
    with pytest.raises(LossError, match=f"query {numbers}, counted from 0: .*NaN or infinite") as raised:
        index.influence(queries, method=method)
    assert set(raised.value.positions) == bad


@pytest.mark.parametrize("method", ["tracin", "repsim"])
def test_training_examples_of_pairs_without_a_finite_loss_are_named(index: Index, method: str) -> None:
    with pytest.raises(LossError, match="training example 2, counted from 0") as raised:
        index.pairs([*ROWS[:2], BAD], QUERIES[:3], method=method)
    assert raised.value.positions == [2]
