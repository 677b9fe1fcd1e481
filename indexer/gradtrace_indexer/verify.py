"""Check every byte of an index against its manifest."""

from __future__ import annotations

from pathlib import Path

from gradtrace.errors import CorruptIndexError, IncompleteIndexError
from gradtrace.store.index_files import check_files
from gradtrace.store.manifest import Manifest, read_manifest
from gradtrace.store.rows import RowStore
from gradtrace_indexer.generations import kept_generations


def verify(path: str | Path, *, all_generations: bool = False) -> list[str]:
    """The problems of an index, one sentence for each damaged or missing file; empty if it is undamaged.

    all_generations: check the earlier generations, too.

    Raises:
        StoreError: there is no index, or its manifest itself is damaged (CorruptIndexError).
    """
    directory = Path(path)
    try:
        current = read_manifest(directory)
    except IncompleteIndexError:
        return ["the build was interrupted: run it again to resume"]
    problems = _problems(directory, current)
    for kept in kept_generations(directory) if all_generations else []:
        problems += [f"generation {kept.generation}: {problem}" for problem in _problems(directory, kept)]
    return problems


def _problems(directory: Path, manifest: Manifest) -> list[str]:
    problems = check_files(directory, manifest, deep=True)
    try:
        RowStore(directory, manifest)
    except CorruptIndexError as error:
        return problems or [str(error)]
    return problems
