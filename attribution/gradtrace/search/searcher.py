"""What every searcher does, wherever the rows are and whether or not some may be missed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from gradtrace.search.scored_rows import Floats, SearchResult

Queries = TypeVar("Queries", contravariant=True)
Scale = TypeVar("Scale", Tensor, Floats, contravariant=True)


class RowSearcher(Protocol[Queries, Scale]):
    """Finds the rows of highest and of lowest scores

    score(row) = row_scale[row] * sum over checkpoints c of <query[c], row[c]>
    """

    def search(
        self,
        queries: Queries,
        checkpoints: Sequence[int],
        k: int,
        *,
        row_scale: Scale | None = None,
        allowed: NDArray[np.bool_] | None = None,
    ) -> list[SearchResult]:
        """The k highest- and the k lowest-scoring rows for each query; of equally scored ones the lower comes first.

        Args:
            queries: already multiplied by the checkpoints' weights.
            checkpoints: positions in the manifest.
            k: at least 1; fewer rows than that are all returned.
            row_scale: [rows] float32, a factor of each row's score; None: 1.
            allowed: bool [rows], which rows may be returned; None: all.

        Raises:
            QueryError: a query or a scale is not finite, or k < 1.
            CorruptIndexError: a file was cut off.
        """

    def scores(self, queries: Queries, checkpoints: Sequence[int], *, row_scale: Scale | None = None) -> Floats:
        """Every row's score for every query, float32 [q, rows]. Arguments and errors as in `search`."""


# Of rows with the same columns. Queries are [q, C, D] float32, C = len(checkpoints).
DenseSearcher = RowSearcher[Tensor, Tensor]
