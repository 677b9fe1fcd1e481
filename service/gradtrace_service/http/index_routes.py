"""The list of a service's indexes, over HTTP. It opens none of them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Annotated

from fastapi import APIRouter, Depends, Request

from gradtrace import Index
from gradtrace.errors import GradtraceError
from gradtrace.store.manifest import Manifest, read_manifest
from gradtrace_client.service_schemas import Indexes, IndexSummary
from gradtrace_service.http.problems import error_responses
from gradtrace_service.indexes.catalog import Catalog, Hosted

Summaries = Callable[[], list[IndexSummary]]

_log = logging.getLogger(__name__)

router = APIRouter()


def open_index_summary(index: Index) -> list[IndexSummary]:
    """Summary for a service over one open index."""
    return [_summary(None, index.manifest, loaded=True)]


def hosted_summaries(hosted: Sequence[Hosted], catalog: Catalog | None) -> list[IndexSummary]:
    """Summaries for a service over directories, from their manifests. catalog: None if the workers are processes"""
    return [
        _summary(index.name, _manifest(index), None if catalog is None else catalog.is_open(index.name))
        for index in hosted
    ]


def _manifest(hosted: Hosted) -> Manifest | None:
    try:
        return read_manifest(hosted.path)
    except GradtraceError as error:  # the other indexes are listed all the same
        _log.error("index %s: %s", hosted.name, error)
        return None


def _summary(name: str | None, manifest: Manifest | None, loaded: bool | None) -> IndexSummary:
    if manifest is None:
        return IndexSummary(name=name, generation=None, task=None, rows=None, loaded=loaded)
    task = manifest.task
    return IndexSummary(name=name, generation=manifest.generation, task=task.name, rows=task.train_rows, loaded=loaded)


def _summaries(request: Request) -> Summaries:
    summaries: Summaries = request.app.state.summaries
    return summaries


@router.get("/indexes", responses=error_responses(500))
def indexes(summaries: Annotated[Summaries, Depends(_summaries)]) -> Indexes:
    """The indexes that requests may name; the first is the default."""
    return Indexes(indexes=summaries())
