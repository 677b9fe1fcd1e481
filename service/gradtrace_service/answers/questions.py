"""What a request asks, in the library's terms; a field that names something that does not exist is refused."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np

from gradtrace import Index, RowFilter, Task
from gradtrace.errors import GradtraceError, QueryError
from gradtrace.methods import METHODS, MethodOptions
from gradtrace.models.targets import Target
from gradtrace.task import Example
from gradtrace.tasks.payload import listed, shown
from gradtrace_client.request_schemas import LabelTarget, PairsRequest, Queries, Question, ScoresQuestion
from gradtrace_client.schemas import Payload, Split
from gradtrace_client.service_schemas import LONGEST_DETAIL, shortened
from gradtrace_service.engine.work import is_out_of_memory
from gradtrace_service.errors import FieldError

_READING_SECONDS = 5.0  # of the processor, for the examples of a request: they are bounded singly, by their tasks


@dataclass(frozen=True, slots=True)
class AskedExample:
    """field: where in the request it was given, such as `examples[2]`;  split, row: set where it was given by row"""

    example: Example
    field: str
    split: Split | None = None
    row: int | None = None


def check_names(index: Index, method: str, checkpoints: Sequence[str] | None) -> None:
    """Raises FieldError for a method that this index does not answer, or a checkpoint that it does not have."""
    lacking = index.lacks(method) if method in METHODS else None
    if lacking is not None:
        raise FieldError("method", f"this index does not answer by {method!r}: {lacking}")
    check_known("method", method, index.methods)
    known = {entry.name: None for entry in index.manifest.checkpoints}  # in their order
    for position, name in enumerate(checkpoints or ()):
        check_known(f"checkpoints[{position}]", name, known)


def check_prefilter(index: Index, prefilter: str | None) -> None:
    """Raises FieldError where this index does not answer by it."""
    if prefilter is not None and (lacking := index.lacks(prefilter)) is not None:
        raise FieldError("prefilter", f"this index does not answer by {prefilter!r}: {lacking}")


def check_known(field: str, name: str, known: Collection[str]) -> None:
    if name not in known:
        raise FieldError(field, f"there is no {shown(name)}; this index has {listed(known)}")


def queries_of(index: Index, request: ScoresQuestion | PairsRequest) -> list[AskedExample]:
    """The queries of a request. Raises FieldError for a row that does not exist or an example the task cannot read."""
    if request.query_rows is not None:
        return row_examples(index, "query", request.query_rows)
    if request.train_rows is not None and isinstance(request, ScoresQuestion):  # those of pairs are the other side
        return row_examples(index, "train", request.train_rows)
    if request.example is not None:
        return parsed_examples(index.task, [request.example], "example")
    return parsed_examples(index.task, request.examples or [], "examples")


def parsed_examples(task: Task, payloads: Sequence[Payload], field: str) -> list[AskedExample]:
    """Raises FieldError for an example that the task cannot read, or if reading all of them takes too long."""
    fields = [field] if field == "example" else [f"{field}[{at}]" for at in range(len(payloads))]
    examples, started = [], time.thread_time()
    for payload, name in zip(payloads, fields, strict=True):
        if time.thread_time() - started > _READING_SECONDS:
            raise FieldError(name, f"reading those before it took {_READING_SECONDS} s; send fewer at a time")
        try:
            examples.append(AskedExample(task.parse(payload), name))
        except Exception as error:  # whatever the user's parse raises on an unexpected payload
            if is_out_of_memory(error):
                raise
            raw = f"{type(task).__name__} cannot read it: {type(error).__name__}: {error}"
            detail = str(error) if isinstance(error, GradtraceError) else raw
            raise FieldError(name, shortened(detail, LONGEST_DETAIL)) from error
    return examples


def row_examples(index: Index, split: Split, rows: Sequence[int]) -> list[AskedExample]:
    """Raises FieldError for a row that is not there or was deleted."""
    for position, row in enumerate(rows):
        if (reason := why_absent(index, split, row)) is not None:
            raise FieldError(f"{split}_rows[{position}]", reason)
    dataset = getattr(index.task, split)
    return [AskedExample(dataset[row], f"{split}_rows[{at}]", split, row) for at, row in enumerate(rows)]


def check_rows(index: Index, field: str, rows: Sequence[int]) -> None:
    """Raises FieldError for a training row that is not there or was deleted. In one look, since they may be many."""
    numbers = np.asarray(rows, dtype=np.int64)
    absent = numbers >= index.rows
    absent[~absent] = ~index.present[numbers[~absent]]
    if absent.any():
        first = int(absent.argmax())
        raise FieldError(f"{field}[{first}]", str(why_absent(index, "train", rows[first])))


def why_absent(index: Index, split: Split, row: int) -> str | None:
    """Why a row of a data set cannot be asked about; None where it can."""
    size = split_size(index, split)
    if size == 0:
        return f"the task has no {split} data set; ask by example or by train_rows"
    if row >= size:
        return f"there is no row {row} in the {split} data set; its rows are 0 to {size - 1}"
    if split == "query" or index.present[row]:
        return None
    reason = index.manifest.skipped.get(row)
    why = "was deleted from the index" if reason is None else f"is not in the index, which left bad rows out: {reason}"
    return f"row {row} of the training data {why}"


def split_size(index: Index, split: Split) -> int:
    if split == "train":
        return index.rows
    return 0 if index.task.query is None else len(index.task.query)


def options_of(request: Question) -> MethodOptions:
    return cast(MethodOptions, {name: getattr(request, name) for name in MethodOptions.__annotations__})


def target_of(index: Index, request: ScoresQuestion | PairsRequest) -> Target | None:
    """Raises FieldError for a target that names no label of this index, or that its task or method does not have."""
    target = request.target
    given = target.model_dump(exclude_none=True) if isinstance(target, LabelTarget) else target
    try:
        index.check_target(request.method, given)
    except QueryError as error:
        raise FieldError("target", str(error)) from error
    return given


def row_filter_of(request: Queries) -> RowFilter | None:
    if request.filter is None:
        return None
    return RowFilter(**request.filter.model_dump(by_alias=True, exclude_none=True))
