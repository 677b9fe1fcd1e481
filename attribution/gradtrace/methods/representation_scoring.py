"""Scores from the stored last hidden representations: every row is read, and scored in float64."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradtrace.contents import IndexContents
from gradtrace.errors import QueryError
from gradtrace.methods.method import DenseScoring
from gradtrace.models.queries import QUERY_BATCH, Query, named_in_errors
from gradtrace.search.scored_rows import Floats, SearchResult, ends_of_scored
from gradtrace.store.dense_rows import RowPass
from gradtrace.task import Example

_BLOCK_VALUES = 1 << 18  # float64 values of stored rows that are held at a time: they stay in the processor's cache
_QUERIES_PER_PASS = 16  # that share a pass over the rows


@dataclass(frozen=True, eq=False)
class RepresentationProducts(RowPass):
    """The products of representations with query vectors.

    vectors: float64 [q, blocks, size]
    """

    vectors: Tensor

    def __call__(self, start: int, rows: Tensor) -> Tensor:
        """The models' parts of each row's score. float32 [b, q, blocks]"""
        parts, doubles = torch.empty(len(rows), *self.vectors.shape[:2]), rows.double()
        for position in range(self.vectors.shape[1]):
            products = self.products(list(self.vectors[:, position]), doubles[:, position], position, start)
            parts[:, :, position] = torch.stack(products, dim=1)
        return parts

    @abstractmethod
    def products(self, vectors: Sequence[Tensor], rows: Tensor, position: int, start: int) -> list[Tensor]:
        """Each query vector's inner products [b] with the vectors of the rows [b, features] that begin at `start`.

        position: of the model among the blocks
        """


class RepresentationScoring(DenseScoring):
    """Scores are means over the trained models of inner products of vectors made of representations.

    Each query is multiplied with the rows by itself, so that scores do not depend on the batch; they are rounded to
    float32, so that equal rows score equally.

    Raises:
        QueryError: the task's representations are no longer those of the index.
    """

    def __init__(self, contents: IndexContents) -> None:
        assert contents.representations is not None  # else Method.lacks
        self.store, self.blocks = contents.representations, contents.manifest.represented
        self._contents = contents
        self._models = [contents.models[block] for block in self.blocks]
        entry, current = contents.manifest.representations, contents.last_model.representation
        if entry and (current is None or (current.source, current.dimensions) != (entry.source, entry.dimensions)):
            now = "none" if current is None else f"{current.dimensions} features of {current.source}"
            raise QueryError(
                f"the index holds {entry.dimensions} features of {entry.source} for each row, the task now gives "
                f"{now}: put Task.representation back, or build the index again"
            )

    @abstractmethod
    def _query_side(self, representations: Tensor, queries: Sequence[Query]) -> Tensor:
        """Query vectors, from [queries, blocks, features] float64."""

    @abstractmethod
    def _products(self, vectors: Tensor) -> RepresentationProducts:
        """Of all rows with these query vectors."""

    def query_vectors(self, queries: Sequence[Query]) -> tuple[Tensor, list[float]]:
        representations, losses = self._represented([query.example for query in queries])
        return self._query_side(representations, queries) / len(self.blocks), losses

    def search(self, vectors: Tensor, k: int, allowed: NDArray[np.bool_] | None) -> list[SearchResult]:
        return [
            ends_of_scored(parts.numpy().astype(np.float64), k, allowed)
            for batch in vectors.split(_QUERIES_PER_PASS)
            for parts in self._parts(batch)
        ]

    def scores(self, vectors: Tensor) -> Floats:
        scores: Floats = torch.cat([self._parts(batch).sum(2) for batch in vectors.split(_QUERIES_PER_PASS)]).numpy()
        return scores

    def _parts(self, vectors: Tensor) -> Tensor:
        """The models' parts of each row's score. float32 [queries, stored rows, blocks]."""
        return self._each_row(self._products(vectors)).transpose(0, 1).contiguous()

    @property
    def store_blocks(self) -> range:
        return range(len(self.blocks))

    def _each_row(self, row_pass: RowPass) -> Tensor:
        """Over the representations [b, blocks, features] of all stored rows. [stored rows, ...]"""
        size = max(1, _BLOCK_VALUES // (self.store.dimensions * len(self.blocks)))
        return self.store.each_row(self.store_blocks, size, row_pass)

    def _represented(self, examples: Sequence[Example], what: str = "query") -> tuple[Tensor, list[float]]:
        """Representations float64 [examples, blocks, features], and losses at the last checkpoint.

        what: the examples' name in errors
        """
        features, losses = [], []
        for start in range(0, len(examples), QUERY_BATCH):
            batch = examples[start : start + QUERY_BATCH]
            with named_in_errors(range(start, start + len(batch)), what):
                represented = [model.represent(model.batch(batch)) for model in self._models]
            features.append(torch.stack([values.cpu().double() for values, _ in represented], dim=1))
            losses += represented[-1][1].tolist()
        return torch.cat(features), losses
