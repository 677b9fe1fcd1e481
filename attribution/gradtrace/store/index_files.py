"""An index's files: their checksums, and whether they are those that the manifest names."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, MutableMapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import xxhash

from gradtrace.store.manifest import FileEntry, Manifest
from gradtrace.store.regular_files import path_problem

_HASH_THREADS = 4
_HASH_CHUNK = 1 << 22
_TICK_SECONDS = 0.05  # longer than the step of the clock that stamps files


class FileStamp(NamedTuple):
    """A file's status: another after each write to it, also after one whose time of modification is set back."""

    inode: int
    size: int
    modified_ns: int
    changed_ns: int
    links: int

    @classmethod
    def of(cls, path: Path) -> FileStamp:
        """Raises OSError. Waits where the file was changed just now: a second change could not be told from it."""
        status = path.stat()
        if 0 <= time.time() - max(status.st_mtime, status.st_ctime) < _TICK_SECONDS:
            time.sleep(_TICK_SECONDS)
            status = path.stat()
        return cls.in_status(status)

    @classmethod
    def in_status(cls, status: os.stat_result) -> FileStamp:
        return cls(status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_nlink)


# Files by their entries, with the stamps that they had before they were read and found right.
VerifiedFiles = MutableMapping[FileEntry, FileStamp]


def written_to(directory: Path, verified: VerifiedFiles) -> list[str]:
    """The files among `verified` that were written to since, in place. Those that were deleted, or replaced by another
    file of the same name, are left out: what has them open, or mapped, still has the old bytes."""
    return [entry.path for entry in list(verified) if _written_to(directory / entry.path, entry, verified)]


def changed_since(directory: Path, verified: VerifiedFiles) -> list[str]:
    """The files among `verified` that were written to, replaced or deleted since: what was opened by their names
    meanwhile may be other bytes than those that were verified."""
    return [entry.path for entry in list(verified) if _written_to(directory / entry.path, entry, verified, True)]


def _written_to(path: Path, entry: FileEntry, verified: VerifiedFiles, or_replaced: bool = False) -> bool:
    before = verified[entry]
    try:
        now = FileStamp.in_status(path.stat())
    except OSError:
        return or_replaced
    if now == before:
        return False
    if now.inode != before.inode:
        return or_replaced
    if now[:3] == before[:3] and now.links != before.links:  # a copy by hard links was made, or removed
        verified[entry] = now
        return False
    return True


def hash_file(path: Path) -> str:
    """xxh3-128 of a file's content as hexadecimal digits, as in `FileEntry.xxh3`. Raises OSError."""
    digest = xxhash.xxh3_128()
    buffer = memoryview(bytearray(_HASH_CHUNK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def check_files(directory: Path, manifest: Manifest, deep: bool, verified: VerifiedFiles | None = None) -> list[str]:
    """The problems of the files that a manifest names, one sentence each; empty if there are none.

    Missing files, wrong sizes, links and what else is not a regular file; and content that differs from its checksum:
    of all files if `deep`, else of all but those of rows and representations, which are nearly all of the bytes.

    verified: files that are not read again unless they were changed; those that are read and right are added
    """
    # Whatever they hold can be read without harm, though not without wrong answers.
    of_rows = {entry for shard in manifest.shards for entry in (shard.rows, shard.representations)}
    checks = [(entry, deep or entry not in of_rows) for entry in manifest.files()]
    return [problem for problem in file_problems(directory, checks, verified) if problem is not None]


def file_problems(
    directory: Path, checks: Sequence[tuple[FileEntry, bool]], verified: VerifiedFiles | None = None
) -> Iterator[str | None]:
    """The problem of each of these files, in their order, None if it has none.

    checks: each with whether its content is compared with its checksum
    verified: as in `check_files`
    """
    with ThreadPoolExecutor(_HASH_THREADS) as pool:
        yield from pool.map(lambda check: check_file(directory, check[0], check[1], verified), checks)


def check_file(directory: Path, entry: FileEntry, deep: bool, verified: VerifiedFiles | None = None) -> str | None:
    """The problem of one file, as in `check_files`; None if there is none."""
    path = directory / entry.path
    try:
        if (problem := path_problem(directory, entry.path)) is not None:
            return problem
        size = path.stat().st_size
        if size != entry.bytes:
            return f"{entry.path} has {size} bytes, {entry.bytes} are expected: it was truncated or replaced"
        if deep and not _content_is_right(path, entry, verified):
            return f"{entry.path} does not match its checksum: its bytes are damaged or replaced"
    except FileNotFoundError:
        return f"{entry.path} is missing"
    except OSError as error:
        return f"{entry.path} cannot be read: {error.strerror}"
    return None


def _content_is_right(path: Path, entry: FileEntry, verified: VerifiedFiles | None) -> bool:
    if verified is None:
        return hash_file(path) == entry.xxh3
    stamp = FileStamp.of(path)
    if verified.get(entry) == stamp:
        return True
    right = hash_file(path) == entry.xxh3
    if right:
        verified[entry] = stamp
    return right
