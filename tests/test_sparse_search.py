"""Sparse rows: their inverted index against an independent reading of the format, their search against brute force."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from conftest import examples
from gradtrace.errors import CorruptIndexError, QueryError, StoreError
from gradtrace.search.scored_rows import RankingEnd, SearchResult
from gradtrace.sparse.search import SparseSearcher
from gradtrace.sparse.segments import MOST_ROWS, Segment, SegmentLayout, SegmentRows
from gradtrace.sparse.vectors import SparseRows, SparseVectors
from gradtrace.store.index_files import check_file
from gradtrace_indexer.writing.segment_file import SegmentWriter

pytestmark = pytest.mark.unit

NAME = "postings/a.pt/000000000.1.postings"


def sparse(dense: NDArray[np.float32], kept: NDArray[np.uint32]) -> SparseVectors:
    """The kept coordinates of dense vectors. dense: [n, D];  kept: [n, m], ascending"""
    return SparseVectors(kept, np.take_along_axis(dense, kept.astype(np.int64), axis=1))


def draw(rng: np.random.Generator, count: int, kept: int, coordinates: int) -> NDArray[np.uint32]:
    """Different coordinates for each of `count` vectors, ascending. [count, kept]"""
    order = rng.random((count, coordinates)).argsort(axis=1)[:, :kept]
    return np.sort(order, axis=1).astype(np.uint32)


def write_rows(directory: Path, name: str, rows: SparseVectors, batch: int = 7) -> Segment:
    writer = SegmentWriter(directory, name)
    for start in range(0, len(rows), batch):
        writer.append(with_norms(rows[start : start + batch]))
    entry, sizes = writer.commit()
    layout = SegmentLayout(len(rows), sizes.lists, sizes.pairs)
    assert entry.bytes == layout.bytes
    return Segment(directory / name, layout)


def with_norms(vectors: SparseVectors) -> SparseRows:
    """Norms of whole gradients: any numbers."""
    return SparseRows(vectors, np.linalg.norm(vectors.values, axis=1) + 1)


def read_independently(path: Path, layout: SegmentLayout, coordinates: int) -> NDArray[np.float64]:
    """Dense rows [rows, coordinates], by the words of the format and numpy alone."""
    data, position = path.read_bytes(), 0

    def block(dtype: str, count: int) -> list[float]:
        nonlocal position
        values = np.frombuffer(data, dtype, count, position)
        end = position + values.nbytes
        position = end + -end % 64
        assert not any(data[end:position])
        return values.tolist()

    names, ends = block("<u4", layout.lists), block("<u4", layout.lists + 1)
    rows, codes = block("<u2", 2 * layout.pairs), block("i1", 2 * layout.pairs)
    scales = block("<f4", layout.rows)
    block("<f4", layout.rows)  # norms
    assert position == len(data)
    dense = np.zeros((layout.rows, coordinates))
    for number, coordinate in enumerate(names):
        for posting in range(2 * int(ends[number]), 2 * int(ends[number + 1])):
            dense[int(rows[posting]), int(coordinate)] += codes[posting] * scales[int(rows[posting])]
    return dense


@dataclass
class Case:
    seed: int
    stretches: list[int]  # rows of each
    checkpoints: int
    coordinates: int
    kept: int
    kept_of_query: int
    k: int
    queries: int
    integers: bool  # exact arithmetic with many ties
    zeros: float  # share of rows that are zero
    scaled: bool
    share_allowed: float


CASES = st.builds(
    Case,
    seed=st.integers(0, 2**32 - 1),
    stretches=st.lists(st.sampled_from([1, 2, 30, 150]), min_size=1, max_size=4),
    checkpoints=st.integers(1, 3),
    coordinates=st.sampled_from([8, 40, 300]),
    kept=st.integers(1, 8),
    kept_of_query=st.integers(1, 8),
    k=st.sampled_from([1, 2, 5, 10, 500]),
    queries=st.integers(1, 3),
    integers=st.booleans(),
    zeros=st.sampled_from([0.0, 0.3, 0.97]),
    scaled=st.booleans(),
    share_allowed=st.sampled_from([0.0, 0.03, 0.5, 1.0]),
)


def values(case: Case, rng: np.random.Generator, count: int) -> NDArray[np.float32]:
    shape = count, case.coordinates
    if case.integers:
        dense = rng.integers(-3, 4, shape) * 2.0 ** rng.integers(-6, 7, (count, 1))
    else:
        dense = rng.standard_normal(shape) * 10.0 ** rng.uniform(-12, 12, (count, 1))
    dense[rng.random(count) < case.zeros] = 0
    return dense.astype(np.float32)


def check(
    result: SearchResult, parts: NDArray[np.float64], allowed: NDArray[np.bool_] | None, k: int, exact: bool
) -> None:
    """The ends are those of the scores' sums of `parts` [rows, C] by sorting (score, row)."""
    scores = parts.sum(axis=1)
    rows = np.flatnonzero(np.ones(len(scores), bool) if allowed is None else allowed)
    assert result.exact
    assert result.rows_searched == len(rows)
    assert result.rows_touched == np.count_nonzero(parts[rows].any(axis=1))
    for end, sign in ((result.top, -1), (result.bottom, 1)):
        expected = sorted((sign * scores[row], row) for row in rows)[:k]
        assert (end.rows.dtype, end.scores.dtype, end.parts.dtype) == (np.int64, np.float32, np.float32)
        if exact:
            assert end.rows.tolist() == [row for _, row in expected]
        size = 1e-6 * np.abs(parts[end.rows]).max(initial=0)
        np.testing.assert_allclose(end.scores, [sign * score for score, _ in expected], rtol=1e-6, atol=size)
        np.testing.assert_allclose(end.parts, parts[end.rows], rtol=1e-6, atol=size)


@settings(max_examples=examples(60), deadline=None)
@given(case=CASES)
def test_both_ends_equal_brute_force(case: Case) -> None:
    rng = np.random.default_rng(case.seed)
    chosen = rng.permutation(case.checkpoints)[: rng.integers(1, case.checkpoints + 1)].tolist()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        segments: list[list[Segment]] = []
        stored = []  # of each checkpoint, the rows as the file has them
        for c in range(case.checkpoints):
            segments.append([])
            for s, count in enumerate(case.stretches):
                rows = sparse(values(case, rng, count), draw(rng, count, case.kept, case.coordinates))
                segments[c].append(write_rows(directory, f"{c}.{s}", rows))
            dense = (
                read_independently(directory / f"{c}.{s}", segment.layout, case.coordinates)
                for s, segment in enumerate(segments[c])
            )
            stored.append(np.concatenate(list(dense)))
        searcher = SparseSearcher(segments)
        total = sum(case.stretches)
        assert searcher.rows == total
        scale = rng.choice([-2.0, 0.0, 0.5, 1.0], total).astype(np.float32) if case.scaled else None
        allowed = None if case.share_allowed == 1 else rng.random(total) < case.share_allowed
        drawn = [draw(rng, case.queries, case.kept_of_query, case.coordinates) for _ in chosen]
        queries = [sparse(values(case, rng, case.queries), kept) for kept in drawn]
        results = searcher.search(queries, chosen, case.k, row_scale=scale, allowed=allowed)
        all_scores = searcher.scores(queries, chosen, row_scale=scale)
        assert (all_scores.shape, all_scores.dtype) == ((case.queries, total), np.float32)
        for number, result in enumerate(results):
            parts = np.zeros((total, len(chosen)))
            for position, c in enumerate(chosen):
                query = np.zeros(case.coordinates)
                query[queries[position].coordinates[number]] = queries[position].values[number]
                parts[:, position] = stored[c] @ query
            if scale is not None:
                parts *= scale[:, None]
            check(result, parts, allowed, case.k, exact=case.integers)
            size = 1e-6 * np.abs(parts).max(initial=0)
            np.testing.assert_allclose(all_scores[number], parts.sum(axis=1), rtol=1e-5, atol=size)
            alone = [SparseVectors(q.coordinates[[number]], q.values[[number]]) for q in queries]
            assert same(searcher.search(alone, chosen, case.k, row_scale=scale, allowed=allowed)[0], result)


def same(left: SearchResult, right: SearchResult) -> bool:
    def bits(end: RankingEnd) -> list[bytes]:
        return [end.rows.tobytes(), end.scores.tobytes(), end.parts.tobytes()]

    return bits(left.top) == bits(right.top) and bits(left.bottom) == bits(right.bottom)


def test_an_answer_does_not_depend_on_the_segments(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = sparse(rng.standard_normal((500, 60)).astype(np.float32), draw(rng, 500, 20, 60))
    queries = sparse(rng.standard_normal((4, 60)).astype(np.float32), draw(rng, 4, 30, 60))

    def results(cuts: Sequence[int]) -> list[SearchResult]:
        pieces = [slice(a, b) for a, b in zip([0, *cuts], [*cuts, 500], strict=True)]
        segments = [
            write_rows(tmp_path, f"{len(cuts)}.{p.start}", SparseVectors(rows.coordinates[p], rows.values[p]))
            for p in pieces
        ]
        return SparseSearcher([segments]).search([queries], [0], 10)

    whole = results([])
    for cuts in ([250], [1, 2, 3, 499], list(range(50, 500, 50))):
        assert all(same(a, b) for a, b in zip(whole, results(cuts), strict=True))


def test_rows_round_to_127_steps_of_their_largest_value(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    dense = (rng.standard_normal((40, 25)) * 10.0 ** rng.uniform(-9, 9, (40, 1))).astype(np.float32)
    rows = sparse(dense, draw(rng, 40, 10, 25))
    segment = write_rows(tmp_path, NAME, rows)
    stored = read_independently(tmp_path / NAME, segment.layout, 25)
    kept = np.zeros_like(dense)
    np.put_along_axis(kept, rows.coordinates.astype(np.int64), rows.values, axis=1)
    steps = np.abs(kept).max(axis=1, keepdims=True) / 127
    assert (np.abs(stored - kept) <= 0.51 * steps).all()
    assert ((stored != 0) == (np.abs(kept) > 0.5 * steps)).all()


@pytest.mark.parametrize("batch", [1, 13, 60])
def test_the_file_does_not_depend_on_batches(tmp_path: Path, batch: int) -> None:
    rng = np.random.default_rng(0)
    rows = sparse(rng.standard_normal((60, 25)).astype(np.float32), draw(rng, 60, 10, 25))
    write_rows(tmp_path, "whole", rows, batch=60)
    write_rows(tmp_path, "batches", rows, batch)
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "batches").read_bytes()


def test_a_segment_without_postings_scores_zero_and_the_first_rows_win(tmp_path: Path) -> None:
    rows = SparseVectors(np.zeros((5, 1), np.uint32), np.zeros((5, 1), np.float32))
    segment = write_rows(tmp_path, NAME, rows)
    assert (segment.layout.lists, segment.layout.pairs) == (0, 0)
    query = SparseVectors(np.zeros((1, 1), np.uint32), np.ones((1, 1), np.float32))
    (result,) = SparseSearcher([[segment]]).search([query], [0], 2)
    assert result.top.rows.tolist() == result.bottom.rows.tolist() == [0, 1]
    assert not result.top.scores.any()
    assert result.rows_touched == 0


def test_as_many_rows_as_16_bits_can_number(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    coordinates = rng.integers(0, 2**32, (MOST_ROWS, 1)).astype(np.uint32)
    coordinates[-2:] = 2**32 - 1
    rows = SparseVectors(coordinates, rng.standard_normal((MOST_ROWS, 1)).astype(np.float32))
    segment = write_rows(tmp_path, NAME, rows, batch=MOST_ROWS)
    query = SparseVectors(np.array([[2**32 - 1]], np.uint32), np.ones((1, 1), np.float32))
    searcher = SparseSearcher([[segment]])
    (result,) = searcher.search([query], [0], 2)
    expected = sorted([MOST_ROWS - 2, MOST_ROWS - 1], key=lambda row: -abs(rows.values[row, 0]))
    assert result.rows_touched == 2
    assert set(expected) <= {*result.top.rows.tolist(), *result.bottom.rows.tolist()}
    assert searcher.postings_read([query], [0]).tolist() == [2]
    collected = SegmentRows()
    more = SparseVectors(np.append(coordinates, [[0]], axis=0), np.append(rows.values, [[1]], axis=0))
    with pytest.raises(StoreError, match="65,536 rows at most, not 65,537"):
        collected.append(with_norms(more))


def test_values_that_cannot_be_stored_are_refused() -> None:
    for bad in (np.nan, np.inf, 1e31):
        values = np.array([[1], [bad]], np.float32)
        with pytest.raises(StoreError, match=r"row 1 .* NaN, infinite or above"):
            SegmentRows().append(SparseRows(SparseVectors(np.zeros((2, 1), np.uint32), values), np.ones(2, np.float32)))


def test_queries_and_segments_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    one, two = (SparseVectors(np.zeros((n, 1), np.uint32), np.ones((n, 1), np.float32)) for n in (1, 2))
    segments = [write_rows(tmp_path, "one", one), write_rows(tmp_path, "two", two)]
    with pytest.raises(StoreError, match="segments of the same rows"):
        SparseSearcher([segments[:1], segments[1:]])
    searcher = SparseSearcher([segments])
    with pytest.raises(QueryError, match="k must be at least 1"):
        searcher.search([one], [0], 0)
    with pytest.raises(QueryError, match="NaN or infinite"):
        searcher.search([SparseVectors(one.coordinates, one.values * np.inf)], [0], 1)


@pytest.fixture
def written(tmp_path: Path) -> Segment:
    rng = np.random.default_rng(0)
    rows = sparse(rng.standard_normal((60, 25)).astype(np.float32), draw(rng, 60, 10, 25))
    return write_rows(tmp_path, NAME, rows)


def test_a_missing_or_cut_file_is_refused(tmp_path: Path, written: Segment) -> None:
    path = tmp_path / NAME
    query = SparseVectors(np.array([[3]], np.uint32), np.ones((1, 1), np.float32))
    searcher = SparseSearcher([[written]])
    with path.open("r+b") as file:
        file.truncate(written.layout.bytes - 1)
    with pytest.raises(CorruptIndexError, match="truncated or replaced"):
        Segment(path, written.layout)
    with pytest.raises(CorruptIndexError, match="truncated or replaced"):
        searcher.search([query], [0], 1)
    path.unlink()
    with pytest.raises(CorruptIndexError, match="is missing"):
        Segment(path, written.layout)


def test_every_damaged_byte_is_found_and_none_is_followed_out_of_the_file(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = sparse(rng.standard_normal((9, 6)).astype(np.float32), draw(rng, 9, 3, 6))
    writer = SegmentWriter(tmp_path, NAME)
    writer.append(with_norms(rows))
    entry, sizes = writer.commit()
    layout = SegmentLayout(9, sizes.lists, sizes.pairs)
    query = SparseVectors(np.arange(6, dtype=np.uint32)[None], np.ones((1, 6), np.float32))
    path, content = tmp_path / NAME, (tmp_path / NAME).read_bytes()
    assert check_file(tmp_path, entry, deep=True) is None
    refused = 0
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 0xFF
        path.write_bytes(damaged)
        assert check_file(tmp_path, entry, deep=True) is not None
        try:  # without a checksum, an answer may be wrong; it is not of rows that are not there
            (result,) = SparseSearcher([[Segment(path, layout)]]).search([query], [0], 20)
            assert sorted(result.top.rows.tolist()) == list(range(9))
        except CorruptIndexError:
            refused += 1
    assert refused > layout.lists * 4


def test_a_writer_that_fails_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "postings").write_text("in the way")
    with pytest.raises(StoreError):
        SegmentWriter(tmp_path, NAME).commit()
    assert [path.name for path in tmp_path.rglob("*")] == ["postings"]


def test_rows_are_read_back_and_copied_as_they_are(tmp_path: Path, written: Segment) -> None:
    stored = read_independently(tmp_path / NAME, written.layout, 25)
    chosen = np.array([0, 3, 4, 59])
    coordinates, places, codes = written.postings_of(chosen)
    dense = np.zeros((4, 25))
    dense[places, coordinates] = codes * written.scales[chosen].astype(np.float64)[places]
    np.testing.assert_array_equal(dense, stored[chosen])
    writer = SegmentWriter(tmp_path, "copied")
    writer.append_stored(written, chosen)
    writer.append_stored(written, np.array([7]))
    _, sizes = writer.commit()
    copied = Segment(tmp_path / "copied", SegmentLayout(5, sizes.lists, sizes.pairs))
    np.testing.assert_array_equal(read_independently(tmp_path / "copied", copied.layout, 25), stored[[*chosen, 7]])
    np.testing.assert_array_equal(copied.norms, written.norms[[*chosen, 7]])


def test_squares_of_rows_are_summed_with_factors(tmp_path: Path, written: Segment) -> None:
    stored, factors = read_independently(tmp_path / NAME, written.layout, 25), np.arange(25.0)
    np.testing.assert_allclose(written.square_sums(factors), (stored**2) @ factors, rtol=1e-12)
    with pytest.raises(CorruptIndexError, match="a coordinate that the model does not have"):
        written.square_sums(factors[:-3])


def test_the_mean_of_vectors_and_their_products() -> None:
    rng = np.random.default_rng(0)
    dense = rng.standard_normal((4, 30)).astype(np.float32)
    vectors = sparse(dense, draw(rng, 4, 9, 30))
    whole = np.zeros((4, 30))
    np.put_along_axis(whole, vectors.coordinates.astype(np.int64), vectors.values, axis=1)
    mean = np.zeros(30)
    mean[vectors.mean().coordinates[0]] = vectors.mean().values[0]
    np.testing.assert_allclose(mean, whole.mean(0), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(vectors.entries().products(vectors[1:3].entries()), whole @ whole[1:3].T, rtol=1e-9)
