"""From what a search found to the answer: rescoring, percentiles and shares by layer are added to the hits."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from gradtrace.contents import IndexContents
from gradtrace.data.dataset import fetch
from gradtrace.errors import QueryError
from gradtrace.methods.method import Method, Scoring
from gradtrace.models.queries import QUERY_BATCH, Query
from gradtrace.results import rescoring
from gradtrace.results.distribution import Distribution, describe, percentiles
from gradtrace.results.hits import Hit, InfluenceResult, InfluenceResults, Recall
from gradtrace.results.layer_shares import layer_shares
from gradtrace.results.notes import note_on_few_rows, note_on_missing, note_on_zero
from gradtrace.search.scored_rows import SearchResult
from gradtrace.task import Example, Label

T = TypeVar("T")

Aggregate = Literal["mean"]
Include = Literal["layers", "percentiles"]


@dataclass(frozen=True, slots=True)
class Question:
    """What is wanted of the queries beside their method; see `Index.influence`.

    allowed: bool [stored rows] that may be hits; None: all.
    """

    k: int
    allowed: NDArray[np.bool_] | None = None
    rescore: bool = False
    aggregate: str | None = None
    include: Collection[str] = ()

    def check(self, contents: IndexContents, method: Method, scoring: Scoring) -> None:
        """Raises QueryError for what is never an answer, or not one of this method or index."""
        if self.k < 1:
            raise QueryError(f"k must be at least 1, not {self.k}")
        check_aggregate(self.aggregate)
        unknown = set(self.include) - set(get_args(Include))
        if unknown:
            raise QueryError(f"unknown include {sorted(unknown)}; choose from {', '.join(get_args(Include))}")
        if "layers" in self.include and scoring.bases is None:
            raise QueryError(f"method {method.name!r} compares no gradients, so its scores have no shares by layer")
        if "layers" in self.include and contents.bases[0].mixes_layers and not self.rescore:
            raise QueryError(
                f"the columns of a {contents.manifest.basis.kind} projection mix all layers, so they give no shares by "
                "layer: ask for rescore as well, or build the index with another basis"
            )
        if self.rescore and scoring.full_gradient_weights is None:
            raise QueryError(f"method {method.name!r} is not an inner product of full gradients: leave rescore out")


def check_aggregate(aggregate: str | None) -> None:
    """Raises QueryError for one that is not known."""
    if aggregate not in (None, *get_args(Aggregate)):
        raise QueryError(f'unknown aggregate {aggregate!r}; leave it out or pass "mean"')


class Stopwatch:
    """Milliseconds by stage of an answer: "gradient", "search", "rescore", "percentiles" and "rest"."""

    def __init__(self) -> None:
        self.timing = dict.fromkeys(("gradient", "search", "rescore", "percentiles", "rest"), 0.0)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.timing[stage] += 1e3 * (time.perf_counter() - started)


@dataclass(slots=True)
class _Draft:
    """The hits for the mean of some queries, mostly of one, and what was asked for of them beside their scores.

    Rows go by their positions in the store. layers: by position, by name of the layer. percentiles: by position.
    """

    queries: Sequence[Query]
    losses: Sequence[float]
    vector: Tensor  # [blocks, dimensions]
    hits: SearchResult
    rows_rescored: int = 0
    layers: dict[int, dict[str, float]] = field(default_factory=dict)
    percentiles: dict[int, float] = field(default_factory=dict)
    distribution: Distribution | None = None

    @property
    def positions(self) -> NDArray[np.int64]:
        """Those of both ends, ascending."""
        return np.union1d(self.hits.top_rows, self.hits.bottom_rows)

    def share_by_layer(self, positions: NDArray[np.int64], layers: Mapping[str, NDArray[np.float64]]) -> None:
        """layers: by name the shares [m] in the scores of the rows at `positions` [m]."""
        shares = zip(*(layer.tolist() for layer in layers.values()), strict=True)
        self.layers = {
            position: dict(zip(layers, share, strict=True))
            for position, share in zip(positions.tolist(), shares, strict=True)
        }


class Answering:
    """One question about one method's scores."""

    def __init__(
        self,
        contents: IndexContents,
        columns: Mapping[str, NDArray[Any]],
        method: Method,
        scoring: Scoring,
        question: Question,
        recall: Recall | None,
    ) -> None:
        """
        Args:
            columns: label, prediction, loss and correct at the last checkpoint, each [stored rows].
            recall: of the index's searcher for this question, where it is approximate and was measured.

        Raises:
            QueryError: as `Question.check`.
        """
        question.check(contents, method, scoring)
        self._contents, self._method, self._scoring, self._question = contents, method, scoring, question
        self._columns, self._recall, self._row_ids = columns, recall, contents.store.row_ids

    def answer(
        self, queries: Sequence[Query], vectors: Tensor, losses: Sequence[float], stopwatch: Stopwatch
    ) -> InfluenceResults:
        """Search with query vectors [queries, blocks, dimensions], and say all that was asked for of the hits."""
        question = self._question
        if question.aggregate:
            vectors = vectors.mean(0, keepdim=True)
        with stopwatch("search"):
            k = question.k * rescoring.CANDIDATES if question.rescore else question.k
            ends = self._scoring.search(vectors, k, question.allowed)
        drafts = [
            _Draft(*draft) for draft in zip(self._grouped(queries), self._grouped(losses), vectors, ends, strict=True)
        ]
        if question.rescore:
            with stopwatch("rescore"):
                self._rescore(drafts)
        if "percentiles" in question.include:
            with stopwatch("percentiles"):
                self._add_percentiles(drafts, vectors)
        with stopwatch("rest"):
            if "layers" in question.include and not question.rescore:
                self._share_by_layer(drafts)
            return InfluenceResults(map(self._result, drafts), timing=stopwatch.timing)

    def _grouped(self, values: Sequence[T]) -> list[Sequence[T]]:
        """The values behind each result: all of them, or one by one."""
        return [values] if self._question.aggregate else [[value] for value in values]

    def _rescore(self, drafts: Sequence[_Draft]) -> None:
        weights = self._scoring.full_gradient_weights
        assert weights is not None  # else the question was refused
        models = [self._contents.models[block] for block in self._scoring.blocks]
        groups, hits = [draft.queries for draft in drafts], [draft.hits for draft in drafts]
        exact = rescoring.rescored(
            models, weights, self._scoring.normalized, groups, hits, self._question.k, self._training_examples
        )
        for draft, rescored in zip(drafts, exact, strict=True):
            draft.hits, draft.rows_rescored = rescored.found, len(rescored.rows)
            if "layers" in self._question.include:
                draft.share_by_layer(rescored.rows, rescored.layers)

    def _training_examples(self, positions: NDArray[np.int64]) -> list[Example]:
        return fetch(self._contents.task.train, self._row_ids.ids[positions].tolist())

    def _add_percentiles(self, drafts: Sequence[_Draft], vectors: Tensor) -> None:
        for start in range(0, len(drafts), QUERY_BATCH):
            batch = slice(start, start + QUERY_BATCH)
            for draft, scores in zip(drafts[batch], self._scoring.scores(vectors[batch]), strict=True):
                if draft.rows_rescored:
                    scores[draft.hits.top_rows] = draft.hits.top_scores
                    scores[draft.hits.bottom_rows] = draft.hits.bottom_scores
                present = scores[self._row_ids.live()]
                draft.distribution = describe(present)
                shares = percentiles(present, scores[draft.positions]).tolist()
                draft.percentiles = dict(zip(draft.positions.tolist(), shares, strict=True))

    def _share_by_layer(self, drafts: Sequence[_Draft]) -> None:
        scoring, scale = self._scoring, self._scoring.row_scale()
        assert scoring.bases is not None  # else the question was refused
        for draft in drafts:
            positions = draft.positions
            shares = layer_shares(scoring.store, scoring.bases, draft.vector, scoring.blocks, positions)
            factors = 1.0 if scale is None else scale.numpy()[positions]
            draft.share_by_layer(positions, {name: share * factors for name, share in shares.items()})

    def _result(self, draft: _Draft) -> InfluenceResult:
        hits = draft.hits
        proponents = self._hits(draft, hits.top_rows, hits.top_scores, hits.top_parts, 1)
        opponents = self._hits(draft, hits.bottom_rows, hits.bottom_scores, hits.bottom_parts, -1)
        return InfluenceResult(
            proponents=proponents,
            opponents=opponents,
            method=self._method.name,
            target=" and ".join(dict.fromkeys(query.target for query in draft.queries)),
            label=_common([query.label for query in draft.queries]),
            prediction=_common([query.prediction for query in draft.queries]),
            loss=float(np.mean(draft.losses)),
            exact=hits.exact,
            recall=None if hits.exact else self._recall,
            rows_touched=hits.rows_touched,
            rows_searched=hits.rows_searched,
            queries=len(draft.queries),
            rows_rescored=draft.rows_rescored,
            distribution=draft.distribution,
            note=self._note(draft, len(proponents), len(opponents)),
            task=self._contents.task,
        )

    def _hits(
        self,
        draft: _Draft,
        positions: NDArray[np.int64],
        scores: NDArray[np.float32],
        parts: NDArray[np.float32],
        sign: int,
    ) -> list[Hit]:
        """Of one end [m], parts [m, blocks]; scores with another sign than the end's do not belong there."""
        if self._method.signed:
            belongs = sign * scores > 0
            positions, scores, parts = positions[belongs], scores[belongs], parts[belongs]
        names = [self._contents.manifest.checkpoints[block].name for block in self._scoring.blocks]
        rows = self._row_ids.ids[positions].tolist()
        return [
            Hit(
                row=row,
                score=score,
                parts=dict(zip(names, part, strict=True)),
                loss=float(self._columns["loss"][position]),
                layers=draft.layers.get(position),
                percentile=draft.percentiles.get(position),
                **{name: _python_value(self._columns[name][position]) for name in ("label", "prediction", "correct")},
            )
            for position, row, score, part in zip(
                positions.tolist(), rows, scores.tolist(), parts.tolist(), strict=True
            )
        ]

    def _note(self, draft: _Draft, proponents: int, opponents: int) -> str | None:
        if not bool(draft.vector.any()):  # then every score is zero
            kind = "gradient" if self._method.compares_gradients else "representation"
            return note_on_zero(kind, len(draft.queries), float(np.mean(draft.losses)))
        if not self._method.signed:
            return note_on_few_rows(draft.hits, self._question.k)
        return note_on_missing(draft.hits, proponents, opponents, self._question.k, draft.rows_rescored)


def _common(values: Sequence[Label | None]) -> Label | None:
    """What all values are; None where they differ."""
    return values[0] if all(value == values[0] for value in values) else None


def _python_value(value: Any) -> Any:
    """A column's value as a Python number; None where it is not known."""
    value = value.item() if hasattr(value, "item") else value
    return None if value is None or value != value else value
