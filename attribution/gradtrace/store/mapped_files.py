"""Files that are memory-mapped for as long as an index is open."""

from __future__ import annotations

import mmap
from pathlib import Path

from gradtrace.errors import CorruptIndexError, StoreError


def map_file(path: Path, size: int) -> mmap.mmap:
    """Map a file that must have this number of bytes.

    Raises:
        CorruptIndexError: it is missing or has another size.
        StoreError: it cannot be opened.
    """
    try:
        with path.open("rb") as file:
            actual = file.seek(0, 2)
            if actual != size:
                raise _wrong_size(path, actual, size)
            # Copy on write: PyTorch warns about read-only buffers, and an accidental write cannot reach the file.
            return mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
    except FileNotFoundError:
        raise CorruptIndexError(f"{path} is missing: restore it or rebuild the index") from None
    except OSError as error:
        raise StoreError(f"{path} cannot be opened: {error}") from error


def check_mapped_size(path: Path, mapped: mmap.mmap, size: int) -> None:
    """To be called before the file is read: what a file was cut off by after it was mapped cannot be read, and trying
    to ends the process.

    Raises:
        CorruptIndexError: the file has another size now.
    """
    if mapped.size() != size:  # of the open file, whatever its name is now
        raise _wrong_size(path, mapped.size(), size)


def _wrong_size(path: Path, actual: int, expected: int) -> CorruptIndexError:
    return CorruptIndexError(
        f"{path} has {actual} bytes, {expected} are expected: it was truncated or replaced; restore it or rebuild the "
        "index"
    )
