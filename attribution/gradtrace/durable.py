"""Writing files so that a crash or a power cut leaves each of them whole, or as it was before."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

TEMPORARY_SUFFIX = ".tmp"


def temporary_path(path: Path) -> Path:
    """The name under which a file is written, beside its final one."""
    return path.with_name(path.name + TEMPORARY_SUFFIX)


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Have `write` write a file at the path it is given, then make that file `path`, durably.

    Raises OSError where the file cannot be written; nothing is left of it then.
    """
    temporary = temporary_path(path)
    temporary.unlink(missing_ok=True)  # what lies there may be a link to another file
    try:
        write(temporary)
        rename_durably(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def rename_durably(temporary: Path, path: Path) -> None:
    """Rename a file that is fully written, in its own directory: its bytes reach the disk first, then its name."""
    _sync(temporary)
    temporary.replace(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
