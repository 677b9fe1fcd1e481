"""Which rows each shard has."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

_NEAR = 0.1  # of a shard's rows, that a cut may be moved by to the border of a stored stretch


def row_ranges(rows: int, stretches: Sequence[tuple[int, int]], shards: int) -> list[range]:
    """About as many rows for each shard, ascending; fewer shards where there are fewer rows, but at least one.

    A cut lies where a stored stretch ends, if one ends near: whole files are then one shard's.

    stretches: (start, stop) of the rows in each file, ascending

    >>> row_ranges(100, [(0, 100)], 3)
    [range(0, 33), range(33, 66), range(66, 100)]
    >>> row_ranges(100, [(0, 35), (35, 70), (70, 100)], 3)
    [range(0, 35), range(35, 66), range(66, 100)]
    """
    count = max(1, min(shards, rows))
    share, borders = rows / count, [stop for _, stop in stretches]
    cuts = [0, *(_near(int(share * number), borders, _NEAR * share) for number in range(1, count)), rows]
    return [range(start, stop) for start, stop in pairwise(cuts)]


def _near(cut: int, borders: Sequence[int], most: float) -> int:
    nearest = min(borders, key=lambda border: abs(border - cut), default=cut)
    return nearest if abs(nearest - cut) <= most else cut
