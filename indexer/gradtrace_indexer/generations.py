"""The generations of an index: one is current, one may be unfinished, earlier ones are kept until pruned.

manifest.json is the current one, pending.json the unfinished one, generations/{n}.json the earlier ones. Files are
never changed, and no two published generations have different files of the same name, so later generations do not
disturb the readers of an earlier one.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gradtrace.checkpoints.second_moments import moments_path
from gradtrace.errors import CorruptIndexError, StoreError
from gradtrace.methods import METHODS, available_methods
from gradtrace.store.index_files import check_files, file_problems
from gradtrace.store.manifest import MANIFEST_NAME, PENDING_NAME, Manifest, Operation
from gradtrace.store.manifest_file import read_generation, read_manifest
from gradtrace_indexer.work.board import UNFINISHED, Board, remove_steps
from gradtrace_indexer.writing.files import sole_writer, write_file, write_manifest
from gradtrace_indexer.writing.format_files import (
    KEPT,
    format_files,
    is_temporary,
    kept_numbers,
    remove_file,
    remove_manifest,
    remove_temporary_files,
    written_by,
)

_log = logging.getLogger(__name__)

# These change the set of rows, of which kernels are sums.
_DROPPING_KERNELS: tuple[Operation, ...] = ("append rows", "delete rows")

# After these the searcher is built again, as a generation of its own.
_REBUILDING_SEARCHERS: tuple[Operation, ...] = ("add checkpoints", "add run", "append rows")


def successor(current: Manifest, operation: Operation, **changes: Any) -> Manifest:
    """The unfinished generation after the current one, which it copies except for the given fields.

    What is derived from the rows and made stale by an operation is dropped here, for every update: kernels, and the
    representations at checkpoints that are no longer the last of their run.
    """
    kernels = None if operation in _DROPPING_KERNELS else current.kernels
    fixed = {"generation": current.generation + 1, "complete": False, "made_by": operation, "kernels": kernels}
    after = current.model_copy(update=fixed | changes)
    shards = [
        shard if shard.checkpoint in after.represented else shard.model_copy(update={"representations": None})
        for shard in after.shards
    ]
    return after.model_copy(update={"shards": shards})


def save_pending(directory: Path, manifest: Manifest) -> Manifest:
    """Commit what an unfinished generation has so far, for a killed build or update to resume from."""
    return write_manifest(directory, PENDING_NAME, manifest)


def publish(directory: Path, manifest: Manifest) -> Manifest:
    """Make a generation the current one, keep the one before, and log what is lost and how to restore it.

    A kill at any moment leaves one of them current; a pending.json that is left over is of no newer generation.
    """
    path = directory / MANIFEST_NAME
    before = read_manifest(directory) if path.exists() else None
    if before is not None:
        write_file(directory, f"{KEPT}/{manifest.generation - 1}.json", path.read_bytes())
    published = write_manifest(directory, MANIFEST_NAME, manifest.model_copy(update={"complete": True}))
    remove_manifest(directory, PENDING_NAME)
    remove_temporary_files(directory)
    for line in _losses(before, published) if before is not None else ():
        _log.warning("generation %d of %s %s", published.generation, directory, line)
    return published


def lost_methods(before: Manifest, after: Manifest) -> dict[str, str]:
    """The methods that an earlier generation has and a later one lacks, with the reason and the remedy."""
    lacking = {name: METHODS[name].lacks(after) for name in available_methods(before)}
    return {name: reason for name, reason in lacking.items() if reason is not None}


def _losses(before: Manifest, after: Manifest) -> Iterator[str]:
    """What a generation no longer does, each with the command that restores it."""
    for method, reason in lost_methods(before, after).items():
        yield f"no longer answers by {method}: {reason}"
    lost_searcher = after.searcher_is_stale() and before.searcher is not None and not before.searcher_is_stale()
    if after.searcher is not None and lost_searcher and after.made_by not in _REBUILDING_SEARCHERS:
        yield f"no longer uses searcher {after.searcher.name}, which is of other rows: `gradtrace build` sets it again"


def read_pending(directory: Path) -> Manifest | None:
    """The unfinished generation, if any.

    Raises:
        StoreError: it is damaged (CorruptIndexError) or of another format; `discard` helps.
    """
    if not os.path.lexists(directory / PENDING_NAME):
        return None
    try:
        pending = read_generation(directory, PENDING_NAME)
    except StoreError as error:
        raise type(error)(f"{error}. Or give up what is unfinished, with `gradtrace discard`") from error
    published = read_manifest(directory).generation if (directory / MANIFEST_NAME).exists() else 0
    return pending if pending.generation > published else None


def unfinished(directory: Path) -> Manifest | None:
    """As `read_pending`, for the only writer: removes what is left of a process that was killed after publishing."""
    pending = read_pending(directory)
    if pending is None:
        remove_manifest(directory, PENDING_NAME)
        if (directory / MANIFEST_NAME).exists():
            remove_steps(directory)
    return pending


@contextmanager
def updating(path: str | Path, operation: Operation) -> Iterator[tuple[Manifest, Manifest | None]]:
    """Be the only writer of an index; yields its current generation, and what this operation left unfinished before.

    Raises:
        StoreError: there is no index, another process is writing there, another operation was left unfinished, or
            (CorruptIndexError) a file of the current generation is missing or truncated.
    """
    directory = Path(path)
    read_manifest(directory)  # refuses a directory without an index before anything is created in it
    with sole_writer(directory):
        current, pending = read_manifest(directory), unfinished(directory)
        if pending is not None and pending.made_by != operation:
            raise StoreError(
                f"an unfinished update ({pending.made_by}) of {directory} is in the way: run it again to finish it, or "
                "give it up with `gradtrace discard`"
            )
        _check_sizes(directory, current, operation)
        yield current, pending


def _check_sizes(directory: Path, current: Manifest, operation: Operation) -> None:
    """Raises CorruptIndexError where a file that the next generation would name is missing or has another size."""
    if operation == "roll back":  # the way out
        return
    kept = current.model_copy(update={"searcher": None}) if operation == "set searcher" else current
    checked = file_problems(directory, [(entry, False) for entry in kept.files()])
    if problems := [problem for problem in checked if problem is not None]:
        raise CorruptIndexError(
            f"{directory} is damaged: {'; '.join(problems[:5])}. Restore the files, roll back to an earlier "
            "generation, or rebuild the index"
        )


def earlier_generations(path: str | Path) -> dict[int, Manifest | StoreError]:
    """The earlier generations that were not pruned by their numbers, the oldest first; or why one cannot be read."""
    directory = Path(path)
    current, earlier = read_manifest(directory).generation, dict[int, Manifest | StoreError]()
    for number in kept_numbers(directory):
        if number < current:
            try:
                manifest = earlier[number] = read_generation(directory, f"{KEPT}/{number}.json")
                if manifest.generation != number or not manifest.complete:
                    raise CorruptIndexError(f"{directory}/{KEPT}/{number}.json is not the manifest of that generation")
            except StoreError as error:
                earlier[number] = error
    return earlier


def kept_generations(path: str | Path) -> list[Manifest]:
    """The earlier generations that were not pruned, the oldest first. Those whose manifest is damaged are left out.

    Raises:
        StoreError: there is no index, or its current manifest is damaged.
    """
    return [manifest for manifest in earlier_generations(path).values() if isinstance(manifest, Manifest)]


def roll_back(path: str | Path, generation: int) -> Manifest:
    """Publish an earlier generation again, as the next one. Returns the new manifest.

    Raises:
        StoreError: that generation was pruned or never existed, or an update is unfinished.
        CorruptIndexError: its manifest or its files are damaged.
    """
    directory = Path(path)
    with updating(directory, "roll back") as (current, _):
        kept = earlier_generations(directory)
        if generation not in kept:
            numbers = ", ".join(map(str, kept)) or "none"
            raise StoreError(f"{directory} keeps no generation {generation}; earlier generations kept: {numbers}")
        manifest = kept[generation]
        problems = [str(manifest)] if isinstance(manifest, StoreError) else check_files(directory, manifest, deep=True)
        if isinstance(manifest, StoreError) or problems:
            raise CorruptIndexError(
                f"generation {generation} of {directory} is damaged: {'; '.join(problems)}. Choose another"
            )
        again = manifest.model_copy(update={"generation": current.generation + 1, "made_by": "roll back"})
        return publish(directory, again)


def discard(path: str | Path) -> None:
    """Give up an unfinished build or update, and remove its files. The current generation stays as it is.

    Raises:
        StoreError: there is no index and no unfinished build, another process is writing there, or a file cannot be
            removed.
    """
    directory = Path(path)
    if not os.path.lexists(directory / PENDING_NAME) and not (directory / UNFINISHED).is_dir():
        read_manifest(directory)
    with sole_writer(directory):
        remove_manifest(directory, PENDING_NAME)
        _sweep(directory)


def prune(path: str | Path, keep: int = 1) -> None:
    """Remove all generations but the last `keep`, which include the current one, and the files that only they name.

    Files whose names the format does not give are left alone, and so is what a symbolic link points to. An Index that
    is open on a removed generation still answers on Linux and macOS, where a mapped file stays until it is closed; it
    cannot be opened again.

    Raises:
        StoreError: keep < 1, no index, another process is writing there, or a file cannot be removed.
    """
    directory = Path(path)
    if keep < 1:
        raise StoreError(f"keep must be at least 1, the current generation; not {keep}")
    read_manifest(directory)
    with sole_writer(directory):
        read_pending(directory)  # where it is damaged, nothing is removed: what it names is not known
        for number in list(earlier_generations(directory))[::-1][keep - 1 :]:
            remove_file(directory, f"{KEPT}/{number}.json")
        _sweep(directory)


def _sweep(directory: Path) -> None:
    """Remove the files that no generation names, such as those of killed processes."""
    pending = read_pending(directory)
    generations = [] if pending is None else [pending]
    last_unreadable = 0
    if os.path.lexists(directory / MANIFEST_NAME):
        earlier = earlier_generations(directory)
        generations += [read_manifest(directory), *(kept for kept in earlier.values() if isinstance(kept, Manifest))]
        last_unreadable = max((number for number, kept in earlier.items() if isinstance(kept, StoreError)), default=0)
    if last_unreadable:
        _log.warning("%s: %s; the files that it may name are left", directory, earlier[last_unreadable])
    named = {name for manifest in generations for name in _file_names(manifest)}
    if pending is not None:
        named |= Board(directory, pending.generation).file_names()
    for name in list(format_files(directory)):
        # A generation names no file that a later one wrote.
        certain = not last_unreadable or is_temporary(name) or (written_by(name) or 0) > last_unreadable
        if name not in named and certain:
            remove_file(directory, name)


def _file_names(manifest: Manifest) -> set[str]:
    """Of all files in the index directory that a generation needs."""
    averages = [Path(entry.file) for entry in manifest.checkpoints if entry.kind == "average"]
    beside = {file.as_posix() for average in averages for file in (average, moments_path(average))}
    return {entry.path for entry in manifest.files()} | beside
