"""A segment: the inverted index of consecutive rows at one checkpoint, in one file.

A posting says that a row keeps a coordinate, and with which value. The postings of a coordinate are a list, in the
order of the rows; a list of an odd length ends with an empty posting (row 0, code 0), so that two postings can be read
as one integer. Layout, little endian, without header (the manifest has the sizes). Every block begins at a multiple of
64 bytes, and gaps are zero:

    coordinates    [lists]       uint32, ascending: those that a row of the segment keeps
    ends           [lists + 1]   uint32: list l has the pairs of postings [ends[l], ends[l + 1])
    row numbers    [pairs, 2]    uint16: of each posting, counted from the segment's first row
    codes          [pairs, 2]    int8, value = code * scale of the row
    scales         [rows]        float32
    norms          [rows]        float32, of the rows' whole gradients, not whitened
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gradtrace.errors import CorruptIndexError, StoreError
from gradtrace.sparse.vectors import SparseRows
from gradtrace.store.mapped_files import check_mapped_size, map_file
from gradtrace.store.precision import encode
from gradtrace.store.shards import ALIGNMENT

MOST_ROWS = 1 << 16  # that 16 bits can number
_POSTINGS_IN_MEMORY = 1 << 25  # that a writer sorts at a time
MEMORY_OF_POSTING = 25  # bytes, when a segment is written
_PAIRS_READ_TOGETHER = 1 << 20  # where the postings of some rows are looked for
# A posting as an integer whose order is that of the file: coordinate, row number in 16 bits, code in 8.
_COORDINATE_SHIFT, _ROW_SHIFT = np.uint64(24), np.uint64(8)

Integers = NDArray[np.int64]


def default_segment_rows(coordinates: int) -> int:
    """Rows of a segment whose rows keep this number of coordinates each.

    >>> default_segment_rows(512)
    65536
    """
    return max(1, min(MOST_ROWS, _POSTINGS_IN_MEMORY // coordinates))


@dataclass(frozen=True)
class SegmentLayout:
    """Sizes and offsets of the blocks in a segment.

    lists: number of different coordinates.  pairs: number of pairs of postings
    """

    rows: int
    lists: int
    pairs: int

    @cached_property
    def offsets(self) -> list[int]:
        """Where the blocks begin, and where the file ends."""
        sizes = [4 * self.lists, 4 * (self.lists + 1), 4 * self.pairs, 2 * self.pairs, 4 * self.rows, 4 * self.rows]
        return list(accumulate((-(-size // ALIGNMENT) * ALIGNMENT for size in sizes), initial=0))

    @property
    def bytes(self) -> int:
        return self.offsets[-1]


class SegmentRows:
    """Collects the rows of a segment, and inverts them. Takes 8 bytes of memory for each posting, at the end
    MEMORY_OF_POSTING."""

    def __init__(self) -> None:
        self._keys: list[NDArray[np.uint64]] = []
        self._scales: list[NDArray[np.float32]] = []
        self._norms: list[NDArray[np.float32]] = []
        self._rows = 0

    def append(self, rows: SparseRows) -> None:
        """Add the next rows. Values become whole multiples of 1 / 127 of the row's largest; those that become zero are
        left out.

        Raises:
            StoreError: more rows than a segment can have, or a value that is NaN, infinite or too large to be stored.
        """
        vectors = rows.vectors
        codes, scales = (tensor.numpy() for tensor in encode(torch.from_numpy(vectors.values), "int8"))
        numbers, places = np.nonzero(codes)
        self._append(vectors.coordinates[numbers, places], numbers, codes[numbers, places], scales, rows.norms)

    def append_stored(self, segment: Segment, numbers: Integers) -> None:
        """Copy rows, ascending [m], of another segment as they are."""
        coordinates, places, codes = segment.postings_of(numbers)
        self._append(coordinates, places, codes, segment.scales[numbers], segment.norms[numbers])

    def _append(
        self,
        coordinates: NDArray[np.uint32],
        numbers: Integers,
        codes: NDArray[np.int8],
        scales: NDArray[np.float32],
        norms: NDArray[np.float32],
    ) -> None:
        """coordinates, numbers (of the row, among those that are added), codes: of each posting [p];  the others [b]"""
        if self._rows + len(scales) > MOST_ROWS:
            raise StoreError(f"a segment has {MOST_ROWS:,} rows at most, not {self._rows + len(scales):,}")
        keys = coordinates.astype(np.uint64) << _COORDINATE_SHIFT
        keys |= (numbers + self._rows).astype(np.uint64) << _ROW_SHIFT
        self._keys.append(keys | codes.view(np.uint8))
        self._scales.append(scales)
        self._norms.append(norms)
        self._rows += len(scales)

    def inverted(self) -> tuple[SegmentLayout, list[NDArray[Any]]]:
        """The blocks of the segment, in the order of its file. To be called once, after the last row."""
        keys = np.concatenate([*self._keys, np.zeros(0, np.uint64)])
        self._keys.clear()
        keys.sort()
        coordinates = keys >> _COORDINATE_SHIFT
        starts = np.flatnonzero(np.append(True, coordinates[1:] != coordinates[:-1])[: len(keys)])  # [lists]
        coordinates = coordinates[starts].astype(np.uint32)
        lengths = np.diff(starts, append=len(keys))
        odd_stops = (starts + lengths)[lengths % 2 == 1]
        keys = np.insert(keys, odd_stops, keys[odd_stops - 1] >> _COORDINATE_SHIFT << _COORDINATE_SHIFT)
        ends = np.append(0, np.cumsum((lengths + 1) // 2)).astype(np.uint32)  # [lists + 1]
        row_numbers, codes = (keys >> _ROW_SHIFT).astype(np.uint16), keys.astype(np.uint8).view(np.int8)
        scales, norms = (np.concatenate([*each, np.zeros(0, np.float32)]) for each in (self._scales, self._norms))
        layout = SegmentLayout(self._rows, len(starts), len(keys) // 2)
        return layout, [coordinates, ends, row_numbers, codes, scales, norms]


class Segment:
    """An open segment, or some consecutive rows of it: arrays that are views of the memory-mapped file. Never write to
    them.

    rows: number of these rows
    scales, norms: float32 [rows]
    """

    def __init__(self, path: Path, layout: SegmentLayout, cut: slice = slice(None)) -> None:
        """cut: the rows that are meant, counted from the segment's first; all of them by default. The lists of the
        others are read, too.

        Raises CorruptIndexError where the file is missing, has another size, or its lists cannot be."""
        self._path, self._map = path, map_file(path, layout.bytes)
        self.layout = layout
        coordinates, ends, row_numbers, codes, scales, norms, _ = layout.offsets
        self._coordinates = self._view(np.uint32, coordinates, layout.lists)
        self._ends = self._view(np.uint32, ends, layout.lists + 1)
        self._row_number_pairs = self._view(np.uint32, row_numbers, layout.pairs)
        self._code_pairs = self._view(np.uint16, codes, layout.pairs)
        self.scales: NDArray[np.float32] = self._view(np.float32, scales, layout.rows)[cut]
        self.norms: NDArray[np.float32] = self._view(np.float32, norms, layout.rows)[cut]
        self.rows, self._first = len(self.scales), cut.start or 0
        self._check_lists()
        if layout.pairs:  # lists are read here and there: read-ahead would read most of the file
            start = row_numbers // mmap.PAGESIZE * mmap.PAGESIZE
            self._map.madvise(mmap.MADV_RANDOM, start, scales - start)

    def _view(self, dtype: Any, offset: int, count: int) -> NDArray[Any]:
        return np.frombuffer(self._map, dtype, count, offset)

    def _check_lists(self) -> None:
        coordinates, ends = self._coordinates, self._ends
        ascending = bool((coordinates[1:] > coordinates[:-1]).all() and (ends[1:] > ends[:-1]).all())
        if not ascending or ends[0] != 0 or ends[-1] != self.layout.pairs:
            raise self._damaged("its lists are not in order")

    def _damaged(self, reason: str) -> CorruptIndexError:
        return CorruptIndexError(f"{self._path} is damaged: {reason}; restore it or rebuild the index")

    def check_size(self) -> None:
        """To be called before the file is read, as `Shard.check_size`. Raises CorruptIndexError."""
        check_mapped_size(self._path, self._map, self.layout.bytes)

    def readable(self) -> Segment:
        """The segment, about to be read. Raises CorruptIndexError as `check_size`."""
        self.check_size()
        return self

    def lists_of(self, coordinates: NDArray[np.uint32]) -> tuple[Integers, Integers]:
        """Which of these coordinates have a list, int64 [l], and the numbers of their lists, int64 [l]."""
        if not self.layout.lists:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        lists = np.searchsorted(self._coordinates, coordinates)
        lists[lists == self.layout.lists] = 0
        present = np.flatnonzero(self._coordinates[lists] == coordinates)
        return present, lists[present]

    def count(self, coordinates: NDArray[np.uint32]) -> int:
        """The number of postings of these coordinates; empty ones count."""
        _, lists = self.lists_of(coordinates)
        return 2 * int((self._ends[lists + 1] - self._ends[lists]).sum(dtype=np.int64))

    def postings(self, lists: Integers) -> tuple[NDArray[np.uint16], NDArray[np.int8], Integers]:
        """The postings of some lists, one list after another: row numbers [p], codes [p], and where each list begins
        and the last one ends, int64 [lists + 1]. Empty postings, of code 0, are among them."""
        firsts = self._ends[lists].astype(np.int64)
        starts = np.append(0, np.cumsum(self._ends[lists + 1] - firsts))
        pairs = np.arange(starts[-1])
        pairs += np.repeat(firsts - starts[:-1], np.diff(starts))
        # the pairs are there, see _check_lists: "clip" only spares a copy
        row_numbers = self._row_number_pairs.take(pairs, mode="clip").view(np.uint16)
        return row_numbers, self._code_pairs.take(pairs, mode="clip").view(np.int8), 2 * starts

    def postings_of(self, numbers: Integers) -> tuple[NDArray[np.uint32], Integers, NDArray[np.int8]]:
        """All postings of some rows, ascending [m], in the order of the file: coordinates [p], places of the rows in
        `numbers` [p], and codes [p]. Reads the row numbers of the whole segment."""
        self.check_size()
        place_of_row = np.full(MOST_ROWS, -1)
        place_of_row[numbers + self._first] = np.arange(len(numbers))
        row_numbers, chunk = self._row_number_pairs.view(np.uint16), 2 * _PAIRS_READ_TOGETHER
        wanted = [
            start + np.flatnonzero(place_of_row[row_numbers[start : start + chunk]] >= 0)
            for start in range(0, len(row_numbers), chunk)
        ]
        postings = np.concatenate([*wanted, np.zeros(0, np.int64)])
        codes = self._code_pairs.view(np.int8)[postings]
        postings, codes = postings[codes != 0], codes[codes != 0]
        lists = np.searchsorted(self._ends, postings // 2, side="right") - 1
        return self._coordinates[lists], place_of_row[row_numbers[postings]], codes

    def square_sums(self, factors: NDArray[np.float64]) -> NDArray[np.float64]:
        """Of each row the sum of its squared values, times the factors [coordinates] of these. float64 [rows]"""
        self.check_size()
        sums, row_numbers = np.zeros(MOST_ROWS), self._row_number_pairs.view(np.uint16)
        codes, ends = self._code_pairs.view(np.int8), self._ends.astype(np.int64)
        lengths = 2 * (ends[1:] - ends[:-1])
        if self.layout.lists and self._coordinates[-1] >= len(factors):
            raise self._damaged("a list is of a coordinate that the model does not have")
        of_lists, first = factors[self._coordinates], 0
        for lists in np.array_split(np.arange(len(lengths)), max(1, self.layout.pairs // _PAIRS_READ_TOGETHER)):
            of_postings = np.repeat(of_lists[lists], lengths[lists])
            postings = slice(first, first + len(of_postings))
            squares = codes[postings].astype(np.float64) ** 2
            sums += np.bincount(row_numbers[postings], squares * of_postings, MOST_ROWS)
            first = postings.stop
        return self.of_rows(sums) * self.scales.astype(np.float64) ** 2

    def of_rows(self, products: NDArray[np.float64]) -> NDArray[np.float64]:
        """Those of the rows, of the products of all row numbers. [MOST_ROWS] -> [rows]

        Raises CorruptIndexError where rows that the segment does not have got a product.
        """
        if products[self.layout.rows :].any():
            raise self._damaged("a posting is of a row that the segment does not have")
        return products[self._first : self._first + self.rows]
