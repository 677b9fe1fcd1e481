"""The files of an index: each is written whole and durably, or not at all."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gradtrace.durable import WRITER, write_whole
from gradtrace.errors import LockedIndexError, StoreError
from gradtrace.store.index_files import hash_file
from gradtrace.store.manifest import FileEntry, Manifest
from gradtrace.store.regular_files import regular_path

LOCK_NAME = ".writer"


def write_file(directory: Path, name: str, content: bytes) -> FileEntry:
    """Write `directory/name` durably and whole, or not at all. Raises as `write_through`."""
    return write_through(directory, name, lambda path: path.write_bytes(content))


def write_through(directory: Path, name: str, write: Callable[[Path], object]) -> FileEntry:
    """Have `write` write a file at the path it is given, and make that file `directory/name`, durably.

    Raises:
        StoreError: the disk is full or the directory cannot be written, or (CorruptIndexError) the name leads out of
            it or through a symbolic link.
    """
    path = regular_path(directory, name)
    with write_errors_of(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, write, WRITER)
        return FileEntry(path=name, bytes=path.stat().st_size, xxh3=hash_file(path))


@contextmanager
def write_errors_of(path: Path) -> Iterator[None]:
    """Raise StoreError, with the remedy, where writing this file fails."""
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"{path} could not be written: {error.strerror}; free some space or check the directory, then run the "
            "same again: it resumes"
        ) from error


def write_ids(directory: Path, name: str, ids: NDArray[np.int64]) -> FileEntry:
    """Write row ids in their stored form: little-endian int64, without a header."""
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
        descriptor = _locked(directory)
    except BlockingIOError:
        raise LockedIndexError(f"another process is building or updating {directory}: wait for it, or end it") from None
    except OSError as error:
        raise StoreError(f"{directory} cannot be used for an index: {error.strerror}") from error
    try:
        yield
    finally:
        os.close(descriptor)


def _locked(directory: Path) -> int:
    """A descriptor that holds the lock. Raises BlockingIOError where another process holds it."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise
    except OSError:  # network file systems lock only files, and of these only such as are opened for writing
        os.close(descriptor)
        descriptor = os.open(directory / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            raise
    return descriptor
