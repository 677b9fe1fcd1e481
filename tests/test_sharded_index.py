"""The same questions to the same indexes, opened in one piece and over shards that are processes: the same answers."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import damaged_index
import tiny
from conftest import mostly_long
from gradtrace import Index, StoreError, Task, open_index
from gradtrace.results.hits import Hit, InfluenceResult
from gradtrace_indexer import append_rows, build_index, delete_rows
from gradtrace_indexer.build import begin
from test_sparse_rows import QUERIES as WORDS
from test_sparse_rows import WordsTask
from tiny import ClassTask

SPARSE = "sparse"
Built = tuple[Path, Task, list[Any]]
INCLUDED = ("percentiles", "histogram", "clusters")


def dense_index(folder: Path, undamaged: Path) -> Built:
    """Of int4 rows at four checkpoints and two averages, in files of 24 rows and fewer; some deleted, some appended."""
    shutil.copytree(undamaged, folder / "home")
    task = ClassTask(tiny.mlp, [*damaged_index.ROWS, *tiny.classes(9, seed=9)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(begin, "_SHARD_ROWS", 24)
        append_rows(folder / "home" / "index", task, progress=False)
    damaged_index.add_kernels(folder / "home" / "index", progress=False)
    damaged_index.fit_representer(folder / "home" / "index")
    delete_rows(folder / "home" / "index", [44])
    damaged_index.add_kernels(folder / "home" / "index", progress=False)
    damaged_index.fit_representer(folder / "home" / "index")
    return folder / "home" / "index", task, damaged_index.QUERIES


def sparse_index(folder: Path) -> Built:
    """In files of 15 rows and fewer; some deleted, some appended."""
    grown = WordsTask(40)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(begin, "default_segment_rows", lambda count: 15)
        checkpoints = tiny.checkpoints(WordsTask(30), folder / "checkpoints", 2)
        build_index(WordsTask(30), checkpoints, folder / "index", rows="sparse", dimensions=20, progress=False)
        append_rows(folder / "index", grown, progress=False)
    delete_rows(folder / "index", [0, 17, 35])
    return folder / "index", grown, WORDS


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, undamaged: Path) -> dict[str, Built]:
    return {
        "dense": dense_index(tmp_path_factory.mktemp("dense"), undamaged),
        SPARSE: sparse_index(tmp_path_factory.mktemp("sparse")),
    }


OVER = [f"{kind} over {count}" for kind in ("dense", SPARSE) for count in (1, 2, 3, 7)]


@pytest.fixture(scope="module", params=mostly_long(OVER, "dense over 3", "sparse over 3"))
def pair(request: pytest.FixtureRequest, built: dict[str, Built]) -> Iterator[tuple[Index, Index, list[Any]]]:
    """An index in one piece, and over shards; and queries."""
    kind, count = request.param.split(" over ")
    path, task, queries = built[kind]
    whole, sharded = (open_index(path, task, searcher="progressive", shards=shards) for shards in (0, int(count)))
    yield whole, sharded, queries
    sharded.close()


def check_hits(hits: list[Hit], expected: list[Hit]) -> None:
    for hit, one in zip(hits, expected, strict=True):
        assert replace(hit, layers=None, percentile=None) == replace(one, layers=None, percentile=None)
        assert (hit.layers or {}).keys() == (one.layers or {}).keys()
        assert [*(hit.layers or {}).values()] == pytest.approx([*(one.layers or {}).values()], rel=1e-9, abs=1e-12)
        assert hit.percentile == one.percentile


def check_result(result: InfluenceResult, expected: InfluenceResult) -> None:
    """Scores, parts, order and all texts are the same; what is of all scores, up to the rounding of float32."""
    check_hits(result.proponents, expected.proponents)
    check_hits(result.opponents, expected.opponents)
    of_hits = {"proponents": [], "opponents": [], "rows_touched": 0, "distribution": None}
    assert str(replace(result, **of_hits)) == str(replace(expected, **of_hits))
    if expected.distribution is None:
        assert result.distribution is None
        return
    assert result.distribution is not None
    assert result.distribution.mean == pytest.approx(expected.distribution.mean, rel=1e-5, abs=1e-7)
    assert result.distribution.quantiles == pytest.approx(expected.distribution.quantiles, rel=1e-5, abs=1e-7)
    if expected.distribution.histogram is not None:
        assert result.distribution.histogram is not None
        assert result.distribution.histogram.counts == expected.distribution.histogram.counts


QUESTIONS: list[dict[str, Any]] = [
    {"k": 5},
    {"k": 100},
    {"k": 4, "include": INCLUDED},
    {"k": 3, "filter": {"rows": [1, 5, 8, 26, 27]}},
    {"k": 3, "filter": {"exclude_rows": list(range(10, 25))}, "include": ("percentiles",)},
    {"k": 3, "aggregate": "mean"},
]


def test_hits_are_the_same_by_every_method(pair: tuple[Index, Index, list[Any]]) -> None:
    whole, sharded, queries = pair
    assert sharded.methods == whole.methods
    assert len(whole.methods) > 3
    for method in whole.methods:
        for question in QUESTIONS:
            answers = [index.influence(queries, method=method, **question) for index in (sharded, whole)]
            for result, expected in zip(*answers, strict=True):
                check_result(result, expected)


def test_rescored_hits_and_layers_are_the_same(pair: tuple[Index, Index, list[Any]]) -> None:
    whole, sharded, queries = pair
    for question in ({"rescore": True}, {"include": ("layers",)}, {"rescore": True, "include": INCLUDED}):
        for method in ("tracin", "cosine"):
            answers = [index.influence(queries, k=4, method=method, **question) for index in (sharded, whole)]  # type: ignore[arg-type]
            for result, expected in zip(*answers, strict=True):
                check_result(result, expected)


def test_what_reads_all_rows_is_the_same(pair: tuple[Index, Index, list[Any]]) -> None:
    whole, sharded, queries = pair
    for method in whole.methods:
        near(sharded.scores(queries, method=method), whole.scores(queries, method=method))
        groups = [index.group_influence(queries, by="correct", method=method) for index in (sharded, whole)]
        for group, expected in zip(*groups, strict=True):
            assert [(g.group, g.rows) for g in group] == [(g.group, g.rows) for g in expected]
            near([g.sum for g in group], [g.sum for g in expected])
        effects = [index.removal([1, 2, 30], queries, method=method) for index in (sharded, whole)]
        near(*([effect.score_sum for effect in of_index] for of_index in effects))
        if method != "tracin-adam" and method != "bm25":
            near(sharded.self_influence(method=method), whole.self_influence(method=method))


def near(values: Any, expected: Any) -> None:
    """Up to the rounding of float32."""
    finite = np.asarray(expected)[np.isfinite(expected)]
    np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-6 * np.abs(finite).max(initial=1e-6))


def test_an_approximate_searcher_is_refused(built: dict[str, Built], tmp_path: Path, undamaged: Path) -> None:
    shutil.copytree(undamaged, tmp_path / "home")
    with pytest.raises(StoreError, match="shards search exactly"):
        damaged_index.opened(tmp_path / "home" / "index", shards=2)
    opened = damaged_index.opened(tmp_path / "home" / "index", searcher="progressive", shards=2)
    assert opened.influence(damaged_index.QUERIES, k=2)[0].exact
    opened.close()


def test_more_shards_than_rows(tmp_path: Path) -> None:
    task = ClassTask(tiny.mlp, tiny.classes(3))
    whole = tiny.build(task, tmp_path)
    sharded = open_index(tmp_path / "index", task, shards=7)
    assert sharded.contents.shards is not None
    assert len(sharded.contents.shards.windows) == 3
    queries = tiny.classes(2, seed=1)
    assert [r.proponents for r in sharded.influence(queries)] == [r.proponents for r in whole.influence(queries)]
    sharded.close()


@pytest.mark.parametrize("method", ["tracin", "repsim"])
def test_tied_rows_come_in_the_order_of_one_searcher(tmp_path: Path, method: str) -> None:
    """Copies of a row lie in all shards."""
    (row,) = tiny.classes(1)
    task = ClassTask(tiny.mlp, [row, *tiny.classes(4, seed=3)] * 8)
    whole = tiny.build(task, tmp_path)
    sharded = open_index(tmp_path / "index", task, shards=3)
    for k in (1, 5, 40):
        (result,), (expected,) = (index.influence([row], k=k, method=method) for index in (sharded, whole))
        check_result(result, expected)
    sharded.close()
