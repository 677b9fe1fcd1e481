"""The generations of an index: one is current, one may be in the making, earlier ones are kept until pruned.

manifest.json is the current one, pending.json the one in the making, generations/{n}.json the earlier ones. Files are
never changed, and no two generations that were published have different files of the same name, so a reader of any
generation is not disturbed by those that follow.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gradtrace.checkpoints.second_moments import moments_path
from gradtrace.errors import CorruptIndexError, StoreError
from gradtrace.methods import lost_methods
from gradtrace.store.checksums import check_files
from gradtrace.store.manifest import MANIFEST_NAME, PENDING_NAME, Manifest, Operation, read_generation, read_manifest
from gradtrace_indexer.writing.files import sole_writer, write_file, write_manifest

_log = logging.getLogger(__name__)

_KEPT = "generations"
_FOLDERS = (
    "bases",
    "column_scales",
    "rows",
    "columns",
    "curvature",
    "kernels",
    "row_ids",
    "deleted",
    "searchers",
    "averages",
    "representations",
    "representer",
)  # nothing but files of generations is in these

# The others change which rows there are, of which kernels are sums.
_KEEPING_KERNELS: tuple[Operation, ...] = (
    "add checkpoints",
    "add run",
    "compact",
    "set searcher",
    "add kernels",
    "fit representer",
)

# They build the searcher again, as a generation of its own.
_BRINGING_SEARCHERS: tuple[Operation, ...] = ("add checkpoints", "add run", "append rows")


def successor(current: Manifest, operation: Operation, **changes: Any) -> Manifest:
    """The generation after the current one, begun: the same but for the given fields.

    What is derived from the rows and not carried along (a searcher's files) is to be dropped here, for every update.
    """
    kernels = current.kernels if operation in _KEEPING_KERNELS else None
    begun = {
        "generation": current.generation + 1,
        "complete": False,
        "made_by": operation,
        "kernels": kernels,
        **changes,
    }
    return current.model_copy(update=begun)


def save_pending(directory: Path, manifest: Manifest) -> Manifest:
    """Commit what an unfinished generation has so far, for a killed build or update to go on from."""
    return write_manifest(directory, PENDING_NAME, manifest)


def publish(directory: Path, manifest: Manifest) -> Manifest:
    """Make a generation the current one, keeping the one before, and log what it lost and how that comes back.

    Killed at any moment, either is current; a pending.json that is left is known by its generation.
    """
    path = directory / MANIFEST_NAME
    before = read_manifest(directory) if path.exists() else None
    if before is not None:
        write_file(directory, f"{_KEPT}/{manifest.generation - 1}.json", path.read_bytes())
    published = write_manifest(directory, MANIFEST_NAME, manifest.model_copy(update={"complete": True}))
    (directory / PENDING_NAME).unlink(missing_ok=True)
    for line in _losses(before, published) if before is not None else ():
        _log.warning("generation %d of %s %s", published.generation, directory, line)
    return published


def _losses(before: Manifest, after: Manifest) -> Iterator[str]:
    """What a generation does no longer, each with the command that brings it back."""
    for method, why in lost_methods(before, after).items():
        yield f"no longer answers by {method}: {why}"
    lost_searcher = after.searcher_is_stale() and before.searcher is not None and not before.searcher_is_stale()
    if after.searcher is not None and lost_searcher and after.made_by not in _BRINGING_SEARCHERS:
        yield f"no longer uses searcher {after.searcher.name}, which is of other rows: `gradtrace build` sets it again"


def read_pending(directory: Path) -> Manifest | None:
    """The generation in the making, if any.

    Raises:
        CorruptIndexError: it is damaged; `discard` helps.
    """
    if not (directory / PENDING_NAME).exists():
        return None
    pending = read_generation(directory, PENDING_NAME)
    published = read_manifest(directory).generation if (directory / MANIFEST_NAME).exists() else 0
    return pending if pending.generation > published else None


def unfinished(directory: Path) -> Manifest | None:
    """As `read_pending`, for the one writer: removes what a process left that was killed just after publishing."""
    pending = read_pending(directory)
    if pending is None:
        (directory / PENDING_NAME).unlink(missing_ok=True)
    return pending


@contextmanager
def updating(path: str | Path, operation: Operation) -> Iterator[tuple[Manifest, Manifest | None]]:
    """Be the only writer of an index; gives its current generation, and what this operation left unfinished before.

    Raises:
        StoreError: there is no index, another process is writing there, or another operation was left unfinished.
    """
    directory = Path(path)
    read_manifest(directory)  # where there is no index, say so before anything is made
    with sole_writer(directory):
        current, pending = read_manifest(directory), unfinished(directory)
        if pending is not None and pending.made_by != operation:
            raise StoreError(
                f"an unfinished update ({pending.made_by}) of {directory} is in the way: run it again to finish it, or "
                "give it up with `gradtrace discard`"
            )
        yield current, pending


def kept_generations(path: str | Path) -> list[Manifest]:
    """The earlier generations that are still there, the oldest first.

    Raises:
        CorruptIndexError: the manifest of one is damaged.
    """
    directory = Path(path)
    numbers = sorted(int(file.stem) for file in (directory / _KEPT).glob("*.json"))
    current = read_manifest(directory).generation
    return [read_generation(directory, f"{_KEPT}/{number}.json") for number in numbers if number < current]


def roll_back(path: str | Path, generation: int) -> Manifest:
    """Publish what an index was at an earlier generation as its next one. Returns the new manifest.

    Raises:
        StoreError: that generation was pruned, or never was, or an update is unfinished.
        CorruptIndexError: its files are damaged.
    """
    directory = Path(path)
    with updating(directory, "roll back") as (current, _):
        kept = {manifest.generation: manifest for manifest in kept_generations(directory)}
        if generation not in kept:
            there = ", ".join(map(str, kept)) or "none"
            raise StoreError(f"{directory} keeps no generation {generation}; earlier generations kept: {there}")
        problems = check_files(directory, kept[generation], deep=True)
        if problems:
            raise CorruptIndexError(
                f"generation {generation} of {directory} is damaged: {'; '.join(problems)}. Choose another"
            )
        again = kept[generation].model_copy(update={"generation": current.generation + 1, "made_by": "roll back"})
        return publish(directory, again)


def discard(path: str | Path) -> None:
    """Give up an unfinished build or update, and remove its files. The current generation stays as it is.

    Raises:
        StoreError: there is neither, or another process is writing there.
    """
    directory = Path(path)
    if not (directory / PENDING_NAME).exists():
        read_manifest(directory)
    with sole_writer(directory):
        (directory / PENDING_NAME).unlink(missing_ok=True)
        _sweep(directory)


def prune(path: str | Path, keep: int = 1) -> None:
    """Remove all generations but the last `keep`, the current one among them, and files that only those had.

    An Index that is open on a removed generation still answers on Linux and macOS, where a mapped file stays until it
    is closed; it cannot be opened again.

    Raises:
        StoreError: keep < 1, no index, or another process is writing there.
    """
    directory = Path(path)
    if keep < 1:
        raise StoreError(f"keep must be at least 1, the current generation; not {keep}")
    read_manifest(directory)
    with sole_writer(directory):
        for manifest in kept_generations(directory)[::-1][keep - 1 :]:
            (directory / _KEPT / f"{manifest.generation}.json").unlink()
        _sweep(directory)


def _sweep(directory: Path) -> None:
    """Remove the files that no generation names, also those of killed processes."""
    pending = read_pending(directory)
    generations = [] if pending is None else [pending]
    if (directory / MANIFEST_NAME).exists():
        generations += [read_manifest(directory), *kept_generations(directory)]
    named = {entry.path for manifest in generations for entry in manifest.files()}
    averages = [Path(e.file) for manifest in generations for e in manifest.checkpoints if e.kind == "average"]
    named |= {file.as_posix() for average in averages for file in (average, moments_path(average))}
    found = [path for folder in _FOLDERS for path in (directory / folder).rglob("*") if path.is_file()]
    for path in found:
        if path.relative_to(directory).as_posix() not in named:
            path.unlink(missing_ok=True)
