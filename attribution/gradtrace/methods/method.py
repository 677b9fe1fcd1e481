"""What every method of attribution is: a way to turn a query into vectors whose inner products with rows are scores.

Positive scores are proponents: training on that row lowers what is explained.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from gradtrace.basis import Basis
from gradtrace.contents import IndexContents
from gradtrace.errors import QueryError
from gradtrace.methods.options import MethodOptions
from gradtrace.models.queries import Query
from gradtrace.search.by_name import Searcher
from gradtrace.search.scored_rows import SearchResult, exhaustive_scores
from gradtrace.store.manifest import CheckpointEntry, CheckpointKind, Manifest
from gradtrace.store.rows import RowStore
from gradtrace.task import Example

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]


class Scoring(ABC):
    """One request's method with its checkpoints and options, over an open index.

    score(row) = row_scale[row] * sum over column blocks c of <query vector[c], row[c]>, unless `search` and `scores`
    are a method's own

    Attributes:
        store, searcher: the rows that are scored.
        blocks: their column blocks that count; positions in the manifest's checkpoints. A score's parts are theirs.
        bases: in whose coordinates the rows are, one for each block; None where they are no gradients.
        full_gradient_weights: float64 [blocks]; scores are sums by these weights of inner products of the gradients
            of query and row, each at its block's checkpoint, so that full gradients can rescore them. None: they
            are something else.
        normalized: scores are divided by the norms of query and row, each over all blocks together.
    """

    store: RowStore
    searcher: Searcher
    blocks: list[int]
    bases: Sequence[Basis] | None = None
    full_gradient_weights: Doubles | None = None
    normalized: bool = False

    @abstractmethod
    def query_vectors(self, queries: Sequence[Query]) -> tuple[Tensor, list[float]]:
        """Vectors [queries, blocks, dimensions of the store], and the queries' losses at the last checkpoint. The mean
        of several queries' vectors must give the means of their scores.

        Raises:
            LossError: a loss or a gradient is NaN or infinite.
        """

    @abstractmethod
    def row_vectors(self, examples: Sequence[Example]) -> Tensor:
        """What training examples have as rows, before rounding and times their scale: [n, blocks, dimensions]. Their
        scores are the inner products with query vectors, summed over the blocks.

        Raises:
            QueryError: the method has rows of real training examples alone.
            LossError: a loss or a gradient is NaN or infinite.
        """

    def search(self, vectors: Tensor, k: int, allowed: NDArray[np.bool_] | None) -> list[SearchResult]:
        """Both ends for each query vector. allowed: bool [stored rows] that may be found; None: all."""
        return self.searcher.search(vectors, self.blocks, k, row_scale=self.row_scale(), allowed=allowed)

    def scores(self, vectors: Tensor) -> Floats:
        """Of every row for each query vector. [queries, stored rows]"""
        return exhaustive_scores(self.store, vectors, self.blocks, self.row_scale())

    def row_scale(self) -> Tensor | None:
        """Float32 [stored rows], finite; None: one."""
        return None

    @abstractmethod
    def self_influence(self) -> Floats:
        """The score of each row on itself. [stored rows]

        Raises:
            QueryError: the method has none.
        """


class Method(ABC):
    """A method of attribution.

    name: in requests
    options: fields of Options that it takes
    sign: what a positive and a negative score say, as sentences, if `meaning` does not
    signed: whether positive scores are proponents and negative ones opponents; else the ends are what they are
    compares_gradients: whether scores are made of gradients, in the coordinates of the index
    uses_curvature: whether scores depend on the Fisher information in the index
    forecasts: whether scores estimate what training without the row would do
    """

    name: ClassVar[str]
    options: ClassVar[tuple[str, ...]]
    sign: ClassVar[str] = (
        "Positive: a proponent, training on the row lowered what is explained. Negative: an opponent, it raised it. "
    )
    signed: ClassVar[bool] = True
    compares_gradients: ClassVar[bool] = True
    forecasts: ClassVar[bool] = False
    uses_curvature: ClassVar[bool] = False

    @abstractmethod
    def lacks(self, manifest: Manifest) -> str | None:
        """What an index would need to answer by this method, and how it gets it; None where it can."""

    @abstractmethod
    def meaning(self, options: MethodOptions) -> str:
        """What a score is, with its unit, as a sentence without a full stop."""

    @abstractmethod
    def scoring(self, contents: IndexContents, options: MethodOptions) -> Scoring:
        """Bind the method to an index that lacks nothing. `options` were checked for their names.

        Raises:
            QueryError: an option's value does not fit the index.
        """


def lacks_curvature(manifest: Manifest) -> str | None:
    """As `Method.lacks`, of the methods that need the curvature at every checkpoint."""
    if len(manifest.curvature) < len(manifest.checkpoints):
        return "it has no curvature; build it with basis='spectral' (`gradtrace build --basis spectral`)"
    return None


def chosen_checkpoints(
    entries: Sequence[CheckpointEntry],
    names: Sequence[str] | None,
    default: list[int],
    kind: CheckpointKind = "weights",
) -> list[int]:
    """Positions of the checkpoints that a request names, all of a kind, in training order.

    Raises:
        QueryError: an unknown or repeated name, or none at all.
    """
    if names is None:
        return default
    known = {entry.name: position for position, entry in enumerate(entries) if entry.kind == kind}
    unknown = [name for name in names if name not in known]
    if unknown or not names or len(set(names)) < len(names):
        problem = f"unknown checkpoint {unknown[0]!r}" if unknown else "checkpoints must be named, each once"
        raise QueryError(f"{problem}; choose from {', '.join(known)}")
    return sorted(known[name] for name in names)
