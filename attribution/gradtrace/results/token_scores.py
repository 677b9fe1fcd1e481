"""Which tokens of a training text, and which of the query's, a row's score comes from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from gradtrace.contents import IndexContents
from gradtrace.data.dataset import fetch
from gradtrace.errors import QueryError, TaskError
from gradtrace.methods.gradient_scoring import GradientScoring
from gradtrace.models.queries import Query
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


def row_tokens(contents: IndexContents, scoring: GradientScoring, query: Query, rows: Sequence[int]) -> list[RowTokens]:
    """Of rows that are in the index, by their ids.

    Raises:
        QueryError: the task does not tell an example's tokens, or they are not those that the model's layers run over.
        LossError: a loss or a gradient is NaN or infinite.
    """
    positions = contents.store.row_ids.ids.searchsorted(rows)
    stored = scoring.store.gather(scoring.blocks, positions).double()  # [rows, blocks, D]
    scale = scoring.row_scale()
    scales = torch.ones(len(rows)) if scale is None else scale.cpu()[positions]
    texts = [_sequences(contents.task, example) for example in query.explained]
    of_query = scoring.query_positions(query, [_lengths(text) for text in texts])
    query_tokens, by_token = _joined([_flat(text) for text in texts], of_query)
    (vector,), _ = scoring.query_vectors([query])  # [blocks, D]
    results = []
    for row, values, factor, example in zip(
        rows, stored, scales.tolist(), fetch(contents.task.train, rows), strict=True
    ):
        text = _sequences(contents.task, example)
        score = float((vector.double().cpu() * values).sum()) * factor
        trained = scoring.row_position_scores(example, _lengths(text), vector) * factor
        asked = by_token.double().cpu().flatten(1) @ values.flatten() * factor
        sides = _scored(_flat(text), trained, score), _scored(query_tokens, asked, score)
        results.append(RowTokens(int(row), score, query.target, *sides))
    return results


def _scored(tokens: list[str], scores: Tensor, total: float) -> TokenScores:
    """scores: float64 [tokens]"""
    return TokenScores(tokens, scores.tolist(), total - float(scores.sum()))


def _joined(texts: Sequence[list[str]], vectors: Sequence[Tensor]) -> tuple[list[str], Tensor]:
    """The tokens of what is explained of a query, with their vectors [tokens, blocks, dimensions]: of one text; of two
    for a contrast, whose tokens are the same if it is one of labels."""
    if all(text == texts[0] for text in texts):
        return texts[0], reduce(torch.add, vectors)
    return list(chain(*texts)), torch.cat(list(vectors))


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
