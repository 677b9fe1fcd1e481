"""The files of the index format as they lie in a directory: which there are, and removing them.

Nothing else is ever removed: no file with a name that the format does not give, no folder, nothing behind a symbolic
link.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from gradtrace.durable import final_name
from gradtrace.errors import StoreError
from gradtrace.store.manifest import MANIFEST_NAME, PENDING_NAME
from gradtrace.store.regular_files import path_problem

KEPT = "generations"  # folder of the manifests of earlier generations

_KEPT_NAME = r"[1-9]\d*\.json"
_GENERATION = r"(?P<generation>[1-9]\d*)"
_SHARD = rf".+/\d{{9,}}\.{_GENERATION}"
# Of the files in each folder, relative to it; all of these belong to generations.
_NAMES = {
    "bases": rf"\d+\.{_GENERATION}\.safetensors",
    "column_scales": rf"\d+\.{_GENERATION}\.safetensors",
    "rows": rf"{_SHARD}\.rows",
    "columns": rf"{_SHARD}\.parquet",
    "curvature": rf".+\.{_GENERATION}\.safetensors",
    "kernels": rf".+\.{_GENERATION}\.safetensors",
    "row_ids": rf"{_GENERATION}\.ids",
    "deleted": rf"{_GENERATION}\.ids",
    "searchers": rf"[A-Za-z0-9-]+\.{_GENERATION}",
    "averages": r"steps-\d{9,}-\d{9,}-[0-9a-f]{8}(\.optimizer)?\.safetensors",
    "representations": rf"{_SHARD}\.rows",
    "representer": rf"{_GENERATION}\.safetensors",
    "unfinished": r"[1-9]\d*/.+\.(json|done|safetensors|claim(\.[0-9a-f]{8})?)",
}

_MANIFEST = re.compile(rf"{re.escape(MANIFEST_NAME)}|{re.escape(PENDING_NAME)}|{KEPT}/{_KEPT_NAME}")


def format_files(directory: Path) -> Iterator[str]:
    """The regular files of generations that lie in an index, as the manifest would name them, and what killed processes
    left under temporary names. Manifests themselves are left out."""
    for folder, pattern in _NAMES.items():
        names = re.compile(pattern)
        for inner in _regular_files(directory / folder):
            if names.fullmatch(final_name(inner)):
                yield f"{folder}/{inner}"
    beside = (path.name for path in directory.iterdir() if path.is_file() and not path.is_symlink())
    for name in [*sorted(beside), *(f"{KEPT}/{name}" for name in _regular_files(directory / KEPT))]:
        if is_temporary(name) and _MANIFEST.fullmatch(final_name(name)):
            yield name


def written_by(name: str) -> int | None:
    """The number of the generation that wrote a file of `format_files`; None if its name does not tell."""
    folder, _, inner = name.partition("/")
    match = re.fullmatch(_NAMES.get(folder, ""), inner)
    return int(match["generation"]) if match and "generation" in match.groupdict() else None


def is_temporary(name: str) -> bool:
    """Whether a file was never finished: no generation names it."""
    return final_name(name) != name


def remove_temporary_files(directory: Path) -> None:
    """Remove what killed processes left under temporary names. Raises StoreError where a file cannot be removed."""
    for name in list(format_files(directory)):
        if is_temporary(name):
            remove_file(directory, name)


def kept_numbers(directory: Path) -> list[int]:
    """The numbers of the manifests in generations/, ascending; whatever else lies there is passed over."""
    return sorted(int(name[:-5]) for name in _regular_files(directory / KEPT) if re.fullmatch(_KEPT_NAME, name))


def remove_file(directory: Path, name: str) -> None:
    """Remove a regular file of an index. One that is missing or something else by now is passed over.

    Raises:
        StoreError: it cannot be removed.
    """
    try:
        if path_problem(directory, name) is None:
            (directory / name).unlink(missing_ok=True)
    except OSError as error:
        raise StoreError(f"{directory / name} cannot be removed: {error.strerror}; check the directory") from error


def remove_manifest(directory: Path, name: str) -> None:
    """Remove the manifest of this name in an index's directory. Where it is a link, the link is removed.

    Raises:
        StoreError: it cannot be removed, such as a directory.
    """
    try:
        (directory / name).unlink(missing_ok=True)
    except OSError as error:
        raise StoreError(f"{directory / name} cannot be removed: {error.strerror}; remove it yourself") from error


def _regular_files(folder: Path) -> Iterator[str]:
    """Paths relative to a folder of all regular files below it that are reached through no link; sorted."""
    if folder.is_symlink():
        return
    for parent, folders, files in os.walk(folder):  # does not follow links to folders
        folders.sort()
        for name in sorted(files):
            path = Path(parent, name)
            if path.is_file() and not path.is_symlink():
                yield path.relative_to(folder).as_posix()
