"""What the service tells of its indexes without opening them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from gradtrace.store.manifest import Manifest
from gradtrace_client.service_schemas import IndexSummary
from gradtrace_service.indexes.hosted import Hosted

Summaries = Callable[[], list[IndexSummary]]


def summaries(hosted: Sequence[Hosted], states: Callable[[], Mapping[str, bool | None]]) -> list[IndexSummary]:
    """What the manifests say, without opening an index. states: as of `Engine`"""
    loaded = states()
    return [summary(index.name, index.manifest(), bool(loaded.get(index.name))) for index in hosted]


def summary(name: str | None, manifest: Manifest | None, loaded: bool) -> IndexSummary:
    if manifest is None:
        return IndexSummary(name=name, generation=None, task=None, rows=None, loaded=loaded)
    task = manifest.task
    return IndexSummary(name=name, generation=manifest.generation, task=task.name, rows=task.train_rows, loaded=loaded)
