"""A small index with all that an index can have, for tests of what is done to it; and every command that reads or
changes one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import xxhash

import tiny
from gradtrace import Checkpoint, CorruptIndexError, Index, open_index
from gradtrace_indexer import (
    add_checkpoints,
    add_kernels,
    append_rows,
    compact,
    delete_rows,
    discard,
    fit_representer,
    prune,
    roll_back,
    set_searcher,
    verify,
)
from gradtrace_indexer.build import begin
from gradtrace_indexer.description import details
from tiny import ClassTask

ROWS, QUERIES = tiny.classes(40), tiny.classes(2, seed=5)
TASK = ClassTask(tiny.mlp, ROWS)


def made(home: Path) -> Path:
    """Fill a folder: checkpoints/; index/, which has averages, kernels, a refitted layer, a searcher and earlier
    generations; and outside/, the files of others. Returns it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(begin, "_SHARD_ROWS", 24)
        tiny.build(TASK, home, 4, basis="gauss-newton", precision="int4", dimensions=20, average_segments=2)
    delete_rows(home / "index", [3, 17])
    add_kernels(home / "index", progress=False)
    fit_representer(home / "index")
    set_searcher(home / "index", TASK, "faiss:Flat", progress=False)
    (home / "outside").mkdir()
    (home / "outside" / "secret").write_bytes(b"of others")
    return home


def opened(path: Path, **options: Any) -> Index:
    return open_index(path, TASK, **options)


def fifth(path: Path) -> list[Checkpoint]:
    """A checkpoint after those of the index."""
    return tiny.checkpoints(TASK, path.parent / "more", 5)[4:]


COMMANDS: dict[str, Callable[[Path], object]] = {
    "open": lambda path: opened(path).influence(QUERIES, k=3),
    "open without verifying": lambda path: opened(path, verify=False).scores(QUERIES),
    "info": lambda path: list(details(path)),
    "delete": lambda path: delete_rows(path, [5]),
    "compact": lambda path: compact(path, progress=False),
    "append": lambda path: append_rows(path, ClassTask(tiny.mlp, [*ROWS, *tiny.classes(3, seed=9)]), progress=False),
    "add": lambda path: add_checkpoints(path, TASK, fifth(path), progress=False),
    "kernels": lambda path: add_kernels(path, damping=0.5, progress=False),
    "representer": lambda path: fit_representer(path, l2=0.01),
    "searcher": lambda path: set_searcher(path, TASK, "progressive", progress=False),
    "roll back": lambda path: roll_back(path, 2),
    "discard": discard,
    "prune": prune,
}


def seal(path: Path, manifest: Any) -> None:
    """Write it with a checksum that fits."""
    blank = json.dumps(manifest | {"checksum": ""}, indent=1).encode()
    digest = xxhash.xxh3_128_hexdigest(blank)
    path.write_bytes(blank.replace(b'"checksum": ""', f'"checksum": "{digest}"'.encode()))


def changed(path: Path, **fields: Any) -> None:
    """Change fields of the manifest, and seal it."""
    seal(path / "manifest.json", json.loads((path / "manifest.json").read_bytes()) | fields)


def outside(home: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(home)): file.read_bytes()
        for folder in ("outside", "checkpoints")
        for file in (home / folder).rglob("*")
        if file.is_file()
    }


def refused(path: Path, words: str) -> None:
    """`verify` says it, and every command but those that look after manifests alone."""
    assert any(words in problem for problem in verify(path, progress=False)), verify(path, progress=False)
    for name in ("open", "open without verifying"):
        with pytest.raises(CorruptIndexError) as caught:
            COMMANDS[name](path)
        assert words in str(caught.value)
