"""Which files an index may name: regular files below its directory, reached through no symbolic link.

A manifest is data that may have been changed by others. Whatever it names, nothing outside the index directory is
opened or removed because of it, and nothing that is not a file: reading a FIFO or a device might never end.
"""

from __future__ import annotations

import stat
from pathlib import Path

from gradtrace.errors import CorruptIndexError

_LONGEST_PART = 255  # bytes of a file's name on the usual file systems


def name_problem(name: str) -> str | None:
    """What is wrong with a relative path in an index, as a sentence; None if it stays below the index directory and is
    written in the one usual way: `rows/a.pt/000000000.1.rows`."""
    parts = name.split("/")
    if not name or any(part in ("", ".", "..") for part in parts) or "\\" in name:
        return f"{shortened(name)!r} is not a path below the index directory"
    if not name.isprintable() or any(len(part.encode(errors="replace")) > _LONGEST_PART for part in parts):
        return f"{shortened(name)!r} is not a usable file name"
    return None


def path_problem(directory: Path, name: str) -> str | None:
    """What is wrong with the file of this name in an index, as a sentence; None if it is a regular file, or missing.

    Raises OSError, but for a missing file.
    """
    if (problem := name_problem(name)) is not None:
        return problem
    path, parts = directory, name.split("/")
    for part in parts:
        path = path / part
        try:
            mode = path.lstat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            return None
        if stat.S_ISLNK(mode):
            return (
                f"{path.relative_to(directory)} is a symbolic link, which is not followed inside of an index: put what "
                "it points to in its place (with a bind mount, if it is on another disk), or move the whole index "
                "there and link to that"
            )
    return None if stat.S_ISREG(mode) else f"{name} is not a regular file"


def regular_path(directory: Path, name: str) -> Path:
    """The path of the file of this name in an index, to be opened; it may be missing.

    Raises:
        CorruptIndexError: the name leads out of the directory, through a symbolic link, or to something else than a
            regular file.
    """
    try:
        problem = path_problem(directory, name)
    except OSError as error:
        problem = f"{name} cannot be read: {error.strerror}"
    if problem is not None:
        raise CorruptIndexError(f"{directory} cannot be used: {problem}")
    return directory / name


def shortened(text: str, most: int = 80) -> str:
    return text if len(text) <= most else f"{text[:most]}..."
