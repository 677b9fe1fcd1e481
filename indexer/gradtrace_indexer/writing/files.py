"""Files of an index: written under a temporary name, synced, and only then renamed."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gradtrace.errors import LockedIndexError, StoreError
from gradtrace.store.checksums import hash_file
from gradtrace.store.manifest import FileEntry, Manifest
from gradtrace_indexer.writing.shard_writer import sync_directory


def write_file(directory: Path, name: str, content: bytes) -> FileEntry:
    """Write `directory/name` durably and whole, or not at all. Raises as `write_through`."""
    return write_through(directory, name, lambda path: path.write_bytes(content))


def write_through(directory: Path, name: str, write: Callable[[Path], object]) -> FileEntry:
    """Have `write` write a file under the path it is given, and make it `directory/name`, durably and whole.

    Raises:
        StoreError: the disk is full or the directory cannot be written.
    """
    path = directory / name
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        entry = FileEntry(path=name, bytes=temporary.stat().st_size, xxh3=hash_file(temporary))
        temporary.replace(path)
        sync_directory(path.parent)
    except OSError as error:
        raise StoreError(
            f"{path} could not be written: {error.strerror}; free some space or check the directory, then run "
            "the same again: it resumes"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    return entry


def write_ids(directory: Path, name: str, ids: NDArray[np.int64]) -> FileEntry:
    """Row ids as they are stored: little-endian int64, no header."""
    return write_file(directory, name, ids.astype("<i8").tobytes())


def write_manifest(directory: Path, name: str, manifest: Manifest) -> Manifest:
    """Write `directory/name` with its checksum filled in. Returns the manifest with it."""
    sealed = manifest.sealed()
    write_file(directory, name, sealed.content())
    return sealed


@contextmanager
def sole_writer(directory: Path) -> Iterator[None]:
    """Keep other writers out of a directory for as long as this process lives.

    Raises:
        LockedIndexError: another process is writing there.
        StoreError: the directory cannot be made.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(directory, os.O_RDONLY)
    except OSError as error:
        raise StoreError(f"{directory} cannot be used for an index: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise LockedIndexError(f"another process is building or updating {directory}: wait for it, or end it") from None
    finally:
        os.close(descriptor)
