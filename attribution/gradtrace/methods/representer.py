"""Representer points: each row's term in the output of the refitted last layer for a class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from gradtrace.contents import IndexContents
from gradtrace.errors import QueryError
from gradtrace.fitted.representer_head import loss_slopes, with_constant
from gradtrace.methods.method import Method, MethodOptions
from gradtrace.methods.representation_scoring import RepresentationProducts, RepresentationScoring
from gradtrace.models.queries import Query
from gradtrace.search.scored_rows import Floats
from gradtrace.store.dense_rows import RowPass
from gradtrace.store.manifest import Manifest
from gradtrace.task import Example, Label


class Representer(Method):
    """Yeh et al. 2018, Theorem 3.1: alpha_ij <f_i, f_q>, the row's term in the refitted layer's output j for the query.

    j is the query's label, or the predicted label if it has none, or the label of the target (of a contrast, the
    difference of two outputs); a layer that predicts values has one output.
    `fitted.representer_head` fits the layer to the rows' labels (Section 3.1 of the paper).
    """

    name = "representer"
    options = ()
    sign = ""
    compares = "representations"
    splits_by_token = False
    meaning = (
        "Score: the row's term in the last layer's output for the query's class (its label, the predicted one or the "
        "target's; for values the predicted value), with that layer refitted under L2 regularisation. The terms of all "
        "rows sum to that output: positive raised it, negative lowered it. Of several runs, the mean over their models"
    )

    def lacks(self, manifest: Manifest) -> str | None:
        if lacking := super().lacks(manifest):
            return lacking
        if manifest.representer is None:
            return "no last layer was refitted on its representations: run `gradtrace representer` on it"
        if manifest.representer_is_stale():
            return "its last layer was refitted on other rows or checkpoints: run `gradtrace representer` on it again"
        return None

    def scoring(self, contents: IndexContents, options: MethodOptions) -> RepresentationScoring:
        return _RepresenterScoring(contents)


@dataclass(frozen=True, eq=False)
class _Terms(RepresentationProducts):
    """shares: float64 [blocks, stored rows, outputs]"""

    shares: Tensor

    def products(self, vectors: Sequence[Tensor], rows: Tensor, position: int, start: int) -> list[Tensor]:
        f, shares = with_constant(rows), self.shares[position, start : start + len(rows)]  # [b, F + 1], [b, C]
        products = []
        for vector in vectors:
            by_output = vector.view(shares.shape[1], -1)  # [outputs, F + 1], for a single query zero but for its class
            used = by_output.any(1).nonzero().flatten()
            products.append((f @ by_output[used].T * shares[:, used]).sum(1))
        return products

    def of_rows(self, start: int, stop: int) -> _Terms:
        return replace(self, shares=self.shares[:, start:stop].clone())


class _Squares(RowPass):
    """The squared norms of representations with their constant."""

    def __call__(self, start: int, rows: Tensor) -> Tensor:
        """float64 [b, blocks]"""
        return with_constant(rows.double()).square().sum(2)


class _RepresenterScoring(RepresentationScoring):
    """A query vector is f_q at the query's output j and zero at the others: [outputs * (features + 1)]."""

    def __init__(self, contents: IndexContents) -> None:
        super().__init__(contents)
        assert contents.refit is not None  # else Method.lacks
        self._refit = contents.refit
        self._outputs = self._refit.weights.shape[1]

    def _query_side(self, representations: Tensor, queries: Sequence[Query]) -> Tensor:
        f = with_constant(representations)
        vectors = f.new_zeros(len(f), f.shape[1], self._outputs, f.shape[2])
        for number, query in enumerate(queries):
            for sign, label in zip((1, -1), self._explained(query), strict=False):
                vectors[number, :, self._output(label)] += sign * f[number]
        return vectors.flatten(2)

    def _explained(self, query: Query) -> Sequence[Label | None]:
        """The label whose output is explained; the output of a second one is subtracted."""
        if query.target_labels and self._refit.entry.classes is None:
            raise QueryError("method 'representer' explains the predicted value, whatever the label: leave target out")
        return query.target_labels or [query.prediction if query.label is None else query.label]

    def _products(self, vectors: Tensor) -> RepresentationProducts:
        return _Terms(vectors, self._refit.shares)

    def row_vectors(self, examples: Sequence[Example]) -> Tensor:
        """As if the layer had been fitted to these examples too, and were the same."""
        entry = self._refit.entry
        f = with_constant(self._represented(examples, "training example")[0])  # [n, blocks, F + 1]
        labels = self._labels([self._contents.last_model.label(example) for example in examples])
        outputs = torch.einsum("nbf,bof->nbo", f, self._refit.weights)
        slopes = torch.stack([loss_slopes(phi, labels, entry.classes) for phi in outputs.unbind(1)], dim=1)
        shares = slopes / (-2 * entry.l2 * entry.fitted_rows)
        return (shares[..., None] * f[:, :, None]).flatten(2)

    def self_influence(self) -> Floats:
        """alpha_ij <f_i, f_i> for the row's class j. float32 [stored rows]"""
        stored = self.store.columns(0)["label"]
        outputs = torch.zeros(len(stored), dtype=torch.int64)
        if self._refit.entry.classes is not None:
            outputs = torch.from_numpy(stored.astype(np.int64))
        shares = self._refit.shares.gather(2, outputs.expand(len(self.blocks), -1)[..., None])[..., 0]  # [blocks, rows]
        squares = self._each_row(_Squares())  # [rows, blocks]
        scores: Floats = (shares * squares.T).mean(0).float().numpy()
        return scores

    def _labels(self, labels: Sequence[Label | None]) -> Tensor:
        if self._refit.entry.classes is not None:
            return torch.tensor([self._output(label) for label in labels])
        if None in labels:
            raise QueryError("method 'representer' needs the values of training examples: give their labels")
        return torch.tensor(labels, dtype=torch.float64)

    def _output(self, label: Label | None) -> int:
        """The layer's output for a label. Raises QueryError if it has none."""
        classes = self._refit.entry.classes
        if classes is None:
            return 0
        if label is None or not 0 <= label < classes:
            raise QueryError(
                f"method 'representer' explains classes 0 to {classes - 1}, those of the training rows, not {label}: "
                "give the query another label, or ask by another method"
            )
        return int(label)
