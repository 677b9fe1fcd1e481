"""Writing files so that a crash or a power cut leaves each of them whole, or as it was before."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Callable
from pathlib import Path

TEMPORARY_SUFFIX = ".tmp"
WRITER = secrets.token_hex(4)  # of this process, for files that several may write at the same time
_TEMPORARY = re.compile(rf"(\.[0-9a-f]{{8}})?{re.escape(TEMPORARY_SUFFIX)}$")


def temporary_path(path: Path, writer: str = "") -> Path:
    """The name under which a file is written, beside its final one.

    writer: eight hexadecimal digits, where several processes may write the same file at the same time
    """
    return path.with_name(f"{path.name}.{writer}{TEMPORARY_SUFFIX}" if writer else path.name + TEMPORARY_SUFFIX)


def final_name(name: str) -> str:
    """The name that a file will have that is written under this one, if this one is temporary; else this one."""
    return _TEMPORARY.sub("", name)


def write_whole(path: Path, write: Callable[[Path], object], writer: str = "") -> None:
    """Have `write` write a file at the path it is given, then make that file `path`, durably.

    writer: as for `temporary_path`

    Raises OSError where the file cannot be written; nothing is left of it then.
    """
    temporary = temporary_path(path, writer)
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
