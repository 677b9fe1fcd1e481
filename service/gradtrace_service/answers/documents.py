"""Parts that several answers have in common, filled from the library's results; among them what the numbers mean."""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
from pydantic import BaseModel

import gradtrace
from gradtrace import Index, Task
from gradtrace.methods import METHODS, MethodOptions
from gradtrace.methods.sparse_scoring import QUERY_COORDINATES
from gradtrace.store.manifest import FisherEntry
from gradtrace_client import schemas
from gradtrace_client.request_schemas import Question
from gradtrace_client.schemas import IndexInfo, Timing
from gradtrace_service.answers.questions import options_of
from gradtrace_service.answers.rendering import Renderer

Schema = TypeVar("Schema", bound=BaseModel)

_COMPRESSED = "; computed in the index's compressed coordinates"
_SPARSE = f"; computed in the strongest weights of each row, and the {QUERY_COORDINATES:,} strongest of the query"
_FULL = "; computed from full gradients, for rows that the search in the index's compressed coordinates found"
_LIMITS = " It is not a forecast of what removing the row would do."


def document(schema: type[Schema], result: object, **fields: Any) -> Schema:
    """Fill a wire schema from `fields` and, for those not given, from the attributes of a library's result."""
    shared = {name: getattr(result, name) for name in schema.model_fields if hasattr(result, name)}
    return schema.model_validate({**shared, **fields}, from_attributes=True)


def hit(task: Task, result: gradtrace.Hit, render: Renderer, parts: bool = False) -> schemas.Hit:
    """parts: whether it carries the score's parts by checkpoint"""
    names = class_names(task, result)
    return document(schemas.Hit, result, **names, parts=result.parts if parts else None, example=render(result.row))


def class_names(task: Task, result: gradtrace.Hit | gradtrace.InfluenceResult) -> dict[str, str | None]:
    return {"label_name": task.label_name(result.label), "prediction_name": task.label_name(result.prediction)}


def probabilities(task: Task, result: gradtrace.InfluenceResult) -> list[schemas.ClassProbability] | None:
    if result.probabilities is None:
        return None
    return [document(schemas.ClassProbability, p, label_name=task.label_name(p.label)) for p in result.probabilities]


def head(index: Index, request: Question, rescored: bool = False) -> dict[str, Any]:
    """The fields of every answer about scores: which index, which method, and what its numbers mean."""
    fisher, sparse = index.manifest.fisher, index.manifest.basis.is_sparse
    meaning = convention(request.method, options_of(request), rescored, fisher, sparse)
    return {"index": index_info(index), "method": request.method, "convention": meaning}


def convention(
    method: str,
    options: MethodOptions | None = None,
    rescored: bool = False,
    fisher: FisherEntry | None = None,
    sparse: bool = False,
) -> str:
    """Sign and unit of a method's scores, in words.

    fisher: what the curvature of the index is, see its manifest;  sparse: whether rows keep weights of their own
    """
    scored_by = METHODS[method]
    computed = _FULL if rescored else _SPARSE if sparse else _COMPRESSED
    computed = computed if scored_by.compares_gradients else ""
    curvature = f" Curvature: {fisher.sentence}." if scored_by.uses_curvature and fisher is not None else ""
    limits = "" if scored_by.forecasts else _LIMITS
    return f"{scored_by.sign}{scored_by.meaning_with(options or MethodOptions())}{computed}.{limits}{curvature}"


def timing(waited_ms: float, batch: int = 1, gradient: float = 0.0, search: float = 0.0, render: float = 0.0) -> Timing:
    """Milliseconds of stages that follow each other, and their sum."""
    total = waited_ms + gradient + search + render
    return Timing(queue=waited_ms, batch=batch, gradient=gradient, search=search, render=render, total=total)


def index_info(index: Index) -> IndexInfo:
    """Which index it is; nothing about where it lies."""
    manifest = index.manifest
    return document(
        IndexInfo,
        manifest,
        task=manifest.task.name,
        rows=index.rows,
        deleted=index.rows - int(np.count_nonzero(index.present)),
        dimensions=manifest.basis.dimensions,
        basis=manifest.basis.kind,
        verified=index.verified,
    )
