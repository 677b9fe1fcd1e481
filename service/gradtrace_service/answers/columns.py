"""Values of many rows at once, for charts and maps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic_core import to_json

from gradtrace import Index
from gradtrace.tasks.features import Cells, feature_cells, feature_names, in_memory
from gradtrace_client.browse_requests import ColumnsRequest
from gradtrace_client.request_schemas import FEATURE, SelfInfluenceRequest
from gradtrace_client.schemas import Split
from gradtrace_service.answers.browsed import Browsed, browsed
from gradtrace_service.answers.inputs import READ_ROWS, evenly
from gradtrace_service.answers.questions import check_known
from gradtrace_service.answers.rows import self_influence_of_all
from gradtrace_service.answers.split_rows import NAMES
from gradtrace_service.engine.work import each_alone

_SELF_INFLUENCE = "self_influence"
_AS_THEY_ARE = ("label", "prediction", "correct")  # others are of float32, of which eight digits tell all
_DIGITS = 8


@dataclass(frozen=True, slots=True)
class EncodedColumns:
    """body: a `ColumnsAnswer` in JSON: it is long, and the event loop has others to answer"""

    body: bytes
    pending: int


@each_alone
def columns(index: Index, request: tuple[Split, ColumnsRequest], waited_ms: float) -> EncodedColumns:
    """Answer GET /columns/{split}, of which `request` holds the split and the parameters.

    Raises:
        FieldError: there is no such column.
        GradtraceError: self-influence cannot be computed.
    """
    split, asked = request
    kept = browsed(index)
    if split == "query":
        kept.begin(kept.queries)
    present = np.flatnonzero(kept.split(split).present)
    _check_names(index, split, asked.names, present)
    rows = evenly(present, _most(index, split, asked))
    cells = _cells(index, kept, split, list(dict.fromkeys(asked.names)), rows)
    pending = kept.queries.pending if split == "query" else 0
    document = {
        "split": split,
        "generation": index.manifest.generation,
        "rows": rows.tolist(),
        "columns": {name: values if isinstance(values, list) else values.tolist() for name, values in cells.items()},
        "rows_total": len(present),
        "sampled": len(rows) < len(present),
        "pending": pending,
    }
    return EncodedColumns(to_json(document, inf_nan_mode="null"), pending)


def _check_names(index: Index, split: Split, names: Sequence[str], rows: NDArray[np.int64]) -> None:
    known = [*index.columns, _SELF_INFLUENCE] if split == "train" else list(NAMES)
    if len(rows) and any(name.startswith(FEATURE) for name in names):
        known += [FEATURE + name for name in feature_names(index.task, getattr(index.task, split), rows)]
    for position, name in enumerate(names if len(rows) else ()):
        check_known(f"names[{position}]", name, known)


def _most(index: Index, split: Split, asked: ColumnsRequest) -> int:
    features = any(name.startswith(FEATURE) for name in asked.names)
    read = features and not in_memory(index.task, getattr(index.task, split))
    return min(asked.k, READ_ROWS) if read else asked.k


def _cells(
    index: Index, kept: Browsed, split: Split, names: Sequence[str], rows: NDArray[np.int64]
) -> dict[str, Cells]:
    features = [name.removeprefix(FEATURE) for name in names if name.startswith(FEATURE)]
    dataset = getattr(index.task, split)
    of_features = feature_cells(index.task, dataset, rows, features) if features and len(rows) else {}
    return {name: _column(index, kept, split, name, rows, of_features) for name in names}


def _column(
    index: Index, kept: Browsed, split: Split, name: str, rows: NDArray[np.int64], features: dict[str, Cells]
) -> Cells:
    if not len(rows):
        return []
    if name.startswith(FEATURE):
        values = features[name.removeprefix(FEATURE)]
        return values if isinstance(values, list) else shortened(values)
    if name == _SELF_INFLUENCE:
        return shortened(self_influence_of_all(index, SelfInfluenceRequest())[rows].astype(np.float64))
    known = kept.split(split)
    values = known.columns[name][rows]
    if name == "correct":
        return [None if np.isnan(value) else bool(value) for value in values]
    if name in known.whole:
        return [None if np.isnan(value) else int(value) for value in values]
    return values if name in _AS_THEY_ARE else shortened(values)


def shortened(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The values rounded to eight significant digits: 0.1 in place of 0.10000000149011612, in half of the bytes."""
    known = np.isfinite(values) & (values != 0)
    exponents = np.zeros(len(values))
    exponents[known] = np.floor(np.log10(np.abs(values[known])))
    scale: NDArray[np.float64] = 10.0 ** np.clip(_DIGITS - 1 - exponents, -300, 300)
    return np.round(values * scale) / scale
