"""Rows of the data sets: one, or those that meet some conditions."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from gradtrace import Index, Task
from gradtrace_client.browse_requests import ExamplesRequest
from gradtrace_client.browse_schemas import ExamplesAnswer
from gradtrace_client.schemas import ExampleAnswer, Payload, Split
from gradtrace_service.answers import documents
from gradtrace_service.answers.browsed import Browsed, browsed
from gradtrace_service.answers.questions import check_known, split_size, why_absent
from gradtrace_service.answers.rendering import rendered_rows
from gradtrace_service.answers.split_rows import SplitRows
from gradtrace_service.engine.work import each_alone
from gradtrace_service.errors import FieldError, NoSuchRowError
from gradtrace_service.ops.timings import milliseconds_since

Mask = NDArray[np.bool_]


@each_alone
def example(index: Index, request: tuple[Split, int], waited_ms: float) -> ExampleAnswer:
    """Answer GET /examples/{split}/{row}, of which `request` holds the split and the row.

    Raises:
        NoSuchRowError: the split has no such row.
    """
    split, row = request
    if (reason := why_absent(index, split, row)) is not None:
        raise NoSuchRowError("row", reason)
    kept = browsed(index)
    if split == "query" and row >= kept.queries.done:
        kept.queries.keep(row, kept.queries.outcome(row))
    return _row(index, kept.split(split), split, row, _rendering(index, split, row))


@each_alone
def list_examples(index: Index, request: tuple[Split, ExamplesRequest], waited_ms: float) -> ExamplesAnswer:
    """Answer GET /examples/{split}, of which `request` holds the split and the parameters.

    Raises:
        FieldError: a field names a row or a class that does not exist, or the rows have no text to search.
    """
    started, (split, asked) = time.perf_counter(), request
    kept = browsed(index)
    if split == "query":
        kept.begin(kept.queries, _needed(asked))
    known = kept.split(split)
    found = np.flatnonzero(_meeting(index, known, split, asked) & _holding(kept, split, asked.text))
    page = _ordered(found, known, asked.order)[asked.offset : asked.offset + asked.k].tolist()
    searched, search_ms = time.perf_counter(), milliseconds_since(started)
    renderings = [_rendering(index, split, row) if asked.render else None for row in page]
    pending, note = _missing(index, kept, split, asked)
    return ExamplesAnswer(
        split=split,
        generation=index.manifest.generation,
        rows_total=len(found),
        results=[_row(index, known, split, row, shown) for row, shown in zip(page, renderings, strict=True)],
        pending=pending,
        note=note,
        timing_ms=documents.timing(waited_ms, search=search_ms, render=milliseconds_since(searched)),
    )


def _needed(asked: ExamplesRequest) -> int | None:
    """Of how many query rows the outcomes must be known; None: of all, as they decide which rows are listed."""
    conditions = (asked.labels, asked.predictions, asked.correct, asked.min_loss, asked.max_loss, asked.text)
    listed_as_stored = asked.order == "row" and asked.rows is None
    return asked.offset + asked.k if listed_as_stored and all(condition is None for condition in conditions) else None


def _row(index: Index, known: SplitRows, split: Split, row: int, rendering: Payload | None) -> ExampleAnswer:
    label, prediction = known.label("label", row), known.label("prediction", row)
    return ExampleAnswer(
        split=split,
        row=row,
        label=label,
        label_name=index.task.label_name(label),
        prediction=prediction,
        prediction_name=index.task.label_name(prediction),
        loss=known.loss(row),
        correct=known.correct(row),
        example=rendering,
    )


def _rendering(index: Index, split: Split, row: int) -> Payload:
    render = rendered_rows(index)
    return render(row) if split == "train" else render.example(index.task.query[row])


def _meeting(index: Index, known: SplitRows, split: Split, asked: ExamplesRequest) -> Mask:
    """The rows that meet all conditions but that on the text. bool [rows]"""
    columns, mask = known.columns, np.array(known.present)
    for field, name in (("labels", "label"), ("predictions", "prediction")):
        if (classes := getattr(asked, field)) is not None:
            mask &= np.isin(columns[name], _numbers(field, classes, index.task))
    if asked.correct is not None:
        mask &= columns["correct"] == asked.correct
    if asked.min_loss is not None:
        mask &= columns["loss"] >= asked.min_loss
    if asked.max_loss is not None:
        mask &= columns["loss"] <= asked.max_loss
    if asked.rows is not None:
        mask &= _named_rows(index, split, asked.rows)
    return mask


def _named_rows(index: Index, split: Split, rows: Sequence[int]) -> Mask:
    size = split_size(index, split)
    for position, row in enumerate(rows):
        if row >= size:
            raise FieldError(f"rows[{position}]", why_absent(index, split, row) or "")
    mask = np.zeros(size, dtype=np.bool_)
    mask[list(rows)] = True
    return mask


def _numbers(field: str, classes: Sequence[float | str], task: Task) -> list[float]:
    names = {name: number for number, name in enumerate(task.class_names or ())}
    for position, name in enumerate(classes):
        if isinstance(name, str):
            if not names:
                raise FieldError(f"{field}[{position}]", "the classes of this task have no names: give a number")
            check_known(f"{field}[{position}]", name, names)
    return [names[name] if isinstance(name, str) else name for name in classes]


def _holding(kept: Browsed, split: Split, text: str | None) -> Mask:
    """The rows whose rendering has all words of a text; all where None is given. bool [rows]"""
    rows = len(kept.split(split).present)
    if text is None or not rows:
        return np.ones(rows, dtype=np.bool_)
    texts = kept.texts(split)
    if not texts.done and not texts.has_words():
        raise FieldError(
            "text", f"the {split} rows are shown without words, so there is nothing to search; leave it out"
        )
    kept.begin(texts)
    return texts.holding(text.split())


def _ordered(rows: NDArray[np.int64], known: SplitRows, order: str) -> NDArray[np.int64]:
    if order == "-row":
        return rows[::-1]
    if order == "row":
        return rows
    losses = known.columns["loss"][rows]  # NaN, which is unknown, is sorted to the end
    return rows[np.argsort(-losses if order == "-loss" else losses, kind="stable")]


def _missing(index: Index, kept: Browsed, split: Split, asked: ExamplesRequest) -> tuple[int, str | None]:
    """How many rows are not complete yet, and in words which ones may be missing."""
    pending, notes = 0, []
    if split == "query":
        pending = kept.queries.pending
        if not kept.queries.rows:
            notes.append("the task has no query data set")
        elif pending:
            notes.append(f"predictions and losses are known of the first {kept.queries.done:,} rows so far")
    if asked.text is not None and len(kept.split(split).present):
        texts = kept.texts(split)
        pending = max(pending, texts.pending)
        if texts.full:
            notes.append(f"only the first {texts.searched:,} rows were searched: more text is not kept")
        elif texts.pending:
            notes.append(f"the text of the first {texts.done:,} rows was searched so far")
    return pending, "; ".join(notes) or None
