"""An open index: answers which training rows pushed a prediction towards or away from what it is."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from gradtrace import methods
from gradtrace.contents import IndexContents
from gradtrace.data.dataset import fetch
from gradtrace.errors import GradtraceError, QueryError
from gradtrace.models.queries import QUERY_BATCH, Query, is_one_example, require_labels, resolve_queries
from gradtrace.results import rescoring
from gradtrace.results.draft import Draft
from gradtrace.results.groups import GroupInfluences, RowGroups
from gradtrace.results.hits import InfluenceResults, Recall
from gradtrace.results.index_display import IndexDisplay
from gradtrace.results.layer_shares import layer_shares
from gradtrace.search.candidates import Searcher
from gradtrace.store.row_filter import RowFilter
from gradtrace.task import Example, Label

T = TypeVar("T")

Aggregate = Literal["mean"]
Include = Literal["layers", "percentiles"]

_SCORES_TOGETHER = 1 << 25  # scores of all rows on some queries that are held at a time


class Index(IndexDisplay):
    """A read-only index with its task and the models of all its checkpoints. One thread at a time may use it.

    Attributes:
        rows: number of training rows; ids of rows are below it, also those of deleted rows.
        present: bool [rows], False for deleted rows.
        methods: names of the methods that it answers.
        columns: label, prediction, loss, correct and norm of every row at the last checkpoint, each [rows]; NaN or
            None for deleted rows.
        last_timing: milliseconds of the last `influence` call: "gradient", "search", "rescore", "percentiles", "rest".
    """

    def __init__(self, contents: IndexContents) -> None:
        self._contents = contents
        self.task, self.manifest, store = contents.task, contents.manifest, contents.store
        self.directory = contents.directory
        for one in (store, contents.representations):
            if one is not None:
                one.open_all()  # an open index answers even when its generation is pruned
        self._row_ids = store.row_ids
        self.rows, self.present = self._row_ids.rows, self._row_ids.present
        self.methods = tuple(methods.available_methods(self.manifest))
        self._stored_columns = store.columns(self.manifest.last_checkpoint)
        self.columns: dict[str, NDArray[Any]] = self._row_ids.columns(self._stored_columns)
        self.last_timing: dict[str, float] = {}

    @property
    def searcher(self) -> Searcher:
        """Finds both ends for `influence` over the gradient rows."""
        return self._contents.searcher

    @searcher.setter
    def searcher(self, searcher: Searcher) -> None:
        self._contents.searcher = searcher

    def label(self, example: Example) -> Label | None:
        """The task's label of an example, as whole number where it is a class."""
        return self._contents.last_model.label(example)

    def influence(
        self,
        examples: Sequence[Example],
        *,
        k: int = 10,
        method: str = "tracin",
        checkpoints: Sequence[str] | None = None,
        weights: str | None = None,
        damping: float | None = None,
        segments: int | None = None,
        similarity: str | None = None,
        filter: RowFilter | Mapping[str, Any] | None = None,  # noqa: A002  (the word of the HTTP contract)
        target: str | None = None,
        rescore: bool = False,
        aggregate: Aggregate | None = None,
        include: Collection[Include] = (),
    ) -> InfluenceResults:
        """The k strongest proponents and opponents of each example, fewer where fewer have a score of that sign.

        Args:
            examples: items of the kind that `task.train[i]` returns; one without a label is explained for the model's
                own prediction.
            method: one of `methods`; docs/methods.md tells what each estimates.
            checkpoints, weights, damping, segments, similarity: the method's own, see `methods.Options`.
            filter: which rows may be found, a RowFilter or its conditions as a dict: {"labels": [3]}.
            target: "loss" explains the loss even where the task defines a measurement.
            rescore: recompute the full gradients of the rows found, twice as many at either end as asked for, and order
                them by exact scores.
            aggregate: "mean": one result, whose scores are the means over the examples of their scores.
            include: "layers", each score's shares by layer; "percentiles", where each score stands among the scores of
                all rows, which reads the whole index.

        Raises:
            QueryError: something asked for does not exist.
            LossError: a query's loss is NaN or infinite.
        """
        options = methods.Options(checkpoints, weights, damping, segments, similarity)
        scoring = self._scoring(method, options)
        self._check_question(method, scoring, k, rescore, aggregate, include)
        allowed = self._allowed(filter)
        self.last_timing = {"rescore": 0.0, "percentiles": 0.0}
        with self._timed("gradient"):
            queries = self._resolved(examples, target)
            vectors, losses = scoring.query_vectors(queries)
            vectors = vectors.mean(0, keepdim=True) if aggregate else vectors
        with self._timed("search"):
            wanted = k * rescoring.CANDIDATES if rescore else k
            found = scoring.search(vectors, wanted, allowed)
        silent = (~vectors.flatten(1).any(1)).tolist()
        groups = zip(_grouped(queries, aggregate), _grouped(losses, aggregate), found, silent, strict=True)
        drafts = [Draft(*one) for one in groups]
        if rescore:
            with self._timed("rescore"):
                self._rescore(drafts, scoring, k, "layers" in include)
        if "percentiles" in include:
            with self._timed("percentiles"):
                self._place(drafts, vectors, scoring)
        with self._timed("rest"):
            if "layers" in include and not rescore:
                self._share_by_layer(drafts, vectors, scoring)
            names = [self.manifest.checkpoints[c].name for c in scoring.blocks]
            unusual = rescore or aggregate or target or options != methods.Options()
            filtered = allowed is not None and not np.array_equal(allowed, self._row_ids.live())
            recall = None if unusual or filtered else self._recall(method, k)
            named = methods.METHODS[method]
            results = (draft.result(named, names, k, recall, self._row_ids, self._stored_columns) for draft in drafts)
            return InfluenceResults(replace(result, task=self.task) for result in results)

    def scores(
        self,
        examples: Sequence[Example],
        *,
        method: str = "tracin",
        checkpoints: Sequence[str] | None = None,
        weights: str | None = None,
        damping: float | None = None,
        segments: int | None = None,
        similarity: str | None = None,
        target: str | None = None,
    ) -> NDArray[np.float32]:
        """The score of every training row for each example. float32 [queries, rows].

        Deleted rows have no influence: their score is 0, in the middle of every order, or, of `repsim`, where more
        alike is all that scores say, minus infinity. `present` tells them apart.

        Raises as `influence`.
        """
        scoring = self._scoring(method, methods.Options(checkpoints, weights, damping, segments, similarity))
        vectors, _ = scoring.query_vectors(self._resolved(examples, target))
        return self._row_ids.spread(scoring.scores(vectors), 0.0 if methods.METHODS[method].signed else -np.inf)

    def pairs(
        self,
        train_examples: Sequence[Example],
        queries: Sequence[Example],
        *,
        method: str = "tracin",
        checkpoints: Sequence[str] | None = None,
        weights: str | None = None,
        damping: float | None = None,
        segments: int | None = None,
        similarity: str | None = None,
        target: str | None = None,
    ) -> NDArray[np.float32]:
        """The score that training examples have, or would have were they rows of the index (Pruthi et al. 2020, Remark
        3.5). float32 [queries, training examples].

        Their vectors are computed here and not rounded, so that for real rows these scores are those of `scores()` but
        for the index's rounding.

        Args:
            train_examples: with labels; items of the kind that `task.train[i]` returns.

        Raises:
            QueryError: as `influence`, or the method scores rows of the index alone.
            LossError: a loss or a gradient is NaN or infinite.
        """
        scoring = self._scoring(method, methods.Options(checkpoints, weights, damping, segments, similarity))
        require_labels(self.task, train_examples)
        vectors, _ = scoring.query_vectors(self._resolved(queries, target))
        rows = scoring.row_vectors(train_examples)
        scores: NDArray[np.float32] = (vectors.flatten(1) @ rows.flatten(1).T).cpu().numpy()
        return scores

    def group_influence(
        self,
        examples: Sequence[Example],
        *,
        by: str = "label",
        method: str = "tracin",
        checkpoints: Sequence[str] | None = None,
        weights: str | None = None,
        damping: float | None = None,
        segments: int | None = None,
        similarity: str | None = None,
        filter: RowFilter | Mapping[str, Any] | None = None,  # noqa: A002
        target: str | None = None,
        aggregate: Aggregate | None = None,
    ) -> list[GroupInfluences]:
        """For each example, or for the mean of all, the sums of the scores of the rows that share a column's value.

        Reads the whole index.  by: one of `columns`;  the others as in `influence`

        Raises:
            QueryError: as `influence`, or the column has too many values to group by.
            LossError: a query's loss is NaN or infinite.
        """
        scoring = self._scoring(method, methods.Options(checkpoints, weights, damping, segments, similarity))
        self._check_question(method, scoring, 1, False, aggregate, ())
        groups = RowGroups(self._stored_columns, by, self._allowed(filter))
        vectors, _ = scoring.query_vectors(self._resolved(examples, target))
        vectors = vectors.mean(0, keepdim=True) if aggregate else vectors
        some = vectors.split(max(1, _SCORES_TOGETHER // scoring.store.rows))
        return [groups.influence(own) for part in some for own in scoring.scores(part)]

    def self_influence(
        self,
        *,
        method: str = "tracin",
        checkpoints: Sequence[str] | None = None,
        weights: str | None = None,
        damping: float | None = None,
        segments: int | None = None,
        similarity: str | None = None,
    ) -> NDArray[np.float32]:
        """The score of each training row on itself; high ones are worth a look for wrong labels. float32 [rows];
        minus infinity for deleted rows, so that they come last."""
        scoring = self._scoring(method, methods.Options(checkpoints, weights, damping, segments, similarity))
        return self._row_ids.spread(scoring.self_influence(), -np.inf)

    def try_queries(
        self, examples: Sequence[Example], method: str, options: methods.Options, target: str | None
    ) -> None:
        """Take examples as far as their query vectors, to see whether they can be asked about. Raises as `influence`,
        or whatever the task and the model raise of an example that they cannot take."""
        self._scoring(method, options).query_vectors(self._resolved(examples, target))

    def _scoring(self, method: str, options: methods.Options) -> methods.Scoring:
        named = methods.method_named(method, self.manifest)
        options.check(named.name, named.options)
        return named.scoring(self._contents, options)

    def _allowed(self, row_filter: RowFilter | Mapping[str, Any] | None) -> NDArray[np.bool_] | None:
        """Which stored rows may be found; None: all. [stored rows]"""
        return self._row_ids.allowed(RowFilter.of(row_filter).mask(self.rows, self.columns, self.task.class_names))

    def _resolved(self, examples: Sequence[Example], target: str | None) -> list[Query]:
        if not len(examples):
            raise QueryError("no example to explain")
        last = self._contents.last_model
        try:
            parts = (examples[start : start + QUERY_BATCH] for start in range(0, len(examples), QUERY_BATCH))
            return [query for part in parts for query in resolve_queries(last, part, target)]
        except GradtraceError:
            raise
        except Exception as error:
            first = fetch(self.task.train, self._row_ids.live_ids()[:1].tolist())
            if any(is_one_example(examples, row) for row in first):
                raise QueryError("this is one example where a list of examples is asked for: pass [example]") from error
            raise

    def _recall(self, method: str, k: int) -> Recall | None:
        """As it was measured: with so many hits, by the method's default options, at all checkpoints and rows."""
        entry = self.manifest.searcher
        measured = entry and entry.k == k and entry.recall.get(method)
        return Recall(measured.top, measured.bottom) if measured else None

    def _check_question(
        self,
        method: str,
        scoring: methods.Scoring,
        k: int,
        rescore: bool,
        aggregate: str | None,
        include: Collection[str],
    ) -> None:
        if k < 1:
            raise QueryError(f"k must be at least 1, not {k}")
        if aggregate not in (None, *get_args(Aggregate)):
            raise QueryError(f'unknown aggregate {aggregate!r}; leave it out or pass "mean"')
        unknown = set(include) - set(get_args(Include))
        if unknown:
            raise QueryError(f"unknown include {sorted(unknown)}; choose from {', '.join(get_args(Include))}")
        if "layers" in include and scoring.bases is None:
            raise QueryError(f"method {method!r} compares no gradients, so its scores have no shares by layer")
        if "layers" in include and self._contents.bases[0].mixes_layers and not rescore:
            raise QueryError(
                f"the columns of a {self.manifest.basis.kind} projection mix all layers, so they give no shares by "
                "layer: ask for rescore as well, or build the index with another basis"
            )
        if rescore and scoring.full_gradient_weights is None:
            raise QueryError(f"method {method!r} is no inner product of full gradients: leave rescore out")

    def _rescore(self, drafts: Sequence[Draft], scoring: methods.Scoring, k: int, layers: bool) -> None:
        assert scoring.full_gradient_weights is not None  # else _check_question refused
        models = [self._contents.models[block] for block in scoring.blocks]
        groups, found = [draft.queries for draft in drafts], [draft.found for draft in drafts]
        weights, normalized = scoring.full_gradient_weights, scoring.normalized
        exact = rescoring.rescored(models, weights, normalized, groups, found, k, self._training_examples)
        for draft, one in zip(drafts, exact, strict=True):
            draft.found, draft.rows_rescored = one.found, len(one.rows)
            if layers:
                draft.share_by_layer(one.rows, one.layers)

    def _training_examples(self, positions: NDArray[np.int64]) -> list[Example]:
        return fetch(self.task.train, self._row_ids.of(positions).tolist())

    def _share_by_layer(self, drafts: Sequence[Draft], vectors: Tensor, scoring: methods.Scoring) -> None:
        assert scoring.bases is not None  # else _check_question refused
        scale = scoring.row_scale()
        for draft, vector in zip(drafts, vectors, strict=True):
            positions = draft.positions
            shares = layer_shares(scoring.store, scoring.bases, vector, scoring.blocks, positions)
            gains = 1.0 if scale is None else scale.numpy()[positions]
            draft.share_by_layer(positions, {name: share * gains for name, share in shares.items()})

    def _place(self, drafts: Sequence[Draft], vectors: Tensor, scoring: methods.Scoring) -> None:
        for start in range(0, len(drafts), QUERY_BATCH):
            some = slice(start, start + QUERY_BATCH)
            for draft, own in zip(drafts[some], scoring.scores(vectors[some]), strict=True):
                draft.place_among(own, self._row_ids.live())

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.last_timing[name] = 1e3 * (time.perf_counter() - started)


def _grouped(values: Sequence[T], aggregate: str | None) -> list[Sequence[T]]:
    """The values behind each result: all of them, or one by one."""
    return [values] if aggregate else [[value] for value in values]
