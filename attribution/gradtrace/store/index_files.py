"""An index's files: their checksums, whether they are those that the manifest names, and reading tensors from them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import xxhash
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from gradtrace.errors import CorruptIndexError
from gradtrace.store.manifest import FileEntry, Manifest

_HASH_THREADS = 4
_HASH_CHUNK = 1 << 22


def hash_file(path: Path) -> str:
    """xxh3-128 of a file's content as hexadecimal digits, as in `FileEntry.xxh3`. Raises OSError."""
    digest = xxhash.xxh3_128()
    buffer = memoryview(bytearray(_HASH_CHUNK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def check_files(directory: Path, manifest: Manifest, deep: bool) -> list[str]:
    """The problems of the files that a manifest names, one sentence each; empty if there are none.

    Missing files and wrong sizes; and, if `deep`, content that differs from its checksum.
    """
    with ThreadPoolExecutor(_HASH_THREADS) as pool:
        problems = pool.map(lambda entry: check_file(directory, entry, deep), manifest.files())
        return [problem for problem in problems if problem]


def check_file(directory: Path, entry: FileEntry, deep: bool) -> str | None:
    """The problem of one file, as in `check_files`; None if there is none."""
    path = directory / entry.path
    try:
        size = path.stat().st_size
        if size != entry.bytes:
            return f"{entry.path} has {size} bytes, {entry.bytes} are expected: it was truncated or replaced"
        if deep and hash_file(path) != entry.xxh3:
            return f"{entry.path} does not match its checksum: its bytes are damaged or replaced"
    except FileNotFoundError:
        return f"{entry.path} is missing"
    except OSError as error:
        return f"{entry.path} cannot be read: {error.strerror}"
    return None


def load_tensors(path: Path, remedy: str, *names: str) -> dict[str, Tensor]:
    """A safetensors file's tensors by name, memory-mapped on the CPU.

    Args:
        remedy: what to do if the file cannot be restored.
        names: those that must be there.

    Raises:
        CorruptIndexError: the file is missing or damaged, or lacks a tensor.
    """
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CorruptIndexError(f"{path} cannot be read ({error}); restore it or {remedy}") from None
    lacking = [name for name in names if name not in tensors]
    if lacking:
        raise CorruptIndexError(f"{path} has no {lacking[0]}; restore it or {remedy}")
    return tensors
