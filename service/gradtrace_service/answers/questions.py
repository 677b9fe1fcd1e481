"""What a request asks, in the library's terms; a field that names something that does not exist is refused."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, cast

from gradtrace import Index, RowFilter, Task
from gradtrace.errors import GradtraceError
from gradtrace.methods import METHODS, MethodOptions
from gradtrace.task import Example
from gradtrace_client.request_schemas import PairsRequest, Queries, Question
from gradtrace_client.schemas import Payload, Split
from gradtrace_service.errors import FieldError


@dataclass(frozen=True, slots=True)
class AskedExample:
    """field: where in the request it was given, such as `examples[2]`;  split, row: set where it was given by row"""

    example: Example
    field: str
    split: Split | None = None
    row: int | None = None


def check_names(index: Index, method: str, checkpoints: Sequence[str] | None) -> None:
    """Raises FieldError for a method that this index does not answer, or a checkpoint that it does not have."""
    lacking = METHODS[method].lacks(index.manifest) if method in METHODS else None
    if lacking is not None:
        raise FieldError("method", f"this index does not answer by {method!r}: {lacking}")
    check_known("method", method, index.methods)
    known = [entry.name for entry in index.manifest.checkpoints]
    for position, name in enumerate(checkpoints or ()):
        check_known(f"checkpoints[{position}]", name, known)


def check_known(field: str, name: str, known: Collection[str]) -> None:
    if name not in known:
        raise FieldError(field, f"there is no {name!r}; this index has {', '.join(known)}")


def queries_of(index: Index, request: Queries) -> list[AskedExample]:
    """The queries of a request. Raises FieldError for a row that does not exist or an example the task cannot read."""
    if request.train_rows is not None:
        return train_row_examples(index, request.train_rows)
    return queries_beside_training(index, request)


def queries_beside_training(index: Index, request: Queries | PairsRequest) -> list[AskedExample]:
    """Those given as examples or as rows of the query data. Raises as `queries_of`."""
    task = index.task
    if request.query_rows is not None:
        return row_examples("query", task.query, request.query_rows)
    if request.example is not None:
        return parsed_examples(task, [request.example], "example")
    return parsed_examples(task, request.examples or [], "examples")


def parsed_examples(task: Task, payloads: Sequence[Payload], field: str) -> list[AskedExample]:
    """Raises FieldError for an example that the task cannot read."""
    fields = [field] if field == "example" else [f"{field}[{at}]" for at in range(len(payloads))]
    return [AskedExample(parsed(task, payload, name), name) for payload, name in zip(payloads, fields, strict=True)]


def train_row_examples(index: Index, rows: Sequence[int]) -> list[AskedExample]:
    """Raises FieldError for a row of `train_rows` that is not there or was deleted."""
    examples = row_examples("train", index.task.train, rows)
    for position, row in enumerate(rows):
        if not index.present[row]:
            raise FieldError(f"train_rows[{position}]", absent_row(index, row))
    return examples


def row_examples(split: Split, dataset: Any, rows: Sequence[int]) -> list[AskedExample]:
    size = 0 if dataset is None else len(dataset)
    for position, row in enumerate(rows):
        if row >= size:
            raise FieldError(f"{split}_rows[{position}]", missing_row(split, row, size))
    return [AskedExample(dataset[row], f"{split}_rows[{at}]", split, row) for at, row in enumerate(rows)]


def absent_row(index: Index, row: int) -> str:
    reason = index.manifest.skipped.get(row)
    why = "was deleted from the index" if reason is None else f"is not in the index, which left bad rows out: {reason}"
    return f"row {row} of the training data {why}"


def missing_row(split: Split, row: int, size: int) -> str:
    if size == 0:
        return f"the task has no {split} data set; ask by example or by train_rows"
    return f"there is no row {row} in the {split} data set; its rows are 0 to {size - 1}"


def split_size(index: Index, split: Split) -> int:
    if split == "train":
        return index.rows
    return 0 if index.task.query is None else len(index.task.query)


def parsed(task: Task, payload: Payload, field: str) -> Example:
    try:
        return task.parse(payload)
    except GradtraceError as error:
        raise FieldError(field, str(error)) from error
    except Exception as error:  # whatever the user's parse raises on an unexpected payload
        raise FieldError(field, f"{type(task).__name__} cannot read it: {type(error).__name__}: {error}") from error


def options_of(request: Question) -> MethodOptions:
    return cast(MethodOptions, {name: getattr(request, name) for name in MethodOptions.__annotations__})


def row_filter_of(request: Queries) -> RowFilter | None:
    if request.filter is None:
        return None
    return RowFilter(**request.filter.model_dump(by_alias=True, exclude_none=True))
