"""Reading the sparse rows of an index, over all segments of a manifest."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gradtrace.errors import CorruptIndexError
from gradtrace.search.scored_rows import Rows
from gradtrace.sparse.inverted_rows import InvertedRows
from gradtrace.sparse.search import SparseSearcher
from gradtrace.sparse.segments import Segment, SegmentLayout
from gradtrace.sparse.vectors import Entries
from gradtrace.store.manifest import Manifest, SegmentSizes, ShardEntry
from gradtrace.store.regular_files import regular_path
from gradtrace.store.rows import RowStore


class SparseStore(InvertedRows):
    """The sparse rows of an index, memory-mapped. Segments are opened at their first use."""

    def __init__(self, directory: Path, manifest: Manifest, window: range | None = None) -> None:
        """Raises CorruptIndexError where the file of a segment cannot have the size that its postings take."""
        super().__init__(directory, manifest, window)
        self._open: dict[str, Segment] = {}
        for entry in manifest.shards:
            if entry.rows.bytes != segment_layout(entry).bytes:
                raise CorruptIndexError(
                    f"{directory} is damaged: {entry.rows.path} of {entry.rows.bytes} bytes cannot hold the postings "
                    f"of rows {entry.start} to {entry.stop}: rebuild the index"
                )

    def open_all(self) -> None:
        _ = self.searcher

    @cached_property
    def searcher(self) -> SparseSearcher:
        """Over the segments of all checkpoints."""
        return SparseSearcher([self.segments(checkpoint) for checkpoint in range(self.checkpoints)])

    def segments(self, checkpoint: int) -> list[Segment]:
        """In the order of the rows. Raises CorruptIndexError."""
        return [self._segment(checkpoint, number) for number in range(len(self._starts))]

    def _segment(self, checkpoint: int, number: int) -> Segment:
        entry = self._entries[checkpoint][number]
        name = entry.rows.path
        if name not in self._open:
            path = regular_path(self._directory, name)
            self._open[name] = Segment(path, segment_layout(entry), self._cuts[number])
        return self._open[name]

    def norms(self, checkpoint: int) -> NDArray[np.float32]:
        """Of the whole gradients. float32 [rows]"""
        by_segment = [segment.readable().norms for segment in self.segments(checkpoint)]
        return np.concatenate([*by_segment, np.zeros(0, np.float32)])

    def gather(self, checkpoint: int, rows: Rows) -> Entries:
        gathered = []
        for segment, first, numbers in self._by_segment(checkpoint, rows):
            coordinates, places, codes = segment.postings_of(numbers)
            values = codes * segment.scales[numbers].astype(np.float64)[places]
            gathered.append((places + first, coordinates, values))
        none = np.zeros(0, np.int64), np.zeros(0, np.uint32), np.zeros(0)
        return Entries(len(rows), *(np.concatenate(each) for each in zip(none, *gathered, strict=True)))

    def _by_segment(self, checkpoint: int, rows: Rows) -> Iterator[tuple[Segment, int, Rows]]:
        """The segments that have some of the rows, the place of the first of these, and their numbers in it."""
        edges = [*np.searchsorted(rows, self._starts).tolist(), len(rows)]
        for number, (low, high) in enumerate(pairwise(edges)):
            if low < high:
                yield self._segment(checkpoint, number), low, rows[low:high] - self._starts[number]

    def square_sums(self, checkpoint: int, factors: NDArray[np.float64]) -> NDArray[np.float64]:
        by_segment = [segment.square_sums(factors) for segment in self.segments(checkpoint)]
        return np.concatenate([*by_segment, np.zeros(0)])


def index_rows(directory: Path, manifest: Manifest) -> RowStore | SparseStore:
    """The rows of an index, of its kind. Raises CorruptIndexError."""
    return SparseStore(directory, manifest) if manifest.basis.is_sparse else RowStore(directory, manifest)


def segment_layout(entry: ShardEntry) -> SegmentLayout:
    """Of a shard of sparse rows."""
    sizes = entry.segment or SegmentSizes(lists=0, pairs=0)
    return SegmentLayout(entry.stop - entry.start, sizes.lists, sizes.pairs)
