"""What a new user meets in the first hour: mistakes, bad rows, what is lost and how it comes back."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import tiny
from gradtrace import Index, LossError, QueryError, open_index
from gradtrace.methods import METHODS
from gradtrace_indexer import add_kernels, compact, delete_rows, fit_representer, set_searcher
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


def test_what_a_change_of_rows_takes_away_is_told_with_what_brings_it_back(
    directory: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = shutil.copytree(directory.parent, tmp_path / "run") / "index"
    add_kernels(path, progress=False)
    set_searcher(path, ClassTask(tiny.mlp, ROWS), "faiss:Flat", progress=False)
    assert not caplog.messages
    delete_rows(path, [3])
    trak, representer = caplog.messages
    assert f"generation 5 of {path} no longer answers by trak" in trak
    assert "run `gradtrace kernels` on it" in trak
    assert "no longer answers by representer" in representer
    assert "run `gradtrace representer` on it again" in representer
    opened = open_index(path, ClassTask(tiny.mlp, ROWS))
    with pytest.raises(QueryError, match="run `gradtrace kernels` on it"):
        opened.influence(QUERIES[:1], method="trak")
    caplog.clear()
    compact(path, progress=False)
    (searcher,) = caplog.messages
    assert "no longer uses searcher faiss:Flat" in searcher
    assert "`gradtrace build` sets it again" in searcher
    caplog.clear()
    fit_representer(path)
    add_kernels(path, progress=False)
    assert not caplog.messages
    assert {"trak", "representer"} <= set(open_index(path, ClassTask(tiny.mlp, ROWS)).methods)


def test_every_method_that_an_index_lacks_has_a_command(index: Index) -> None:
    bare = index.manifest.model_copy(update={"curvature": [], "representations": None, "representer": None})
    lacking = [method.lacks(bare) for method in METHODS.values()]
    assert sum(why is not None for why in lacking) == len(METHODS) - 3  # all but tracin, graddot and cosine
    assert all("`gradtrace " in why for why in lacking if why is not None)
