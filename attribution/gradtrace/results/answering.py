"""From a search's result to the answer: hits with rescoring, percentiles and shares by layer, and notes."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray

from gradtrace.contents import IndexContents
from gradtrace.errors import QueryError
from gradtrace.methods.method import Method, Scoring
from gradtrace.methods.vectors import Vectors, is_zero, mean_vector
from gradtrace.models.queries import QUERY_BATCH, Query, joined_targets
from gradtrace.results import rescoring
from gradtrace.results.clusters import MOST_CLUSTERED, cluster_leaders
from gradtrace.results.hits import Distribution, Hit, InfluenceResult, InfluenceResults, Recall
from gradtrace.results.probable_classes import ClassProbability, class_probabilities, last_model_used, most_probable
from gradtrace.search.scored_rows import RankingEnd, SearchResult
from gradtrace.task import Label

T = TypeVar("T")

Aggregate = Literal["mean"]
Include = Literal["layers", "percentiles", "histogram", "probabilities", "clusters"]


def check_aggregate(aggregate: str | None) -> None:
    """Raises QueryError for an unknown aggregate."""
    if aggregate not in (None, *get_args(Aggregate)):
        raise QueryError(f'unknown aggregate {aggregate!r}; leave it out or pass "mean"')


def measured_recall(contents: IndexContents, method: str, k: int, allowed: NDArray[np.bool_] | None) -> Recall | None:
    """The searcher's, if it was measured for this k and all rows (with the method's default options)."""
    entry = contents.manifest.searcher
    measured = entry and entry.k == k and entry.recall.get(method)
    if not measured or not (allowed is None or np.array_equal(allowed, contents.store.row_ids.live())):
        return None
    return Recall(measured.top, measured.bottom)


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
    """A result in preparation: the hits of a query, or of the mean of several, and what else was asked for.

    Rows are given by their positions in the store. layers: by position, by layer name.  percentiles: by position
    """

    queries: Sequence[Query]
    losses: Sequence[float]
    vector: Vectors  # [blocks, dimensions]
    ends: SearchResult
    rows_rescored: int = 0
    layers: dict[int, dict[str, float]] = field(default_factory=dict)
    percentiles: dict[int, float] = field(default_factory=dict)
    distribution: Distribution | None = None
    probabilities: list[ClassProbability] | None = None

    @property
    def positions(self) -> NDArray[np.int64]:
        """Those of both ends, ascending."""
        return np.union1d(self.ends.top.rows, self.ends.bottom.rows)

    def share_by_layer(self, positions: NDArray[np.int64], layers: Mapping[str, NDArray[np.float64]]) -> None:
        """layers: by name the shares [m] in the scores of the rows at `positions` [m]."""
        shares = zip(*(layer.tolist() for layer in layers.values()), strict=True)
        by_name = (dict(zip(layers, share, strict=True)) for share in shares)
        self.layers = dict(zip(positions.tolist(), by_name, strict=True))


@dataclass(frozen=True, slots=True)
class Answering:
    """One question about one method's scores; `Index.influence` describes what can be asked for.

    allowed: bool [stored rows] that may be hits; None: all.
    prefilter: whose candidates are rescored; None: those of the search.
    recall: of the index's searcher for this question, where it is approximate and was measured.

    Raises:
        QueryError: what was asked for is never an answer, or not one of this method or index.
    """

    contents: IndexContents
    method: Method
    scoring: Scoring[Any]
    k: int
    allowed: NDArray[np.bool_] | None
    rescore: bool
    aggregate: str | None
    include: Collection[str]
    recall: Recall | None
    prefilter: rescoring.Prefilter | None = None

    def __post_init__(self) -> None:
        if self.k < 1:
            raise QueryError(f"k must be at least 1, not {self.k}")
        check_aggregate(self.aggregate)
        unknown = set(self.include) - set(get_args(Include))
        if unknown:
            raise QueryError(f"unknown include {sorted(unknown)}; choose from {', '.join(get_args(Include))}")
        if "clusters" in self.include and self.k > MOST_CLUSTERED:
            raise QueryError(f"clusters are of {MOST_CLUSTERED:,} hits at each end at most, not {self.k}: lower k")
        if "layers" in self.include and not self.method.compares_gradients:
            raise QueryError(
                f"method {self.method.name!r} compares no gradients, so its scores have no shares by layer"
            )
        if "layers" in self.include and self.contents.projects_all_layers and not self.rescore:
            raise QueryError(
                f"the columns of a {self.contents.manifest.basis.kind} projection mix all layers, so they give no "
                "shares by layer: ask for rescore as well, or build the index with another basis"
            )
        if self.rescore and self.scoring.full_gradient_weights is None:
            raise QueryError(
                f"method {self.method.name!r} is not an inner product of full gradients: leave rescore out"
            )

    def answer(
        self, queries: Sequence[Query], vectors: Vectors, losses: Sequence[float], stopwatch: Stopwatch
    ) -> InfluenceResults:
        """Search with the vectors of the queries, and add to the hits what was asked for."""
        if self.aggregate:
            vectors = mean_vector(vectors)
        with stopwatch("search"):
            ends = self._candidates(queries, vectors)
        drafts = [
            _Draft(*draft) for draft in zip(self._grouped(queries), self._grouped(losses), vectors, ends, strict=True)
        ]
        if self.rescore:
            with stopwatch("rescore"):
                self._rescore(drafts)
        if {"percentiles", "histogram"} & set(self.include):
            with stopwatch("percentiles"):
                self._place_among_all(drafts, vectors)
        with stopwatch("rest"):
            if "probabilities" in self.include:
                self._add_probabilities(drafts)
            if "layers" in self.include and not self.rescore:
                self._share_by_layer(drafts)
            return InfluenceResults(map(self._result, drafts), timing=stopwatch.timing)

    def _candidates(self, queries: Sequence[Query], vectors: Vectors) -> list[SearchResult]:
        """Both ends of each result, before they are rescored."""
        if self.prefilter is not None:
            return self.prefilter.found(queries, self.aggregate is not None, self.allowed)
        return self.scoring.search(vectors, self.k * rescoring.CANDIDATES if self.rescore else self.k, self.allowed)

    def _grouped(self, values: Sequence[T]) -> list[Sequence[T]]:
        """The values behind each result: all of them, or one by one."""
        return [values] if self.aggregate else [[value] for value in values]

    def _rescore(self, drafts: Sequence[_Draft]) -> None:
        groups, ends = [draft.queries for draft in drafts], [draft.ends for draft in drafts]
        exact = rescoring.rescored(self.contents, self.scoring, groups, ends, self.k)
        for draft, rescored in zip(drafts, exact, strict=True):
            draft.ends, draft.rows_rescored = rescored.ends, len(rescored.rows)
            if "layers" in self.include:
                draft.share_by_layer(rescored.rows, rescored.layers)

    def _place_among_all(self, drafts: Sequence[_Draft], vectors: Vectors) -> None:
        """The distribution of all scores; and if asked for percentiles, the shares of all rows with a lower score."""
        for start in range(0, len(drafts), QUERY_BATCH):
            batch = slice(start, start + QUERY_BATCH)
            for draft, scores in zip(drafts[batch], self.scoring.scores(vectors[batch]), strict=True):
                if draft.rows_rescored:
                    for end in (draft.ends.top, draft.ends.bottom):
                        scores[end.rows] = end.scores
                present = scores[self.contents.store.row_ids.live()]
                draft.distribution = Distribution.of(present, "histogram" in self.include)
                if "percentiles" in self.include:
                    below = np.searchsorted(np.sort(present), scores[draft.positions], side="left")
                    percentiles = 100.0 * below / len(present)
                    draft.percentiles = dict(zip(draft.positions.tolist(), percentiles.tolist(), strict=True))

    def _add_probabilities(self, drafts: Sequence[_Draft]) -> None:
        queries = [query for draft in drafts for query in draft.queries]
        probabilities = class_probabilities(last_model_used(self.contents, self.scoring.blocks), queries)
        if probabilities is not None:
            for draft, of_draft in zip(drafts, probabilities.split([len(d.queries) for d in drafts]), strict=True):
                draft.probabilities = most_probable(of_draft)

    def _share_by_layer(self, drafts: Sequence[_Draft]) -> None:
        for draft in drafts:
            draft.share_by_layer(draft.positions, self.scoring.shares_by_layer(draft.vector, draft.positions))

    def _result(self, draft: _Draft) -> InfluenceResult:
        ends = draft.ends
        proponents, opponents = self._hits(draft, ends.top, 1), self._hits(draft, ends.bottom, -1)
        return InfluenceResult(
            proponents=proponents,
            opponents=opponents,
            method=self.method.name,
            target=joined_targets(query.target for query in draft.queries),
            label=_common([query.label for query in draft.queries]),
            prediction=_common([query.prediction for query in draft.queries]),
            loss=float(np.mean(draft.losses)),
            exact=ends.exact,
            recall=None if ends.exact else self.recall,
            rows_touched=ends.rows_touched,
            rows_searched=ends.rows_searched,
            queries=len(draft.queries),
            rows_rescored=draft.rows_rescored,
            distribution=draft.distribution,
            probabilities=draft.probabilities,
            note=self._note(draft, len(proponents), len(opponents)),
            task=self.contents.task,
        )

    def _hits(self, draft: _Draft, end: RankingEnd, sign: int) -> list[Hit]:
        """The hits of an end, without scores of the other sign."""
        belongs = sign * end.scores > 0 if self.method.signed else slice(None)
        names = [self.contents.manifest.checkpoints[block].name for block in self.scoring.blocks]
        columns = self.contents.columns
        positions = end.rows[belongs]  # [m]
        ids = self.contents.store.row_ids.ids
        leaders = ids[cluster_leaders(self.scoring, positions)].tolist() if "clusters" in self.include else None
        return [
            Hit(
                row=row,
                score=score,
                cluster=leaders and leaders[place],
                parts=dict(zip(names, parts, strict=True)) if names else {},
                loss=float(columns["loss"][position]),
                layers=draft.layers.get(position),
                percentile=draft.percentiles.get(position),
                **{name: _python_value(columns[name][position]) for name in ("label", "prediction", "correct")},
            )
            for place, (position, row, score, parts) in enumerate(
                zip(
                    positions.tolist(),
                    ids[positions].tolist(),
                    end.scores[belongs].tolist(),
                    end.parts[belongs].tolist(),
                    strict=True,
                )
            )
        ]

    def _note(self, draft: _Draft, proponents: int, opponents: int) -> str | None:
        if is_zero(draft.vector):
            if self.method.compares == "words":
                return "no training text has a word of the query, so every score is zero"
            kind = self.method.compares.removesuffix("s")
            return _note_on_zero(kind, len(draft.queries), float(np.mean(draft.losses)))
        count = len(draft.ends.top.rows)
        if not self.method.signed:  # the sign of a score says nothing
            return f"only {count} of {self.k} rows at either end: no more were searched" if count < self.k else None
        return _note_on_missing(draft.ends, proponents, opponents, self.k, draft.rows_rescored)


def _common(values: Sequence[Label | None]) -> Label | None:
    """The value that all of them are; None if they differ."""
    return values[0] if all(value == values[0] for value in values) else None


def _python_value(value: Any) -> Any:
    """A column's value as a Python number; None if it is unknown (None or NaN)."""
    value = value.item() if hasattr(value, "item") else value
    return None if value is None or value != value else value


def _note_on_zero(kind: str, queries: int, loss: float) -> str:
    """kind: what of the query is zero, "gradient" or "representation";  loss: the query's, or the mean of several"""
    if queries > 1:
        return f"the {kind}s of these {queries} queries add up to zero at every checkpoint used, so every score is zero"
    certain = " (its loss is 0: the model is certain, saturated)" if loss == 0 and kind == "gradient" else ""
    return f"the {kind} of this query is zero at every checkpoint used{certain}, so every score is zero"


def _note_on_missing(ends: SearchResult, proponents: int, opponents: int, k: int, rescored: int) -> str | None:
    """Why there are fewer than k proponents or opponents; None where there are k of each.

    rescored: rows of which full gradients were taken; 0: none
    """
    searched = f"{rescored:,} rows rescored" if rescored else f"{ends.rows_searched:,} rows searched"
    texts = []
    for count, name, sign in ((proponents, "proponents", "positive"), (opponents, "opponents", "negative")):
        if count >= k:
            continue
        if rescored or ends.exact:
            reason = f"{'no other' if count else 'none'} of the {searched} has a {sign} score"
        else:
            reason = f"the approximate search found no{' other' if count else ''} row with a {sign} score"
        texts.append(f"only {count} of {k} {name}: {reason}" if count else f"no {name}: {reason}")
    return "; ".join(texts) or None
