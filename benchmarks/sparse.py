"""Search of sparse rows: `python -m benchmarks.sparse`, minutes and 2 GB of disk for a million rows.

The rows are made like those of a small GPT-2 (614,016 weights, of which 2 x 2,000 x 96 in embedding and head): a text
has some words, and a row's strongest coordinates are those of its words. Words are drawn so that a query reads 1.2 % to
1.3 % of the postings, as it does there.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gradtrace.sparse.search import SparseSearcher
from gradtrace.sparse.segments import Segment, SegmentLayout, default_segment_rows
from gradtrace.sparse.vectors import SparseRows, SparseVectors
from gradtrace_indexer.writing.segment_file import SegmentWriter

_WORDS, _WORDS_OF_TEXT, _WIDTH = 2_000, 32, 96  # each word has a row of the embedding and one of the head
_ROWS_AT_A_TIME = 4_000  # that are made
_QUERY_COORDINATES, _BATCH = 4_096, 16


@dataclass(frozen=True)
class Written:
    """A made index. seconds: to write it, without making the rows"""

    segments: list[Segment]
    seconds: float

    @property
    def bytes(self) -> int:
        return sum(segment.layout.bytes for segment in self.segments)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_500, 1_000_000])
    parser.add_argument("--coordinates", type=int, default=512, help="that a row keeps, a multiple of 64")
    parser.add_argument("--queries", type=int, default=64)
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("runs/sparse"))
    arguments = parser.parse_args()
    print(
        f"| rows of {arguments.coordinates} coordinates, queries of {_QUERY_COORDINATES}, k = {arguments.k} "
        f"| bytes a row | written, rows/s | postings read | of all | one query: median, ms | 95 %, ms "
        f"| batch of {_BATCH}, ms a query | rows of another score than zero |\n|--:|--:|--:|--:|--:|--:|--:|--:|--:|"
    )
    queries = made_queries(arguments.queries)
    for rows in arguments.rows:
        written = write(arguments.out / str(rows), rows, arguments.coordinates)
        measure(written, queries, rows, arguments.coordinates, arguments.k)


def write(out: Path, rows: int, kept: int) -> Written:
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    segments, seconds, step = [], 0.0, default_segment_rows(kept)
    for start in range(0, rows, step):
        writer = SegmentWriter(out, f"{start:09d}.rows")
        for first in range(start, min(start + step, rows), _ROWS_AT_A_TIME):
            vectors = made_rows(first, min(_ROWS_AT_A_TIME, start + step - first, rows - first), kept)
            started = time.perf_counter()
            writer.append(SparseRows(vectors, np.ones(len(vectors), np.float32)))
            seconds += time.perf_counter() - started
        started = time.perf_counter()
        entry, sizes = writer.commit()
        seconds += time.perf_counter() - started
        layout = SegmentLayout(min(step, rows - start), sizes.lists, sizes.pairs)
        segments.append(Segment(out / entry.path, layout))
    return Written(segments, seconds)


def measure(written: Written, queries: SparseVectors, rows: int, kept: int, k: int) -> None:
    searcher = SparseSearcher([written.segments])
    searcher.search([queries], [0], k)  # reads the lists from the disk
    singles = [SparseVectors(queries.coordinates[[n]], queries.values[[n]]) for n in range(len(queries))]
    alone = [timed(searcher, query, k) for query in singles]
    batches = [slice(start, start + _BATCH) for start in range(0, len(queries) - _BATCH + 1, _BATCH)]
    together = [
        timed(searcher, SparseVectors(queries.coordinates[part], queries.values[part]), k) / _BATCH for part in batches
    ]
    read = searcher.postings_read([queries], [0]).mean()
    touched = np.mean([result.rows_touched for result in searcher.search([queries], [0], k)])
    print(
        f"| {rows:,} | {written.bytes / rows:,.0f} | {rows / written.seconds:,.0f} | {read:,.0f} "
        f"| {100 * read / (rows * kept):.2f} % | {np.median(alone):.1f} | {np.quantile(alone, 0.95):.1f} "
        f"| {np.median(together):.1f} | {100 * touched / rows:.0f} % |",
        flush=True,
    )


def timed(searcher: SparseSearcher, queries: SparseVectors, k: int) -> float:
    """Milliseconds."""
    started = time.perf_counter()
    searcher.search([queries], [0], k)
    return 1e3 * (time.perf_counter() - started)


def made_rows(first: int, count: int, kept: int) -> SparseVectors:
    """Each keeps as many coordinates of each of its words, spread evenly over the word's row."""
    rng = np.random.default_rng([0, first])
    of_word = kept // (2 * _WORDS_OF_TEXT)
    step = _WIDTH // of_word
    words = texts(rng, count)  # [count, 2 * words of a text]
    places = np.arange(of_word) * step + rng.integers(0, step, (*words.shape, of_word))
    coordinates = (words[:, :, None] * _WIDTH + places).reshape(count, -1)
    return SparseVectors(coordinates.astype(np.uint32), strengths(rng, coordinates.shape))


def made_queries(count: int) -> SparseVectors:
    rng = np.random.default_rng(1)
    words, of_word = texts(rng, count), _QUERY_COORDINATES // (2 * _WORDS_OF_TEXT)
    places = np.sort(rng.random((*words.shape, _WIDTH)).argsort(axis=2)[:, :, :of_word], axis=2)
    coordinates = (words[:, :, None] * _WIDTH + places).reshape(count, -1)
    return SparseVectors(coordinates.astype(np.uint32), strengths(rng, coordinates.shape))


def texts(rng: np.random.Generator, count: int) -> NDArray[np.int64]:
    """The table rows of each text's words, in the embedding and in the head, ascending. [count, 2 * words of a text]

    Word number n of a text is one of the words n, n + 32, n + 64 ..., the later the rarer.
    """
    later = (rng.random((count, _WORDS_OF_TEXT)) ** 1.35 * (_WORDS // _WORDS_OF_TEXT)).astype(np.int64)
    words = np.sort(np.arange(_WORDS_OF_TEXT) + _WORDS_OF_TEXT * later, axis=1)
    return np.concatenate([words, words + _WORDS], axis=1)


def strengths(rng: np.random.Generator, shape: Sequence[int]) -> NDArray[np.float32]:
    """Of either sign, the smallest about a fifth of the largest."""
    return (rng.choice([-1.0, 1.0], shape) * rng.uniform(0.2, 1.0, shape)).astype(np.float32)


if __name__ == "__main__":
    main()
