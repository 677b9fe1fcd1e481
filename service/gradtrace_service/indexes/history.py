"""The generations of an index, from its directory: also where it cannot be opened, and is to be rolled back."""

from __future__ import annotations

import contextlib
from datetime import datetime, timezone
from pathlib import Path

from gradtrace.errors import StoreError
from gradtrace.store.manifest import MANIFEST_NAME, Manifest
from gradtrace.store.manifest_file import read_manifest
from gradtrace_client.service_schemas import Generation, Generations
from gradtrace_indexer.generations import earlier_generations
from gradtrace_indexer.writing.format_files import KEPT
from gradtrace_service.engine.work import IndexUnavailableError

_ID_BYTES = 8  # of a deleted row in its file


def generations(directory: Path) -> Generations:
    """Answer GET /generations. Raises IndexUnavailableError where the current manifest cannot be read."""
    try:
        current, earlier = read_manifest(directory), earlier_generations(directory)
    except StoreError as error:
        raise IndexUnavailableError(str(error)) from error
    published = _modified(directory / MANIFEST_NAME)
    kept = [_earlier(directory, number, manifest) for number, manifest in reversed(earlier.items())]
    return Generations(generations=[_described(current, published, current=True), *kept])


def _earlier(directory: Path, number: int, manifest: Manifest | StoreError) -> Generation:
    # The one before it was put among the earlier ones when it was published.
    published = _modified(directory / KEPT / f"{number - 1}.json")
    if isinstance(manifest, StoreError):
        problem = "its manifest is damaged: `gradtrace verify --all` says how"
        unknown = {"rows": None, "checkpoints": None, "problem": problem}
        return Generation(generation=number, created=published, current=False, **unknown)
    return _described(manifest, _last_written(directory, manifest) if number == 1 else published, current=False)


def present_rows(manifest: Manifest) -> int:
    """How many rows answers may name."""
    deleted = 0 if manifest.deleted is None else manifest.deleted.bytes // _ID_BYTES
    return manifest.rows - deleted


def _described(manifest: Manifest, published: datetime | None, current: bool) -> Generation:
    return Generation(
        generation=manifest.generation,
        created=published,
        rows=present_rows(manifest),
        checkpoints=len(manifest.checkpoints),
        current=current,
        reason=manifest.made_by,
    )


def _last_written(directory: Path, manifest: Manifest) -> datetime | None:
    """When the last of a generation's files was written: of the first one, all are its own."""
    return max((time for file in manifest.files() if (time := _modified(directory / file.path))), default=None)


def _modified(path: Path) -> datetime | None:
    with contextlib.suppress(OSError):
        return datetime.fromtimestamp(path.stat().st_mtime, timezone.utc)
    return None
