"""Which tokens of a training text, and which of the query's, a row's score comes from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from gradtrace.contents import IndexContents
from gradtrace.data.dataset import fetch
from gradtrace.errors import QueryError, TaskError
from gradtrace.methods.method import Scoring
from gradtrace.methods.position_scores import PositionQuestion
from gradtrace.models.queries import Query
from gradtrace.results.display import tokens_html
from gradtrace.search.scored_rows import Doubles
from gradtrace.task import Example, Task


@dataclass(frozen=True, slots=True)
class TokenScores:
    """The tokens of a text, and what each contributes to a score: the score is the sum of `scores`, plus `elsewhere`.

    tokens: their texts
    scores: of each token
    elsewhere: the rest of the score, of what has no token: layers that do not run over the tokens, such as a
        classifier's head, parameters without layers, and the rounding of the stored row
    """

    tokens: list[str]
    scores: list[float]
    elsewhere: float


@dataclass(frozen=True, slots=True)
class RowTokens:
    """A training row's score for a query, by the tokens of the row's text and, once more, by those of the query's."""

    row: int
    score: float
    target: str  # what is explained of the query, in words
    training: TokenScores
    query: TokenScores

    def _repr_html_(self) -> str:
        sides = ((f"row {self.row}, score {self.score:+.4g}", self.training), ("query", self.query))
        lines = (f"<p>{title}: {tokens_html(side.tokens, side.scores)}</p>" for title, side in sides)
        return f"<div>{''.join(lines)}</div>"


def row_tokens(contents: IndexContents, scoring: Scoring[Any], query: Query, rows: Sequence[int]) -> list[RowTokens]:
    """Of rows that are in the index, by their ids; of a method that splits by token.

    Raises:
        QueryError: the task does not tell an example's tokens, or as `Scoring.position_scores`.
        LossError: a loss or a gradient is NaN or infinite.
    """
    distinct = list(dict.fromkeys(rows))
    examples = fetch(contents.task.train, distinct)
    texts = [_sequences(contents.task, example) for example in examples]
    explained = [_sequences(contents.task, example) for example in query.explained]
    places = contents.store.row_ids.ids.searchsorted(distinct)
    lengths, query_lengths = (list(map(_lengths, side)) for side in (texts, explained))
    split = scoring.position_scores(PositionQuestion(query, query_lengths, places, examples, lengths))
    query_tokens, of_query = _joined([_flat(text) for text in explained], split.query)
    columns = zip(distinct, texts, split.scores.tolist(), split.training, of_query.T, strict=True)
    by_row = {
        row: RowTokens(row, score, query.target, _shares(_flat(text), own, score), _shares(query_tokens, asked, score))
        for row, text, score, own, asked in columns
    }
    return [by_row[row] for row in rows]


def _shares(tokens: list[str], scores: Doubles, total: float) -> TokenScores:
    return TokenScores(tokens, scores.tolist(), total - float(scores.sum()))


def _joined(texts: Sequence[list[str]], scores: Sequence[Doubles]) -> tuple[list[str], Doubles]:
    """The tokens of what is explained of a query, with their scores [tokens, rows]: of one text; of two for a contrast,
    whose tokens are the same if it is one of labels."""
    if all(text == texts[0] for text in texts):
        return texts[0], np.sum(scores, axis=0)
    return list(chain(*texts)), np.concatenate(scores)


def _sequences(task: Task, example: Example) -> list[list[str]]:
    """The tokens of each sequence that the model's layers run over.

    Raises:
        QueryError: the task has no `tokens`.
        TaskError: it returns something else than texts.
    """
    if not task.has_tokens:
        raise QueryError(
            f"{type(task).__name__} does not tell the tokens of an example: define tokens(self, example), which "
            "returns a text for each position of the model's layers; a TextClassification takes decode= for that"
        )
    tokens: list[Any] = list(task.tokens(example))
    several = bool(tokens) and isinstance(tokens[0], list | tuple)
    sequences = [list(sequence) for sequence in (tokens if several else [tokens])]
    if not all(isinstance(token, str) for sequence in sequences for token in sequence):
        raise TaskError(f"{type(task).__name__}.tokens returns something else than texts, or lists of texts")
    if not any(sequences):
        raise TaskError(f"{type(task).__name__}.tokens returns no token of an example")
    return sequences


def _lengths(sequences: Sequence[Sequence[str]]) -> list[int]:
    return [len(sequence) for sequence in sequences]


def _flat(sequences: Sequence[list[str]]) -> list[str]:
    return list(chain(*sequences))
