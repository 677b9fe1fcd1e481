"""Reading a manifest: its size, its format, its schema, its checksum, and whether the index can be."""

from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

import xxhash
from pydantic import BaseModel, Field, ValidationError

from gradtrace.errors import CorruptIndexError, IncompleteIndexError, StoreError
from gradtrace.store.manifest import FORMAT_VERSION, MANIFEST_NAME, OLDEST_FORMAT, PENDING_NAME, Manifest
from gradtrace.store.manifest_checks import manifest_problems
from gradtrace.store.regular_files import regular_path, shortened

_LARGEST_MANIFEST = 64 << 20  # bytes; a shard takes 600
_NAMED_PROBLEMS = 5
_RESTORE = "restore it from a copy, or rebuild the index"


def read_manifest(directory: Path) -> Manifest:
    """Read and validate `directory/manifest.json`, the current generation.

    Raises:
        StoreError: no manifest there, or one of another format version.
        IncompleteIndexError: the first build was interrupted.
        CorruptIndexError: the manifest is damaged, or describes no index that can be.
    """
    if not os.path.lexists(directory / MANIFEST_NAME) and os.path.lexists(directory / PENDING_NAME):
        raise IncompleteIndexError(
            f"the build of {directory} was interrupted; run it again with the same arguments to resume"
        )
    manifest = read_generation(directory, MANIFEST_NAME)
    if not manifest.complete:
        raise CorruptIndexError(f"{directory / MANIFEST_NAME} is that of an unfinished generation: {_RESTORE}")
    return manifest


def read_generation(directory: Path, name: str) -> Manifest:
    """Read and validate the manifest in one of an index's files. Raises as `read_manifest`."""
    path = directory / name
    content = _content(directory, name)
    _check_format(path, content)
    try:
        manifest = Manifest.model_validate_json(content)
    except ValidationError as error:
        raise CorruptIndexError(f"{path} is damaged ({_first_error(error)}): {_RESTORE}") from None
    blank = content.replace(b'"checksum": "%b"' % manifest.checksum.encode(), b'"checksum": ""')
    if xxhash.xxh3_128_hexdigest(blank) != manifest.checksum:
        raise CorruptIndexError(f"{path} is damaged: its checksum does not match its content: {_RESTORE}")
    if problems := manifest_problems(manifest):
        more = f"; and {len(problems) - _NAMED_PROBLEMS} more" if len(problems) > _NAMED_PROBLEMS else ""
        text = "; ".join(problems[:_NAMED_PROBLEMS]) + more
        raise CorruptIndexError(f"{path} describes an index that cannot be: {text}. It was changed: {_RESTORE}")
    return manifest


def _content(directory: Path, name: str) -> bytes:
    """Raises StoreError where it is missing or cannot be read, or CorruptIndexError where it can be no manifest."""
    path = regular_path(directory, name)
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST_MANIFEST + 1)
    except (FileNotFoundError, NotADirectoryError):
        raise StoreError(f"no index at {directory}: {name} is missing; build one with `gradtrace build`") from None
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror}") from error
    if len(content) > _LARGEST_MANIFEST:
        raise CorruptIndexError(f"{path} has more than {_LARGEST_MANIFEST >> 20} MB, which no manifest has: {_RESTORE}")
    return content


class _Header(BaseModel):
    """What tells formats apart: a manifest of another one may have anything else."""

    format: int = Field(strict=True)
    libraries: dict[str, Any] = {}


def _check_format(path: Path, content: bytes) -> None:
    """Raises StoreError for a manifest of another format; a damaged one passes: its validation says where."""
    try:
        header = _Header.model_validate_json(content)
    except ValidationError:
        return
    if OLDEST_FORMAT <= header.format <= FORMAT_VERSION:
        return
    age = "an older" if header.format < FORMAT_VERSION else "a newer"
    builder = header.libraries.get("gradtrace")
    by = f", built by Gradtrace {builder[:40]}" if isinstance(builder, str) else ""
    raise StoreError(
        f"{path} has format {header.format}, {age} one{by}; Gradtrace {version('gradtrace')} reads formats "
        f"{OLDEST_FORMAT} to {FORMAT_VERSION}: rebuild the index with this release, or open it with the release that "
        "built it"
    )


def _first_error(error: ValidationError) -> str:
    """Where a manifest differs from the schema: the first place, and how many there are."""
    first, *others = error.errors(include_url=False, include_context=False, include_input=False)
    place = shortened(".".join(map(str, first["loc"])))
    return (f"{place}: " if place else "") + first["msg"] + (f"; and {len(others)} more" if others else "")
