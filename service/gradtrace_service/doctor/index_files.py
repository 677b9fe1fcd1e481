"""Checks of the files of an index: its generations, their bytes, what does not belong there, and who may write them."""

from __future__ import annotations

import os
import pwd
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gradtrace.checkpoints.indexed import directories_of_runs, indexed_checkpoint
from gradtrace.checkpoints.second_moments import moments_path
from gradtrace.errors import GradtraceError, StoreError
from gradtrace.store.index_files import check_file
from gradtrace.store.manifest import MANIFEST_NAME, PENDING_NAME, Manifest
from gradtrace_indexer.generations import earlier_generations, kept_generations, read_pending
from gradtrace_indexer.progress import progress_bar
from gradtrace_indexer.work.board import UNFINISHED
from gradtrace_indexer.writing.files import LOCK_NAME
from gradtrace_service.doctor.findings import Says, in_bytes, listed
from gradtrace_service.http.file_permissions import others_may_write

_QUICKLY_READ = 2 << 30  # bytes that are read without being asked for: a few seconds
_THREADS = 4
_CLOCK_SECONDS = 2.0  # by which a file may be newer than now: file servers have clocks of their own


def unfinished(directory: Path) -> Says:
    """Builds and updates that were interrupted, or are running."""
    pending = read_pending(directory)
    if pending is not None:
        yield (
            "warning",
            f"{pending.made_by} is unfinished: run it again to finish it, or `gradtrace discard {directory}`",
        )


def content(directory: Path, manifest: Manifest, deep: bool) -> Says:
    """The files of the current generation: every byte if `deep` or if they are quickly read, else their sizes."""
    entries = manifest.files()
    size = sum(entry.bytes for entry in entries)
    deep = deep or size <= _QUICKLY_READ
    with ThreadPoolExecutor(_THREADS) as pool:
        checked = pool.map(lambda entry: check_file(directory, entry, deep), entries)
        problems = [problem for problem in progress_bar("Checksums", len(entries), "files", deep, checked) if problem]
    for problem in problems:
        yield "problem", f"{problem}; restore it, roll back, or rebuild the index"
    if not problems:
        how = "all bytes match their checksums" if deep else "sizes are right; --deep reads all bytes"
        yield "ok", f"{len(entries)} files, {in_bytes(size)}: {how}"


def generations(directory: Path) -> Says:
    """Earlier generations, which a roll back needs whole."""
    earlier = earlier_generations(directory)
    for number, why in earlier.items():
        if isinstance(why, StoreError):
            yield "warning", f"generation {number} cannot be rolled back to: {why}"
    kept = [manifest for manifest in earlier.values() if isinstance(manifest, Manifest)]
    damaged = {
        manifest.generation: problem
        for manifest in kept
        for entry in manifest.files()
        if (problem := check_file(directory, entry, deep=False)) is not None
    }
    for generation, problem in damaged.items():
        yield (
            "warning",
            f"generation {generation}: {problem}; it cannot be rolled back to: `gradtrace prune {directory}`",
        )
    whole = [manifest.generation for manifest in kept if manifest.generation not in damaged]
    yield "ok", f"{len(whole)} earlier ones to roll back to{': ' if whole else ''}{listed(whole)}"


def stray_files(directory: Path, manifest: Manifest) -> Says:
    """Files that no generation names, as killed processes leave them."""
    pending = read_pending(directory)
    manifests = [manifest, *kept_generations(directory), *([] if pending is None else [pending])]
    named = {directory / entry.path for each in manifests for entry in each.files()}
    weights = [Path(os.path.normpath(directory / entry.file)) for each in manifests for entry in each.checkpoints]
    named |= {*weights, *map(moments_path, weights), directory / MANIFEST_NAME, directory / PENDING_NAME}
    named |= {path for folder in ("jobs", "generations") for path in (directory / folder).glob("*.json")}
    named |= {directory / LOCK_NAME, *(directory / UNFINISHED).glob("*/*")}
    stray = [path for path in directory.rglob("*") if path.is_file() and path not in named]
    if stray:
        size, names = sum(path.stat().st_size for path in stray), listed(path.relative_to(directory) for path in stray)
        yield (
            "warning",
            f"{len(stray)} files, {in_bytes(size)}, belong to no generation: {names}; while nothing writes the index, "
            f"`gradtrace prune {directory} --keep {len(manifests)}` removes those that a killed process left",
        )
    else:
        yield "ok", "none"


def weights(directory: Path, manifest: Manifest, checkpoints: Sequence[Path] | None) -> Says:
    """The checkpoints from which the index was built, which answer queries."""
    moved = directories_of_runs(checkpoints, 1 + max(entry.run for entry in manifest.checkpoints))
    wrong = 0
    for entry in manifest.checkpoints:
        try:
            indexed_checkpoint(directory, entry, moved[entry.run])
        except (GradtraceError, OSError) as error:
            wrong += 1
            yield "problem", str(error)
    if not wrong:
        yield "ok", f"{len(manifest.checkpoints)} checkpoints are those that were indexed"


def permissions(directory: Path, manifest: Manifest) -> Says:
    """What this process may do, and what others may."""
    me = _name(os.geteuid())
    files = [directory / entry.path for entry in manifest.files()]
    unreadable = [path.relative_to(directory) for path in files if path.exists() and not os.access(path, os.R_OK)]
    if unreadable:
        yield "problem", f"{me} may not read {listed(unreadable)}: `chmod u+r`, or run the service as their owner"
    changeable = next(filter(None, map(others_may_write, [directory / MANIFEST_NAME, *files[:1]])), None)
    if changeable is not None:
        yield "warning", f"whoever writes to an index decides what it answers: {changeable}"
    if not os.access(directory, os.W_OK):
        yield (
            "warning",
            f"{me} may not write to {directory}: /reindex and updates need it; `chown` it if they are wanted",
        )
    yield "ok", f"owned by {_name(directory.stat().st_uid)}, checked as {me}"


def clock(directory: Path) -> Says:
    """Files from the future: a new generation is noticed by the time of its files."""
    now = time.time()
    newest = max((path.stat().st_mtime, path) for path in directory.rglob("*") if path.is_file())
    if newest[0] > now + _CLOCK_SECONDS:
        yield (
            "warning",
            f"{newest[1].relative_to(directory)} is {newest[0] - now:,.0f} s from the future: set the clocks of this "
            "machine and of its file server by NTP",
        )
    else:
        yield "ok", "no file is from the future"


def _name(user: int) -> str:
    try:
        return pwd.getpwuid(user).pw_name
    except KeyError:
        return f"user {user}"
