"""BM25: which training texts share words with the query's, whatever the model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradtrace.contents import IndexContents
from gradtrace.errors import MissingLibraryError, QueryError
from gradtrace.fitted.word_scores import EXTRA, LIBRARY, is_installed, text_of
from gradtrace.methods.method import Method, MethodOptions, Scoring
from gradtrace.models.queries import Query, query_example_batches
from gradtrace.search.scored_rows import Doubles, Floats, Rows, SearchResult, ends_of_scored
from gradtrace.task import Example, Task


class BM25(Method):
    """Robertson and Zaragoza 2009, in Lucene's variant: a baseline that no method should fall behind.

    The words of the whole query count, of a prompt with its completion those of both.
    """

    name = "bm25"
    options = ()
    sign = ""
    signed = False
    uses_labels = False
    compares = "words"
    splits_by_token = False
    meaning = (
        "Score: BM25 of the row's text for the words of the query's: how many of them it has, rare ones counting more. "
        "It is not an influence: neither model nor training have a part in it. High is alike; the lowest are the least "
        "alike, 0 without a common word: they are no opponents in the sense of a cause"
    )

    def unfit(self, contents: IndexContents) -> str | None:
        task = contents.task
        if type(task).render is Task.render:
            return f"{type(task).__name__} defines no render, so that its rows have no text whose words are compared"
        try:
            text = text_of(task, contents.first_row)
        except Exception as error:  # whatever the user's code raises; who shows rows will see it again
            return f"{type(task).__name__} cannot render its first row ({type(error).__name__}: {error})"
        if text is None:
            return f"{type(task).__name__} renders rows as no text, so that there are no words to compare"
        return None if is_installed() else str(MissingLibraryError(LIBRARY, EXTRA))

    def scoring(self, contents: IndexContents, options: MethodOptions) -> Scoring[Tensor]:
        return _BM25Scoring(contents)


class _BM25Scoring(Scoring[Tensor]):
    """A query vector counts the query's words, among the words of all queries that were asked about together."""

    def __init__(self, contents: IndexContents) -> None:
        self.store, self.blocks = contents.store, []
        self._contents = contents
        self._words: list[int] = []  # numbers of the words that the dimensions of query vectors stand for

    def query_vectors(self, queries: Sequence[Query]) -> tuple[Tensor, list[float]]:
        task, model = self._contents.task, self._contents.last_model
        counts = self._contents.word_scores.counts([text_of(task, query.example) or "" for query in queries])
        self._words = sorted({word for of_query in counts for word in of_query})
        vectors = torch.tensor([[[of_query.get(word, 0) for word in self._words]] for of_query in counts])
        losses = [float("nan")] * len(queries)
        for numbers, batch in query_example_batches(model, queries):
            for number, loss in zip(numbers, model.losses(batch).tolist(), strict=True):
                losses[number] = loss
        return vectors.float(), losses

    def search(self, vectors: Tensor, k: int, allowed: NDArray[np.bool_] | None) -> list[SearchResult]:
        return [ends_of_scored(scores[:, None].astype(np.float64), k, allowed) for scores in self.scores(vectors)]

    def scores(self, vectors: Tensor) -> Floats:
        scores = np.zeros((len(vectors), self.store.rows), dtype=np.float32)
        by_word = self._contents.word_scores.by_word[:, self._words]  # [live rows, words of the queries]
        scores[:, self.store.row_ids.live()] = (by_word @ vectors[:, 0].numpy().T).T
        return scores

    def row_products(self, positions: Rows) -> Doubles:
        texts = np.searchsorted(np.flatnonzero(self.store.row_ids.live()), positions)
        rows = self._contents.word_scores.by_word[texts].astype(np.float64)  # [m, words]
        products: Doubles = (rows @ rows.T).toarray()
        return products

    def row_vectors(self, examples: Sequence[Example]) -> Tensor:
        raise QueryError("method 'bm25' scores the texts of the index alone: ask for other ones by another method")

    def products(self, vectors: Tensor, rows: Tensor) -> Floats:
        raise NotImplementedError  # there are no row vectors

    def self_influence(self) -> Floats:
        raise QueryError("method 'bm25' compares words: no row has an influence on itself by it, ask by another method")
