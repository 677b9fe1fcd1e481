"""What the service tells of its indexes without opening them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from gradtrace.store.manifest import Manifest
from gradtrace_client.service_schemas import IndexSummary
from gradtrace_service.engine.engine import Engine
from gradtrace_service.indexes.history import present_rows
from gradtrace_service.indexes.hosted import Hosted

Summaries = Callable[[], list[IndexSummary]]


def summaries(hosted: Sequence[Hosted], engine: Engine) -> list[IndexSummary]:
    """What the manifests say, without opening an index."""
    loaded, openings = engine.states(), engine.openings()
    return [
        summary(
            index.name,
            index.manifest(),
            bool(loaded.get(index.name)),
            openings[index.name].seconds if index.name in openings else None,
        )
        for index in hosted
    ]


def summary(
    name: str | None, manifest: Manifest | None, loaded: bool, opening_seconds: float | None = None
) -> IndexSummary:
    known = {"name": name, "loaded": loaded, "opening_seconds": opening_seconds}
    if manifest is None:
        return IndexSummary(generation=None, task=None, rows=None, **known)
    task = manifest.task
    deleted = task.train_rows - present_rows(manifest)
    return IndexSummary(generation=manifest.generation, task=task.name, rows=task.train_rows, deleted=deleted, **known)
