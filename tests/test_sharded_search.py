"""Search over row shards gives what one searcher gives, bit by bit: random indexes, ties, filters, scales, any cuts."""

from __future__ import annotations

import tempfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from conftest import examples
from gradtrace.errors import CorruptIndexError, QueryError
from gradtrace.methods.gradient_scoring import SelfProducts
from gradtrace.search.exact_search import ProgressiveSearcher
from gradtrace.search.scored_rows import RankingEnd, SearchResult
from gradtrace.sharded.ranges import row_ranges
from gradtrace.sharded.searcher import ShardedSearcher
from gradtrace.sharded.server import ShardOpening, ShardServer
from gradtrace.sharded.stores import ShardedDenseRows, ShardedInvertedRows
from gradtrace.sparse.store import SparseStore
from gradtrace.store.manifest import Manifest, SegmentSizes, ShardEntry
from gradtrace.store.rows import RowStore
from gradtrace_indexer.writing.segment_file import SegmentWriter
from made_index import write_index
from same_process_shards import row_shards
from test_search import CASES, Case, make_query, make_rows, make_scale
from test_sparse_search import CASES as SPARSE_CASES
from test_sparse_search import Case as SparseCase
from test_sparse_search import draw, sparse, values, with_norms

pytestmark = pytest.mark.unit

COUNTS = (1, 2, 3, 7)


def bits(end: RankingEnd) -> list[bytes]:
    return [end.rows.tobytes(), end.scores.tobytes(), end.parts.tobytes()]


def check_same(sharded: SearchResult, whole: SearchResult) -> None:
    assert bits(sharded.top) == bits(whole.top)
    assert bits(sharded.bottom) == bits(whole.bottom)
    assert (sharded.exact, sharded.rows_searched) == (whole.exact, whole.rows_searched)
    assert sharded.rows_touched <= sharded.rows_searched


@settings(max_examples=examples(100))
@given(case=CASES)
@example(Case(0, 400, 3, [3, 6, 12, 24], "float16", 64, 5, False, 0.0, 0.0, 4, False, False, 1.0))
@example(Case(1, 400, 3, [3, 6, 12, 24], "int8", 64, 5, True, 0.99, 0.3, 4, False, True, 0.5))
@example(Case(3, 400, 3, [4, 6, 12, 25], "int4", 64, 5, False, 0.5, 0.3, 25, False, True, 0.5))
@example(Case(4, 400, 1, [9], "int8", 1000, 10, True, 0.99, 0.97, 4, False, False, 0.03))
def test_dense_search_equals_one_searcher(case: Case) -> None:
    rng = np.random.default_rng(case.seed)
    with tempfile.TemporaryDirectory() as name:
        rows = make_rows(case, rng)
        manifest = write_index(Path(name), rows, case.precision, case.levels, case.shard_rows)
        whole = ProgressiveSearcher(RowStore(Path(name), manifest))
        sharded = [ShardedSearcher(row_shards(Path(name), manifest, count)) for count in COUNTS]
        chosen = rng.permutation(case.checkpoints)[: rng.integers(1, case.checkpoints + 1)].tolist()
        queries = torch.stack([make_query(case, rng, rows, chosen) for _ in range(3)]).float()
        scale = make_scale(case, rng) if case.scaled else None
        allowed = None if case.share_allowed == 1 else rng.random(case.rows) < case.share_allowed
        expected = whole.search(queries, chosen, case.k, row_scale=scale, allowed=allowed)
        scores = whole.scores(queries, chosen, row_scale=scale)
        for searcher in sharded:
            results = searcher.search(queries, chosen, case.k, row_scale=scale, allowed=allowed)
            for result, one in zip(results, expected, strict=True):
                check_same(result, one)
            if case.decades < 10:  # else scores do not fit into float32
                of_all, size = searcher.scores(queries, chosen, row_scale=scale), np.abs(scores).max(initial=0) * 1e-5
                np.testing.assert_allclose(of_all, scores, rtol=1e-5, atol=size)


def write_sparse(case: SparseCase, directory: Path, rng: np.random.Generator) -> Manifest:
    """An index of sparse rows, in stretches of these sizes."""
    total = sum(case.stretches)
    manifest = write_index(directory, np.zeros((case.checkpoints, total, 1), np.float32))
    entries: list[ShardEntry] = []
    for shard in manifest.shards:
        start = 0
        for count in case.stretches:
            writer = SegmentWriter(directory, f"postings/{shard.checkpoint}/{start}")
            rows = sparse(values(case, rng, count), draw(rng, count, case.kept, case.coordinates))
            writer.append(with_norms(rows))
            entry, sizes = writer.commit()
            segment = SegmentSizes(lists=sizes.lists, pairs=sizes.pairs)
            update = {"start": start, "stop": start + count, "rows": entry, "segment": segment}
            entries.append(shard.model_copy(update=update))
            start += count
    basis = manifest.basis.model_copy(update={"kind": "sparse", "damping": 1.0})
    return manifest.model_copy(update={"shards": entries, "basis": basis})


@settings(max_examples=examples(60))
@given(case=SPARSE_CASES)
def test_sparse_search_equals_one_searcher(case: SparseCase) -> None:
    """Also where a shard has some of a segment's rows."""
    rng = np.random.default_rng(case.seed)
    with tempfile.TemporaryDirectory() as name:
        manifest, total = write_sparse(case, Path(name), rng), sum(case.stretches)
        whole = SparseStore(Path(name), manifest)
        chosen = rng.permutation(case.checkpoints)[: rng.integers(1, case.checkpoints + 1)].tolist()
        scale = rng.choice([-2.0, 0.0, 0.5, 1.0], total).astype(np.float32) if case.scaled else None
        allowed = None if case.share_allowed == 1 else rng.random(total) < case.share_allowed
        kept = [draw(rng, case.queries, case.kept_of_query, case.coordinates) for _ in chosen]
        queries = [sparse(values(case, rng, case.queries), coordinates) for coordinates in kept]
        expected = whole.searcher.search(queries, chosen, case.k, row_scale=scale, allowed=allowed)
        for count in COUNTS:
            rows = ShardedInvertedRows(Path(name), manifest, row_shards(Path(name), manifest, count))
            results = rows.searcher.search(queries, chosen, case.k, row_scale=scale, allowed=allowed)
            for result, one in zip(results, expected, strict=True):
                check_same(result, one)
                assert result.rows_touched == one.rows_touched
            scores = [store.searcher.scores(queries, chosen, row_scale=scale) for store in (rows, whole)]
            np.testing.assert_array_equal(*scores)
            check_same_sparse_rows(rows, whole, rng, case.coordinates)


def check_same_sparse_rows(
    sharded: ShardedInvertedRows, whole: SparseStore, rng: np.random.Generator, coordinates: int
) -> None:
    some = np.flatnonzero(rng.random(whole.rows) < 0.2)
    factors = rng.random(coordinates)
    for checkpoint in range(whole.checkpoints):
        np.testing.assert_array_equal(sharded.norms(checkpoint), whole.norms(checkpoint))
        sums = [store.square_sums(checkpoint, factors) for store in (sharded, whole)]
        np.testing.assert_array_equal(*sums)
        dense = []
        for store in (sharded, whole):
            entries = store.gather(checkpoint, some)
            matrix = np.zeros((len(some), coordinates))
            matrix[entries.places, entries.coordinates] = entries.values
            dense.append(matrix)
        np.testing.assert_array_equal(*dense)


def random_rows(rows: int) -> NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal((3, rows, 20)).astype(np.float32)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("shard_rows", [40, 1000])
def test_whole_passes_equal_those_over_one_store(tmp_path: Path, count: int, shard_rows: int) -> None:
    manifest = write_index(tmp_path, random_rows(150), "int8", [4, 20], shard_rows)
    whole = RowStore(tmp_path, manifest)
    sharded = ShardedDenseRows(tmp_path, manifest, row_shards(tmp_path, manifest, count), "gradients")
    order = np.random.default_rng(1).integers(0, 150, 60)
    torch.testing.assert_close(sharded.gather([2, 0], order), whole.gather([2, 0], order), rtol=0, atol=0)
    np.testing.assert_array_equal(sharded.norms(1), whole.norms(1))
    products = SelfProducts([0, 1], [1, 0], torch.rand(2, 20))
    torch.testing.assert_close(sharded.each_row([2, 1], 16, products), whole.each_row([2, 1], 16, products))
    assert sharded.gather([0], []).shape == (0, 1, 20)
    for rows in ([-1], [150]):
        with pytest.raises(QueryError, match="rows must lie in 0 to 149"):
            sharded.gather([0], rows)


def test_what_a_shard_refuses_is_refused(tmp_path: Path) -> None:
    manifest = write_index(tmp_path, random_rows(50))
    searcher = ShardedSearcher(row_shards(tmp_path, manifest, 3))
    with pytest.raises(QueryError, match="NaN or infinite"):
        searcher.search(torch.full((1, 1, 20), torch.nan), [0], 5)
    with pytest.raises(QueryError, match="k must be at least 1"):
        searcher.search(torch.ones(1, 1, 20), [0], 0, allowed=np.zeros(50, bool))


def test_a_shard_that_verifies_refuses_damage_to_its_own_rows(tmp_path: Path) -> None:
    manifest = write_index(tmp_path, random_rows(100), shard_rows=50)
    path = tmp_path / manifest.shards[0].rows.path
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)
    ShardServer(ShardOpening(tmp_path, manifest, range(50, 100), 1, verify=True))
    with pytest.raises(CorruptIndexError, match=path.name):
        ShardServer(ShardOpening(tmp_path, manifest, range(40, 100), 1, verify=True))


@given(
    sizes=st.lists(st.integers(1, 1000), max_size=12),
    shards=st.integers(1, 20),
)
def test_ranges_tile_the_rows(sizes: list[int], shards: int) -> None:
    edges = [0, *np.cumsum(sizes).tolist()]
    stretches, rows = list(pairwise(edges)), sum(sizes)
    ranges = row_ranges(rows, stretches, shards)
    assert [row for each in ranges for row in each] == list(range(rows))
    assert len(ranges) == max(1, min(shards, rows))
    share = rows / len(ranges)
    assert all(0.75 * share - 1 <= len(each) <= 1.25 * share + 1 for each in ranges)


def test_ranges_follow_the_files_where_these_are_as_many() -> None:
    stretches = [(start, start + 10) for start in range(0, 100, 10)]
    for shards in (1, 2, 5, 10):
        assert all(each.start % 10 == 0 for each in row_ranges(100, stretches, shards))
