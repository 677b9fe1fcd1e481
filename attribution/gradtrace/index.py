"""An open index: answers which training rows pushed a prediction towards or away from what it is."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Unpack

from gradtrace import methods
from gradtrace.contents import IndexContents
from gradtrace.errors import QueryError
from gradtrace.methods.vectors import Vectors, mean_vector, vector_batches
from gradtrace.models.queries import Query, joined_targets, require_labels
from gradtrace.models.targets import Target
from gradtrace.results.answering import Aggregate, Answering, Include, Stopwatch, check_aggregate, measured_recall
from gradtrace.results.asked import asked_queries, checked_target
from gradtrace.results.comparison import Scores
from gradtrace.results.display import describe, frame, table_html
from gradtrace.results.groups import GroupInfluences, row_groups
from gradtrace.results.hits import InfluenceResults
from gradtrace.results.removal import RemovalEffect, removal_effects
from gradtrace.results.rescoring import Prefilter
from gradtrace.results.token_scores import RowTokens, row_tokens
from gradtrace.search.searcher import DenseSearcher
from gradtrace.store.row_filter import RowFilter
from gradtrace.task import Example, Label
from gradtrace.tasks.language.generation import Completion, Prompt, complete
from gradtrace.tasks.language.questions import WritingTask

if TYPE_CHECKING:
    import pandas

_SCORES_TOGETHER = 1 << 25  # scores of all rows on some queries that are held at a time


class Index:
    """A read-only index with its task and the models of all its checkpoints. One thread at a time may use it.

    Attributes:
        rows: number of training rows; ids of rows are below it, also those of deleted rows.
        present: bool [rows], False for deleted rows.
        methods: names of the methods that it answers.
        verified: False if it was opened without comparing the checksums of its rows.
        columns: label, prediction, loss, correct and norm of every row at the last checkpoint, each [rows]; NaN or
            None for deleted rows.
        contents: what the index consists of, for methods and tests.
    """

    def __init__(self, contents: IndexContents) -> None:
        self.contents = contents
        self.task, self.manifest, store = contents.task, contents.manifest, contents.store
        self.directory = contents.directory
        for rows in (store, contents.representations):
            if rows is not None:
                rows.open_all()  # an open index answers even when its generation is pruned
        self.verified = contents.verified
        self._row_ids = store.row_ids
        self.rows, self.present = self._row_ids.rows, self._row_ids.present
        possible = methods.available_methods(self.manifest)
        self.methods = tuple(name for name in possible if self.lacks(name) is None)
        self.columns: dict[str, NDArray[Any]] = self._row_ids.columns(contents.columns)

    def with_searcher(self, searcher: DenseSearcher) -> Index:
        """The same index, searched by another searcher."""
        return Index(replace(self.contents, searcher=searcher))

    def close(self) -> None:
        """End the processes of its shards, if it has any: they hold memory until nobody holds the index any more. It
        answers nothing then."""
        if self.contents.shards is not None:
            self.contents.shards.close()

    def label(self, example: Example) -> Label | None:
        """The task's label of an example, an integer if it is a class."""
        return self.contents.last_model.label(example)

    def influence(
        self,
        examples: Sequence[Example],
        *,
        k: int = 10,
        method: str = "tracin",
        filter: RowFilter | Mapping[str, Any] | None = None,  # noqa: A002  (the word of the HTTP contract)
        target: Target | None = None,
        rescore: bool = False,
        prefilter: str | None = None,
        candidates: int = 100,
        aggregate: Aggregate | None = None,
        include: Collection[Include] = (),
        **options: Unpack[methods.MethodOptions],
    ) -> InfluenceResults:
        """The k strongest proponents and opponents of each example, fewer where fewer have a score of that sign.

        Args:
            examples: items like `task.train[i]`; one without a label is explained for the model's own prediction.
            method: one of `methods`; docs/methods.md says what each estimates.
            options: the method's own, see `methods.MethodOptions`.
            filter: which rows may be found, a RowFilter or its conditions as a dict: {"labels": [3]}.
            target: "loss" explains the loss even where the task defines a measurement; {"label": c} the loss that each
                example would have with this label, by number or name; {"label": c, "rather_than": d} the loss at c
                minus that at d, of which proponents are the rows that push towards c.
            rescore: recompute the full gradients of the rows found, twice as many at either end as asked for, and order
                them by exact scores.
            prefilter: "bm25" or "repsim": rescore the rows that are most alike by it, `candidates` of them, in place of
                those that the search finds.
            aggregate: "mean": one result, whose scores are the means over the examples of their scores.
            include: "layers", each score's shares by layer; "percentiles", where each score stands among the scores of
                all rows, and "histogram", that of all these scores, which read the whole index; "probabilities", those
                of the classes; "clusters", which hits are near-duplicates of which.

        Raises QueryError where something asked for does not exist, and LossError where a query's loss is not finite.
        """
        scoring, allowed = self.scoring(method, **options), self._allowed(filter)
        similar = None if prefilter is None else self._prefilter(prefilter, candidates)
        rescore = rescore or similar is not None
        changed = target or rescore or aggregate or any(value is not None for value in options.values())
        recall = None if changed else measured_recall(self.contents, method, k, allowed)
        known = methods.METHODS[method]
        answering = Answering(self.contents, known, scoring, k, allowed, rescore, aggregate, include, recall, similar)
        with (stopwatch := Stopwatch())("gradient"):
            queries, vectors, losses = self._queried(scoring, examples, method, target)
        return answering.answer(queries, vectors, losses, stopwatch)

    def scores(
        self,
        examples: Sequence[Example],
        *,
        method: str = "tracin",
        target: Target | None = None,
        **options: Unpack[methods.MethodOptions],
    ) -> NDArray[np.float32]:
        """The score of every training row for each example. float32 [queries, rows].

        Deleted rows have no influence: their score is 0, in the middle of every order; by `repsim` and `bm25`, whose
        scores only say how alike rows are, it is minus infinity. `present` is False for them.

        Raises as `influence`.
        """
        scoring = self.scoring(method, **options)
        _, vectors, _ = self._queried(scoring, examples, method, target)
        return self._row_ids.spread(scoring.scores(vectors), 0.0 if methods.METHODS[method].signed else -np.inf)

    def mean_scores(
        self,
        examples: Sequence[Example],
        *,
        method: str = "tracin",
        target: Target | None = None,
        **options: Unpack[methods.MethodOptions],
    ) -> Scores:
        """The mean over the examples of every training row's scores, for `compare_scores`. Raises as `influence`."""
        scoring, known = self.scoring(method, **options), methods.METHODS[method]
        queries, vectors, _ = self._queried(scoring, examples, method, target)
        (scores,) = scoring.scores(mean_vector(vectors))
        return Scores(
            self._row_ids.spread(scores, 0.0),
            self.present,
            known.signed,
            joined_targets(query.target for query in queries),
        )

    def pairs(
        self,
        train_examples: Sequence[Example],
        queries: Sequence[Example],
        *,
        method: str = "tracin",
        target: Target | None = None,
        **options: Unpack[methods.MethodOptions],
    ) -> NDArray[np.float32]:
        """The score that training examples have, or would have were they rows of the index (Pruthi et al. 2020, Remark
        3.5). float32 [queries, training examples].

        Their vectors are computed here and not rounded, so for rows of the index these scores differ from `scores()`
        only by the index's rounding.

        Args:
            train_examples: with labels; items of the kind that `task.train[i]` returns.

        Raises:
            QueryError: as `influence`, or the method scores rows of the index alone.
            LossError: a loss or a gradient is NaN or infinite.
        """
        scoring = self.scoring(method, **options)
        require_labels(self.task, train_examples)
        _, vectors, _ = self._queried(scoring, queries, method, target)
        return scoring.products(vectors, scoring.row_vectors(train_examples))

    def group_influence(
        self,
        examples: Sequence[Example],
        *,
        by: str = "label",
        method: str = "tracin",
        filter: RowFilter | Mapping[str, Any] | None = None,  # noqa: A002
        target: Target | None = None,
        aggregate: Aggregate | None = None,
        **options: Unpack[methods.MethodOptions],
    ) -> list[GroupInfluences]:
        """For each example, or for the mean of all, the sums of the scores of the rows that share a column's value.

        Reads the whole index, and what a task renders of every row where the column is a feature of a table that is not
        in memory. Of numbers that are not whole, or more than 1,000, ten ranges of about as many rows each are summed.

        Args:
            by: one of `columns`, or "feature:NAME", a feature of the training rows.
            examples, method, filter, target, aggregate, options: as in `influence`.

        Raises:
            QueryError: as `influence`, or the column has too many texts or classes to group by.
            LossError: a query's loss is NaN or infinite.
        """
        scoring = self.scoring(method, **options)
        check_aggregate(aggregate)
        groups = row_groups(self.contents, by, self._allowed(filter))
        _, vectors, _ = self._queried(scoring, examples, method, target)
        vectors = mean_vector(vectors) if aggregate else vectors
        together = max(1, _SCORES_TOGETHER // scoring.store.rows)
        return [
            groups.influence(scores) for batch in vector_batches(vectors, together) for scores in scoring.scores(batch)
        ]

    def token_scores(
        self,
        example: Example,
        rows: Sequence[int],
        *,
        method: str = "tracin",
        target: Target | None = None,
        **options: Unpack[methods.MethodOptions],
    ) -> list[RowTokens]:
        """For each of some training rows, which tokens its score for a query comes from: those of the row's text, whose
        scores sum to the row's but for what has no token, and those of the query's text, likewise.

        A layer's part of a token's score is that of the position at which the layer reads the token: its gradient comes
        from the losses at all positions that this one acts on, in a causal model its own and the later ones.

        Raises:
            QueryError: as `influence`, a row is not in the index, the method has no gradients by token, or the task
                does not define `tokens`.
            LossError: a loss or a gradient is NaN or infinite.
        """
        scoring = self.scoring(method, **options)
        if not methods.METHODS[method].splits_by_token:
            raise QueryError(f"the scores of method {method!r} cannot be split by token: take another method")
        for row in rows:
            self._check_present(row)
        (query,) = self._resolved([example], method, target)
        return row_tokens(self.contents, scoring, query, rows)

    def removal(
        self,
        rows: Sequence[int],
        examples: Sequence[Example],
        *,
        method: str = "influence",
        target: Target | None = None,
        **options: Unpack[methods.MethodOptions],
    ) -> list[RemovalEffect]:
        """For each example, what leaving these rows out of the training is predicted to do to it. Rows named twice
        count once. Reads the whole index.

        A method with `removal` predicts the change of what is explained, in its own unit, to first order: by the sum of
        the rows' scores, each as if it acted by itself. Of other methods, sums only tell which sets of rows do more.

        Raises:
            QueryError: as `influence`, no rows are given, or the index has no such row, or not any more.
            LossError: a query's loss is NaN or infinite.
        """
        scoring, removed = self.scoring(method, **options), np.zeros(self.rows, dtype=np.bool_)
        for row in rows:
            self._check_present(row)
            removed[row] = True
        if not len(rows):
            raise QueryError("no row to leave out")
        allowed = self._row_ids.allowed(removed)
        assert allowed is not None  # None only for no mask
        return removal_effects(scoring, self._resolved(examples, method, target), allowed)

    def self_influence(
        self, *, method: str = "tracin", **options: Unpack[methods.MethodOptions]
    ) -> NDArray[np.float32]:
        """The score of each training row on itself; high ones are worth a look for wrong labels. float32 [rows];
        minus infinity for deleted rows, so that they come last."""
        scoring = self.scoring(method, **options)
        return self._row_ids.spread(scoring.self_influence(), -np.inf)

    def scoring(self, method: str = "tracin", **options: Unpack[methods.MethodOptions]) -> methods.Scoring[Any]:
        """A method with its options, bound to this index: it turns queries and training examples into vectors.

        Raises:
            QueryError: there is no such method, this index does not answer by it, or not with these options.
        """
        known = methods.method_named(method, self.manifest)
        if (lacking := self.lacks(method)) is not None:
            raise QueryError(f"this index does not answer by {method!r}: {lacking}")
        known.check_options(options)
        return known.scoring(self.contents, options)

    def lacks(self, method: str) -> str | None:
        """What the index or its task lack to answer by one of the methods that there are; None if they lack nothing."""
        known = methods.METHODS[method]
        return known.lacks(self.manifest) or known.unfit(self.contents)

    def complete(
        self, prompt: Prompt, *, max_tokens: int = 32, temperature: float = 0.0, seed: int = 0, seconds: float = 60.0
    ) -> Completion:
        """What the model of the last checkpoint writes after a prompt, and the request that asks why; see `complete`
        in `gradtrace.tasks.language.generation`.

        Raises:
            QueryError: the task's model does not write, or the prompt cannot be read or is too long.
        """
        if not isinstance(self.task, WritingTask):
            raise QueryError(f"{type(self.task).__name__} writes no text: ask about examples, or about rows")
        options: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
        return complete(self.task, self.contents.last_model.model, prompt, **options, seconds=seconds)

    def queries(
        self, examples: Sequence[Example], *, method: str = "tracin", target: Target | None = None
    ) -> list[Query]:
        """The examples with what is explained of each, in words as `target`: "loss at the predicted label". In place of
        examples, they spare the model's predictions where several questions are about the same. Raises as `influence`.
        """
        return self._resolved(examples, method, target)

    def try_queries(
        self,
        examples: Sequence[Example],
        *,
        method: str = "tracin",
        target: Target | None = None,
        **options: Unpack[methods.MethodOptions],
    ) -> None:
        """Compute the examples' query vectors, to see whether they can be asked about. Raises as `influence`, or
        whatever the task and the model raise for an example that they cannot take."""
        self._queried(self.scoring(method, **options), examples, method, target)

    def _check_present(self, row: int) -> None:
        if not 0 <= row < self.rows or not self.present[row]:
            raise QueryError(f"row {row} is not in the index, or was deleted from it: name rows that are there")

    def _allowed(self, row_filter: RowFilter | Mapping[str, Any] | None) -> NDArray[np.bool_] | None:
        """Which stored rows may be found; None: all. [stored rows]"""
        if row_filter is None:
            return self._row_ids.allowed(None)
        return self._row_ids.allowed(RowFilter.of(row_filter).mask(self.rows, self.columns, self.task.class_names))

    def check_target(self, method: str, target: Target | None) -> None:
        """Raises QueryError where there is no such target, or this task or method has none that names labels."""
        checked_target(self.contents, methods.METHODS[method], target)

    def _prefilter(self, name: str, candidates: int) -> Prefilter:
        """By a method whose scores say how alike rows are."""
        known = methods.METHODS.get(name)
        if known is None or known.signed or candidates < 1:
            raise QueryError(
                f"the prefilter is {name!r} with {candidates} candidates; give bm25 or repsim, and 1 or more"
            )
        return Prefilter(self.scoring(name), candidates)

    def _queried(
        self, scoring: methods.Scoring[Any], examples: Sequence[Example], method: str, target: Target | None
    ) -> tuple[list[Query], Vectors, list[float]]:
        """What is explained of each example, with the vectors and the losses [queries] of all."""
        queries = self._resolved(examples, method, target)
        return queries, *scoring.query_vectors(queries)

    def _resolved(self, examples: Sequence[Example], method: str, target: Target | None) -> list[Query]:
        return asked_queries(self.contents, methods.METHODS[method], examples, target)

    def __repr__(self) -> str:
        return f"<Index {self.directory}: {self._described()}; methods {', '.join(self.methods)}>"

    def _described(self) -> str:
        return describe(self.manifest) + ("" if self.verified else "; not verified")

    def to_pandas(self) -> pandas.DataFrame:
        """A line for each training row: its columns at the last checkpoint, and whether it is `present`, not deleted.

        Raises:
            MissingLibraryError: pandas is not installed.
        """
        table = frame([])
        for name, column in {"row": np.arange(self.rows), "present": self.present, **self.columns}.items():
            table[name] = column
        return table

    def _repr_html_(self) -> str:
        entries = self.manifest.checkpoints
        checkpoints = [[escape(entry.name), str(entry.step), f"{entry.learning_rate:g}"] for entry in entries]
        table = table_html("Checkpoints", ("name", "step", "learning rate"), checkpoints)
        title, methods_line = escape(f"{self.directory}: {self._described()}"), escape(", ".join(self.methods))
        return f"<div><p>{title}<br>Methods: {methods_line}</p>{table}</div>"
