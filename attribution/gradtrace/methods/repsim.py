"""RepSim: similarity of last hidden representations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradtrace.contents import IndexContents
from gradtrace.methods.method import Method, MethodOptions
from gradtrace.methods.norms import inverse
from gradtrace.methods.representation_scoring import RepresentationProducts, RepresentationScoring
from gradtrace.models.queries import Query
from gradtrace.search.scored_rows import Floats
from gradtrace.store.dense_rows import RowPass
from gradtrace.task import Example

_MEANINGS = {
    "cosine": "cosine between the last hidden representations of row and query, from -1 to 1",
    "dot": "inner product of the last hidden representations of row and query",
    "l2": "minus the squared distance between the last hidden representations of row and query",
}


class RepSim(Method):
    """Similarity of the trained model's representations f of row i and query: cos(f_i, f_q), <f_i, f_q> or
    -|f_i - f_q|^2.

    Hanawa et al. 2021, Section 3.1, with the last hidden layer as representation. The distance is squared, so that the
    mean of several queries' scores is the score of one vector.
    """

    name = "repsim"
    options = ("similarity",)
    sign = ""
    signed = False
    uses_labels = False
    compares = "representations"
    splits_by_token = False

    def meaning_with(self, options: MethodOptions) -> str:
        return (
            f"Score: {_MEANINGS[options.get('similarity') or 'cosine']}, at the trained model, of several runs the "
            "mean. High is alike; the lowest are the least alike, which says nothing of harm: they are no opponents in "
            "the sense of a cause"
        )

    def scoring(self, contents: IndexContents, options: MethodOptions) -> RepresentationScoring:
        return _RepSimScoring(contents, _SIMILARITIES[options.get("similarity") or "cosine"])


class _RepSimScoring(RepresentationScoring):
    def __init__(self, contents: IndexContents, similarity: _Dot) -> None:
        super().__init__(contents)
        self._similarity = similarity

    def _query_side(self, representations: Tensor, queries: Sequence[Query] = ()) -> Tensor:
        return self._similarity.query_side(representations)

    def _products(self, vectors: Tensor) -> RepresentationProducts:
        return _Similarities(vectors, self._similarity)

    def row_vectors(self, examples: Sequence[Example]) -> Tensor:
        return self._similarity.row_side(self._represented(examples, "training example")[0])

    def self_influence(self) -> Floats:
        scores: Floats = self._each_row(_SelfSimilarity(self._similarity)).float().numpy()
        return scores


class _Dot:
    """A score is the inner product of `query_side` and `row_side` of the two representations."""

    def query_side(self, representations: Tensor) -> Tensor:
        """[..., features] float64 -> [..., size of a query vector]."""
        return representations

    def row_side(self, representations: Tensor) -> Tensor:
        return representations

    def products(self, vectors: Sequence[Tensor], rows: Tensor) -> list[Tensor]:
        """Of each query vector with `row_side` of the rows [b, features]. [b]"""
        return [rows @ vector for vector in vectors]


class _Cosine(_Dot):
    def query_side(self, representations: Tensor) -> Tensor:
        return representations * inverse(representations.norm(dim=-1))[..., None]

    row_side = query_side

    def products(self, vectors: Sequence[Tensor], rows: Tensor) -> list[Tensor]:
        scale = inverse(torch.linalg.vector_norm(rows, dim=1))  # of the products: there are fewer than values
        return [(rows @ vector).mul_(scale) for vector in vectors]


class _Distance(_Dot):
    """-|q - r|^2 = <(q, |q|^2, 1), (2 r, -1, -|r|^2)>"""

    def query_side(self, representations: Tensor) -> Tensor:
        square = representations.square().sum(-1, keepdim=True)
        return torch.cat([representations, square, torch.ones_like(square)], dim=-1)

    def row_side(self, representations: Tensor) -> Tensor:
        square = representations.square().sum(-1, keepdim=True)
        return torch.cat([2 * representations, -torch.ones_like(square), -square], dim=-1)

    def products(self, vectors: Sequence[Tensor], rows: Tensor) -> list[Tensor]:
        squares = torch.linalg.vector_norm(rows, dim=1).square_()
        return [(rows @ v[:-2]).mul_(2).sub_(v[-2]).sub_(squares * v[-1]) for v in vectors]


_SIMILARITIES = {"cosine": _Cosine(), "dot": _Dot(), "l2": _Distance()}


@dataclass(frozen=True, eq=False)
class _Similarities(RepresentationProducts):
    similarity: _Dot

    def products(self, vectors: Sequence[Tensor], rows: Tensor, position: int, start: int) -> list[Tensor]:
        return self.similarity.products(vectors, rows)


@dataclass(frozen=True, eq=False)
class _SelfSimilarity(RowPass):
    """The score of each row on itself, the mean over the models."""

    similarity: _Dot

    def __call__(self, start: int, rows: Tensor) -> Tensor:
        """float64 [b]"""
        doubles = rows.double()
        return (self.similarity.query_side(doubles) * self.similarity.row_side(doubles)).sum(2).mean(1)
