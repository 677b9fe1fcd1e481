"""The generations of an index: one is current, one may be unfinished, earlier ones are kept until pruned.

manifest.json is the current one, pending.json the unfinished one, generations/{n}.json the earlier ones. Files are
never changed, and no two published generations have different files of the same name, so later generations do not
disturb the readers of an earlier one.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gradtrace.checkpoints.second_moments import moments_path
from gradtrace.errors import CorruptIndexError, IncompleteIndexError, StoreError
from gradtrace.methods import METHODS, available_methods
from gradtrace.store.index_files import check_files
from gradtrace.store.manifest import MANIFEST_NAME, PENDING_NAME, Manifest, Operation, read_generation, read_manifest
from gradtrace.store.rows import RowStore
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
)  # all files in these belong to generations

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
        write_file(directory, f"{_KEPT}/{manifest.generation - 1}.json", path.read_bytes())
    published = write_manifest(directory, MANIFEST_NAME, manifest.model_copy(update={"complete": True}))
    (directory / PENDING_NAME).unlink(missing_ok=True)
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
        CorruptIndexError: it is damaged; `discard` helps.
    """
    if not (directory / PENDING_NAME).exists():
        return None
    pending = read_generation(directory, PENDING_NAME)
    published = read_manifest(directory).generation if (directory / MANIFEST_NAME).exists() else 0
    return pending if pending.generation > published else None


def unfinished(directory: Path) -> Manifest | None:
    """As `read_pending`, for the only writer: removes what is left of a process that was killed after publishing."""
    pending = read_pending(directory)
    if pending is None:
        (directory / PENDING_NAME).unlink(missing_ok=True)
    return pending


@contextmanager
def updating(path: str | Path, operation: Operation) -> Iterator[tuple[Manifest, Manifest | None]]:
    """Be the only writer of an index; yields its current generation, and what this operation left unfinished before.

    Raises:
        StoreError: there is no index, another process is writing there, or another operation was left unfinished.
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
        yield current, pending


def kept_generations(path: str | Path) -> list[Manifest]:
    """The earlier generations that were not pruned, the oldest first.

    Raises:
        CorruptIndexError: the manifest of one is damaged.
    """
    directory = Path(path)
    numbers = sorted(int(file.stem) for file in (directory / _KEPT).glob("*.json"))
    current = read_manifest(directory).generation
    return [read_generation(directory, f"{_KEPT}/{number}.json") for number in numbers if number < current]


def roll_back(path: str | Path, generation: int) -> Manifest:
    """Publish an earlier generation again, as the next one. Returns the new manifest.

    Raises:
        StoreError: that generation was pruned or never existed, or an update is unfinished.
        CorruptIndexError: its files are damaged.
    """
    directory = Path(path)
    with updating(directory, "roll back") as (current, _):
        kept = {manifest.generation: manifest for manifest in kept_generations(directory)}
        if generation not in kept:
            numbers = ", ".join(map(str, kept)) or "none"
            raise StoreError(f"{directory} keeps no generation {generation}; earlier generations kept: {numbers}")
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
        StoreError: there is no index and no unfinished build, or another process is writing there.
    """
    directory = Path(path)
    if not (directory / PENDING_NAME).exists():
        read_manifest(directory)
    with sole_writer(directory):
        (directory / PENDING_NAME).unlink(missing_ok=True)
        _sweep(directory)


def prune(path: str | Path, keep: int = 1) -> None:
    """Remove all generations but the last `keep`, which include the current one, and the files that only they name.

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
    """Remove the files that no generation names, such as those of killed processes."""
    pending = read_pending(directory)
    generations = [] if pending is None else [pending]
    if (directory / MANIFEST_NAME).exists():
        generations += [read_manifest(directory), *kept_generations(directory)]
    named = {entry.path for manifest in generations for entry in manifest.files()}
    averages = [Path(e.file) for manifest in generations for e in manifest.checkpoints if e.kind == "average"]
    named |= {file.as_posix() for average in averages for file in (average, moments_path(average))}
    for path in [path for folder in _FOLDERS for path in (directory / folder).rglob("*")]:
        if path.is_file() and path.relative_to(directory).as_posix() not in named:
            path.unlink(missing_ok=True)


def verify(path: str | Path, *, all_generations: bool = False) -> list[str]:
    """The problems of an index, one sentence for each damaged or missing file; empty if it is undamaged.

    all_generations: check the earlier generations, too.

    Raises:
        StoreError: there is no index, or its manifest itself is damaged (CorruptIndexError).
    """
    directory = Path(path)
    try:
        current = read_manifest(directory)
    except IncompleteIndexError:
        return ["the build was interrupted: run it again to resume"]
    problems = _problems(directory, current)
    for kept in kept_generations(directory) if all_generations else []:
        problems += [f"generation {kept.generation}: {problem}" for problem in _problems(directory, kept)]
    return problems


def _problems(directory: Path, manifest: Manifest) -> list[str]:
    problems = check_files(directory, manifest, deep=True)
    try:
        RowStore(directory, manifest)
    except CorruptIndexError as error:
        return problems or [str(error)]
    return problems
