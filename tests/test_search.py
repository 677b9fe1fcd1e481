"""The search against brute force: the same rows, in the same order, at both ends, whatever the input."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import examples, mostly_long
from gradtrace.errors import QueryError
from gradtrace.search.exact_search import ProgressiveSearcher, Route, extreme_positions
from gradtrace.search.integer_product import is_usable
from gradtrace.search.product_error import product_error
from gradtrace.search.scored_rows import SearchResult, exhaustive_scores
from gradtrace.store.manifest import Precision
from gradtrace.store.rows import RowStore
from made_index import make_store

ROUTES: tuple[Route | None, ...] = (None, "prune", "scan")


@dataclass
class Brute:
    """Scores and parts of every row in float64, and both ends by sorting (score, row)."""

    scores: NDArray[np.float64]  # [rows]
    parts: NDArray[np.float64]  # [rows, C]
    allowed: NDArray[np.bool_]  # [rows]

    def end(self, k: int, sign: int) -> list[int]:
        found = sorted((sign * self.scores[row], row) for row in np.flatnonzero(self.allowed))
        return [int(row) for _, row in found[:k]]


def brute_force(
    store: RowStore,
    query: torch.Tensor,
    checkpoints: list[int],
    row_scale: torch.Tensor | None = None,
    allowed: NDArray[np.bool_] | None = None,
) -> Brute:
    rows = torch.cat([block for _, block in store.blocks(checkpoints, 1000)]).double().numpy()  # [rows, C, D]
    scale = np.ones(store.rows) if row_scale is None else row_scale.double().numpy()
    inner = (rows * query.double().numpy()).sum(axis=2)  # a matrix product may round equal rows differently
    mask = np.ones(store.rows, bool) if allowed is None else allowed
    return Brute(inner.sum(axis=1) * scale, inner * scale[:, None], mask)


def check(result: SearchResult, brute: Brute, k: int) -> None:
    assert result.exact
    assert result.rows_searched == brute.allowed.sum()
    assert result.rows_touched <= result.rows_searched
    for end, sign in ((result.top, -1), (result.bottom, 1)):
        rows, scores, parts = end.rows, end.scores, end.parts
        assert rows.tolist() == brute.end(k, sign)
        assert (rows.dtype, scores.dtype, parts.dtype) == (np.int64, np.float32, np.float32)
        size = np.abs(brute.parts[rows]).max(initial=0) * 1e-6
        np.testing.assert_allclose(scores, brute.scores[rows], rtol=1e-6, atol=size)
        np.testing.assert_allclose(parts, brute.parts[rows], rtol=1e-6, atol=size)


@dataclass
class Case:
    seed: int
    rows: int
    checkpoints: int
    levels: list[int]
    precision: Precision
    shard_rows: int
    k: int
    integers: bool  # exact arithmetic with many ties, or normal rows of sizes over many powers of ten
    repeats: float  # share of rows that are copies of others
    zeros: float  # share of rows that are zero
    decades: int  # over which the sizes of rows are spread, up and down
    aligned: bool  # the query points along a row, and most of both is in the last level: the bounds are tight
    scaled: bool
    share_allowed: float


CASES = st.builds(
    Case,
    seed=st.integers(0, 2**32 - 1),
    rows=st.sampled_from([1, 2, 3, 30, 150, 400]),
    checkpoints=st.integers(1, 3),
    levels=st.sampled_from([[1], [9], [2, 20], [4, 6, 12, 25]]),
    precision=st.sampled_from(["float16", "int8", "int4"]),
    shard_rows=st.sampled_from([64, 1000]),
    k=st.sampled_from([1, 2, 5, 10, 500]),
    integers=st.booleans(),
    repeats=st.sampled_from([0.0, 0.5, 0.99]),
    zeros=st.sampled_from([0.0, 0.3, 0.97]),
    decades=st.sampled_from([4, 25]),
    aligned=st.booleans(),
    scaled=st.booleans(),
    share_allowed=st.sampled_from([0.0, 0.03, 0.5, 1.0]),
)


def make_rows(case: Case, rng: np.random.Generator) -> NDArray[np.float32]:
    shape = case.checkpoints, case.rows, case.levels[-1]
    steep = 1.0 / np.arange(1, case.levels[-1] + 1)
    if case.integers:
        rows = rng.integers(-3, 4, shape) * 2.0 ** rng.integers(-6, 7, (1, case.rows, 1))
    else:
        rows = rng.standard_normal(shape) * steep * 10.0 ** rng.uniform(-case.decades, case.decades, (1, case.rows, 1))
    copies = rng.random(case.rows) < case.repeats
    rows[:, copies] = rows[:, rng.integers(0, case.rows, copies.sum())]
    rows[:, rng.random(case.rows) < case.zeros] = 0
    if case.aligned and len(case.levels) > 1:
        rows[:, :, : case.levels[-2]] /= 64
    return rows.astype(np.float32)


def make_query(case: Case, rng: np.random.Generator, rows: NDArray[np.float32], checkpoints: list[int]) -> torch.Tensor:
    if case.aligned and case.decades < 10:  # squares of larger rows do not fit into float32
        return torch.from_numpy(rows[checkpoints, rng.integers(0, case.rows)] * rng.choice([-1, 2]))
    shape = len(checkpoints), case.levels[-1]
    values = rng.integers(-2, 3, shape) if case.integers else rng.standard_normal(shape) * 10.0 ** rng.uniform(-9, 9)
    return torch.from_numpy(values.astype(np.float32))


def make_scale(case: Case, rng: np.random.Generator) -> torch.Tensor:
    values = rng.choice([-2.0, 0.0, 0.5, 1.0], case.rows) if case.integers else rng.standard_normal(case.rows)
    return torch.from_numpy(values.astype(np.float32))


@settings(max_examples=examples(100), deadline=None)
@given(case=CASES)
@example(Case(0, 400, 3, [3, 6, 12, 24], "float16", 64, 5, False, 0.0, 0.0, 4, False, False, 1.0))
@example(Case(1, 400, 3, [3, 6, 12, 24], "int8", 64, 5, True, 0.5, 0.3, 4, False, True, 0.5))
@example(Case(2, 400, 3, [3, 6, 12, 24], "float16", 1000, 2, False, 0.0, 0.0, 4, True, False, 1.0))
@example(Case(3, 400, 3, [4, 6, 12, 25], "int4", 64, 5, False, 0.5, 0.3, 25, False, True, 0.5))
def test_both_ends_equal_brute_force(case: Case) -> None:
    rng = np.random.default_rng(case.seed)
    with tempfile.TemporaryDirectory() as name:
        rows = make_rows(case, rng)
        store = make_store(Path(name), rows, case.precision, case.levels, case.shard_rows)
        searchers = [ProgressiveSearcher(store, route=route) for route in ROUTES]
        for _ in range(3):
            chosen = rng.permutation(case.checkpoints)[: rng.integers(1, case.checkpoints + 1)].tolist()
            query = make_query(case, rng, rows, chosen)
            scale = make_scale(case, rng) if case.scaled else None
            allowed = None if case.share_allowed == 1 else rng.random(case.rows) < case.share_allowed
            brute = brute_force(store, query, chosen, scale, allowed)
            for searcher in searchers:
                (result,) = searcher.search(query[None], chosen, case.k, row_scale=scale, allowed=allowed)
                check(result, brute, case.k)


def gradient_like(rows: int, checkpoints: int = 3, columns: int = 96) -> NDArray[np.float32]:
    """Steep spectrum, correlated checkpoints, norms over several powers of ten. [checkpoints, rows, columns]."""
    rng = np.random.default_rng(0)
    common = rng.standard_normal((1, rows, columns)) + 0.5 * rng.standard_normal((checkpoints, rows, columns))
    spectrum = 1.0 / np.arange(1, columns + 1)
    return (common * spectrum * 10.0 ** rng.uniform(-4, 0, (1, rows, 1))).astype(np.float32)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> RowStore:
    return make_store(tmp_path_factory.mktemp("index"), gradient_like(3000), "float16", [8, 24, 96], 1100)


@pytest.fixture(scope="module")
def queries() -> torch.Tensor:
    return torch.from_numpy(gradient_like(3008)[:, 3000:].transpose(1, 0, 2).copy())  # [8, 3, 96]


def test_few_rows_are_touched_where_the_spectrum_is_steep(store: RowStore, queries: torch.Tensor) -> None:
    for query, result in zip(queries, ProgressiveSearcher(store).search(queries, [0, 1, 2], 10), strict=True):
        check(result, brute_force(store, query, [0, 1, 2]), 10)
        assert result.rows_touched < 600


@pytest.mark.skipif(not is_usable(), reason="this processor has no exact and fast integer products")
def test_queries_that_the_first_level_says_little_of_are_scanned(tmp_path: Path, queries: torch.Tensor) -> None:
    """All rows are read then, whatever the rows that may be returned; steep queries read few rows as before."""
    store = make_store(tmp_path, gradient_like(3000), "int8", [8, 24, 96], 1100)
    searcher = ProgressiveSearcher(store)
    white = queries * (1 + torch.arange(96.0)) ** 2
    assert all(result.rows_touched == 3000 for result in searcher.search(white, [0, 1, 2], 10))
    assert all(result.rows_touched < 600 for result in searcher.search(queries, [0, 1, 2], 10))
    some = np.arange(3000) % 2 == 0
    for query, result in zip(white, searcher.search(white, [0, 1, 2], 10, allowed=some), strict=True):
        check(result, brute_force(store, query, [0, 1, 2], allowed=some), 10)
        assert result.rows_touched == 1500
    few = np.arange(3000) < 100
    assert all(result.rows_touched <= 100 for result in searcher.search(white, [0, 1, 2], 10, allowed=few))


def test_it_stays_exact_where_bounds_do_not_prune(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((2, 2000, 64)).astype(np.float32)
    rows[:, :, :4] = 0  # the first level says nothing
    store = make_store(tmp_path, rows / np.linalg.norm(rows, axis=2, keepdims=True), "int8", [4, 16, 64], 700)
    query = torch.from_numpy(rng.standard_normal((2, 64)).astype(np.float32))
    for route in ROUTES:
        (result,) = ProgressiveSearcher(store, route=route).search(query[None], [0, 1], 7)
        check(result, brute_force(store, query, [0, 1]), 7)
        assert result.rows_touched == 2000


@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("precision", ["float16", "int8", "int4"])
def test_bounds_that_are_tight_lose_no_hit(tmp_path: Path, k: int, precision: Precision) -> None:
    """All rows lie along the query, so every bound is reached; the first level is zero, so the seeds are arbitrary."""
    rng = np.random.default_rng(0)
    direction = rng.standard_normal((2, 1, 24))
    direction[:, :, :4] = 0
    sizes = rng.uniform(0.5, 1, (1, 500, 1)) * np.sign(rng.standard_normal((1, 500, 1)))
    store = make_store(tmp_path, (direction * sizes).astype(np.float32), precision, [4, 6, 12, 24])
    query = torch.from_numpy(direction[:, 0].astype(np.float32))
    for route in ROUTES:
        (result,) = ProgressiveSearcher(store, route=route).search(query[None], [0, 1], k)
        check(result, brute_force(store, query, [0, 1]), k)


@pytest.mark.parametrize("route", mostly_long(ROUTES, None))
@pytest.mark.parametrize("precision", ["float16", "int8", "int4"])
def test_a_query_gets_the_same_answer_alone_and_in_a_batch(
    tmp_path: Path, queries: torch.Tensor, precision: Precision, route: Route | None
) -> None:
    store = make_store(tmp_path, gradient_like(3000), precision, [8, 24, 96], 1100)
    searcher = ProgressiveSearcher(store)
    white = queries / queries.abs().mean(0)
    queries = torch.cat([queries, white, -queries, 1e-9 * queries])  # more than one pass over the rows takes
    together = searcher.search(queries, [0, 2, 1], 5)
    for query, batched in zip(queries, together, strict=True):
        (alone,) = ProgressiveSearcher(store, route=route).search(query[None], [0, 2, 1], 5)
        for end, batched_end in ((alone.top, batched.top), (alone.bottom, batched.bottom)):
            for field in ("rows", "scores", "parts"):
                np.testing.assert_array_equal(getattr(end, field), getattr(batched_end, field))


@pytest.mark.parametrize("precision", mostly_long(["float16", "int8", "int4"], "int8"))
def test_it_is_exact_among_many_rows(tmp_path: Path, precision: Precision) -> None:
    """So many that seeds come from stretches of rows, and that one level is read in pieces over several shards."""
    rows = gradient_like(20_003, 1, 300)
    store = make_store(tmp_path, rows[:, :20_000], precision, [4, 290, 300], 6000)
    query = torch.from_numpy(rows[:, 20_000].copy())
    for k, route in product((1, 10), ROUTES):
        (result,) = ProgressiveSearcher(store, route=route).search(query[None], [0], k)
        check(result, brute_force(store, query, [0]), k)


def test_extremes_hold_the_very_highest_and_lowest() -> None:
    for count in (1, 20, 1000):
        values = np.random.default_rng(count).standard_normal(100_000).astype(np.float32)
        found = extreme_positions(values, count)
        assert {values.argmax(), values.argmin()} <= set(found)
        assert len(found) == 2 * count
        assert (np.diff(found) > 0).all()


@pytest.mark.parametrize("size", [1e-40, 1e-30, 1e30])
def test_neither_tiny_nor_huge_queries_lose_a_hit(tmp_path: Path, queries: torch.Tensor, size: float) -> None:
    store = make_store(tmp_path, gradient_like(3000), "int8", [8, 24, 96], 1100)
    query = (queries[0].double() * size).float()
    for route in ROUTES:
        (result,) = ProgressiveSearcher(store, route=route).search(query[None], [0, 1, 2], 10)
        brute = brute_force(store, query, [0, 1, 2])
        assert result.top.rows.tolist() == brute.end(10, -1)
        assert result.bottom.rows.tolist() == brute.end(10, 1)


@pytest.mark.parametrize("precision", ["float16", "int8", "int4"])
@pytest.mark.parametrize("size", [1e-36, 1e-25, 1e27])
def test_neither_tiny_nor_huge_rows_lose_a_hit(
    tmp_path: Path, queries: torch.Tensor, size: float, precision: Precision
) -> None:
    rows = (gradient_like(400).astype(np.float64) * size).astype(np.float32)
    store = make_store(tmp_path, rows, precision, [8, 24, 96])
    brute = brute_force(store, queries[0], [0, 1, 2])
    for route in ROUTES:
        (result,) = ProgressiveSearcher(store, route=route).search(queries[:1], [0, 1, 2], 10)
        assert result.top.rows.tolist() == brute.end(10, -1)
        assert result.bottom.rows.tolist() == brute.end(10, 1)


def test_a_zero_query_scores_zero_and_the_first_rows_win(store: RowStore) -> None:
    allowed = np.arange(store.rows) >= 100
    (result,) = ProgressiveSearcher(store).search(torch.zeros(1, 2, 96), [0, 1], 4, allowed=allowed)
    assert result.top.rows.tolist() == result.bottom.rows.tolist() == [100, 101, 102, 103]
    assert not result.top.scores.any()
    assert not result.bottom.parts.any()


def test_an_empty_index_has_no_hits(tmp_path: Path) -> None:
    store = make_store(tmp_path, np.zeros((1, 0, 4), np.float32))
    (result,) = ProgressiveSearcher(store).search(torch.ones(1, 1, 4), [0], 3)
    assert len(result.top.rows) == len(result.bottom.rows) == result.rows_searched == 0


def test_impossible_searches_are_refused(store: RowStore, queries: torch.Tensor) -> None:
    searcher = ProgressiveSearcher(store)
    with pytest.raises(QueryError, match="k must be at least 1"):
        searcher.search(queries, [0, 1, 2], 0)
    with pytest.raises(QueryError, match="NaN"):
        searcher.search(queries * torch.nan, [0, 1, 2], 3)
    for value in (torch.nan, torch.inf, 1e38):
        with pytest.raises(QueryError, match="row_scale"):
            searcher.search(queries, [0, 1, 2], 3, row_scale=torch.full((store.rows,), value))


@pytest.mark.parametrize("checkpoints", mostly_long([[0, 1, 2], [2], [2, 0]], [2, 0]))
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(
    ("precision", "size"), [("float16", 1), ("int8", 1), ("int4", 1), ("int8", 1e-30), ("int4", 1e25)]
)
def test_exhaustive_scores_are_brute_force(
    tmp_path: Path, queries: torch.Tensor, checkpoints: list[int], scaled: bool, precision: Precision, size: float
) -> None:
    store = make_store(tmp_path, gradient_like(3000, columns=96), precision, [8, 24, 94, 96], 1100)
    queries = size * torch.cat([queries, queries.flip(0), torch.zeros_like(queries)])  # more than one scan takes
    scale = torch.linspace(-1, 2, store.rows) if scaled else None
    scores = exhaustive_scores(store, queries[:, checkpoints], checkpoints, scale)
    assert scores.dtype == np.float32
    want = np.stack([brute_force(store, query[checkpoints], checkpoints, scale).scores for query in queries])
    np.testing.assert_allclose(scores, want, rtol=1e-5, atol=1e-6 * np.abs(want).max())


def cut(values: torch.Tensor, bits: int) -> torch.Tensor:
    """float32 values with this many bits of their mantissas left, as tensor cores take them."""
    return (values.contiguous().view(torch.int32) >> (23 - bits) << (23 - bits)).view(torch.float32)


class CutProducts(TorchDispatchMode):
    """PyTorch as on a device that cuts the operands of matrix products to 10 bits."""

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operation.overloadpacket.__name__ in ("mv", "mm", "addmv", "addmv_", "addmm", "addmm_"):
            args = (*args[:-2], cut(args[-2], 10), cut(args[-1], 10))
        return operation(*args, **(kwargs or {}))


@pytest.fixture
def products() -> Iterator[Callable[[str], None]]:
    """Sets how float32 products are computed; full precision again afterwards."""
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("together", [False, True])
def test_products_of_rounded_operands_lose_no_hit(
    tmp_path: Path, products: Callable[[str], None], together: bool
) -> None:
    """Scores so close that operands of 10 bits change their order, as TF32 has them."""
    generator = np.random.default_rng(0)
    query = generator.standard_normal(8)
    aside = generator.standard_normal((3000, 8))
    aside -= (aside @ query)[:, None] * query / (query @ query)
    rows = (query * (1 + 1e-4 * generator.standard_normal(3000))[:, None] + 0.5 * aside).astype(np.float32)[None]
    store = make_store(tmp_path, np.concatenate([rows, -rows], axis=1))
    searcher = ProgressiveSearcher(store)
    queries = torch.from_numpy(query).float().expand(2 if together else 1, 1, 8)
    stored = torch.cat([block for _, block in store.blocks([0], 1000)])[:, 0].double().numpy()
    scores = stored @ queries[0, 0].double().numpy()
    best, worst = np.argsort(-scores, kind="stable")[:10], np.argsort(scores, kind="stable")[:10]

    def exact(result: SearchResult) -> bool:
        return np.array_equal(result.top.rows, best) and np.array_equal(result.bottom.rows, worst)

    with CutProducts():
        products("highest")
        assert not exact(searcher.search(queries, [0], 10)[0])  # the operands are cut, and the searcher cannot know
        products("high")
        assert all(exact(result) for result in searcher.search(queries, [0], 10))


@pytest.mark.parametrize(("precision", "bits"), [("highest", 23), ("high", 10), ("medium", 7)])
def test_the_bound_of_rounded_operands_holds(products: Callable[[str], None], precision: str, bits: int) -> None:
    products(precision)
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(200, 33, generator=generator) for _ in range(2))
    off = (cut(a, bits).double() * cut(b, bits).double() - a.double() * b.double()).sum(1).abs()
    for device in ("cpu", "cuda") if precision == "high" else ("cpu",):  # CUDA takes "medium" for TF32
        assert (off <= product_error(device) * (a * b).double().abs().sum(1)).all()
    assert (product_error("cpu") == 0) == (precision == "highest")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_first_level_may_lie_on_a_gpu(store: RowStore, queries: torch.Tensor) -> None:
    results = ProgressiveSearcher(store, device="cuda").search(queries.cuda(), [0, 1, 2], 10)
    for query, result in zip(queries, results, strict=True):
        check(result, brute_force(store, query, [0, 1, 2]), 10)
