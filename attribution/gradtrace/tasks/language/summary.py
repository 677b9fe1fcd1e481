"""How many tokens the rows of a language task have, how many count in the loss, and how many were cut off."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from gradtrace.errors import TaskError
from gradtrace.task import Example
from gradtrace.tasks.language.options import Reduction
from gradtrace.tasks.language.packed import Documents
from gradtrace.tasks.language.questions import TOKENS_A_BATCH, WritingTask
from gradtrace.tasks.language.task import LanguageTask

_LARGEST_BATCH = 128
_SIZED_ROWS = 1000  # by whose longest the batches are sized


@dataclass
class TokenSummary:
    """Of the rows of a training set, or of some of them.

    all_rows: of the training set;  rows: that were looked at;  max_length: tokens that are kept of a row
    tokens, counted: sums over rows of tokens kept, and of those that count in the loss;  longest: tokens of a row
    reduction: of the losses of a row's tokens to its own; None where the loss is not of tokens
    packed: rows of the data that hold these rows, as a trainer packed them; None where each holds one
    cut_rows, cut_tokens: rows that were shortened, and tokens that were cut off them
    uncounted: rows without a token that counts, whose scores are zero;  unfit: rows that cannot be read, with the cause
    """

    all_rows: int
    max_length: int
    reduction: Reduction | None = None
    packed: int | None = None
    rows: int = 0
    tokens: int = 0
    counted: int = 0
    longest: int = 0
    cut_rows: int = 0
    cut_tokens: int = 0
    uncounted: list[int] = field(default_factory=list)
    unfit: list[tuple[int, str]] = field(default_factory=list)

    def sentences(self) -> Iterator[str]:
        some = f"{self.rows:,} of {self.all_rows:,} rows" if self.rows < self.all_rows else f"{self.rows:,} rows"
        yield (
            f"{some}: {self.tokens:,} tokens, {self.longest:,} in the longest; {self.counted:,} "
            f"({self.counted / max(self.tokens, 1):.0%}) count in the loss"
        )
        if self.packed is not None:
            yield f"these are the documents of {self.packed:,} packed rows, each apart from the others"
        if self.reduction is not None:
            yield f"the loss of a row is the {self.reduction} over its tokens that count"
        if self.cut_rows:
            share = self.cut_tokens / (self.tokens + self.cut_tokens)
            yield (
                f"{self.cut_rows:,} rows were longer than {self.max_length:,} tokens and were cut: {self.cut_tokens:,} "
                f"tokens ({share:.1%}) are left out"
            )
        if self.uncounted:
            yield f"{_rows(self.uncounted)} no token that counts in the loss, so that all their scores are zero"
        if self.unfit:
            first = self.unfit[0][1]
            yield f"{_rows([row for row, _ in self.unfit])} to be left out, as the first shows: {first}"


def _rows(rows: list[int]) -> str:
    listed = ", ".join(map(str, rows[:5])) + (f" and {len(rows) - 5:,} more" if len(rows) > 5 else "")
    return f"row {listed} has" if len(rows) == 1 else f"rows {listed} have"


def token_summary(task: LanguageTask, most: int) -> TokenSummary:
    """Of the training rows, or of `most` of them, evenly spaced."""
    count = len(task.train)
    reduction, records = task.reduction if task.reduces_tokens else None, task.train.records
    packed = len(records.packed) if isinstance(records, Documents) else None
    summary = TokenSummary(count, task.encoder.max_length, reduction, packed)
    for row in np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int)).tolist():
        summary.rows += 1
        try:
            example, cut = task.encoded(task.train.records[row])
        except TaskError as error:
            summary.unfit.append((row, str(error)))
            continue
        _add(summary, task, row, example, cut)
    return summary


def _add(summary: TokenSummary, task: LanguageTask, row: int, example: Example, cut: int) -> None:
    length, counted = task.length(example), task.counted(example)
    summary.tokens += length
    summary.counted += counted
    summary.longest = max(summary.longest, length)
    summary.cut_rows += cut > 0
    summary.cut_tokens += cut
    summary.uncounted += [] if counted else [row]


def rows_at_a_time(task: LanguageTask) -> int:
    """Rows that a build takes together. Models that write take them in parts of alike lengths."""
    return _LARGEST_BATCH if isinstance(task, WritingTask) else batch_size(task)


def batch_size(task: LanguageTask) -> int:
    """Rows in a batch of any rows, so that its tokens, and with them the model's outputs, fit into memory."""
    longest = token_summary(task, _SIZED_ROWS).longest
    return max(1, min(_LARGEST_BATCH, TOKENS_A_BATCH // max(longest, 1)))
