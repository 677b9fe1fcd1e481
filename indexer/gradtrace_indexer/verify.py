"""Check every byte of an index against its manifest."""

from __future__ import annotations

from pathlib import Path

from gradtrace.manifest import read_manifest
from gradtrace.store import RowStore


def verify(path: str | Path) -> list[str]:
    """What is wrong with an index, one sentence for each damaged or missing file; empty where all is well.

    Raises:
        StoreError: there is no index, or its manifest itself is damaged (CorruptIndexError).
    """
    directory = Path(path)
    manifest = read_manifest(directory)
    problems = RowStore(directory, manifest).check_files(deep=True) if manifest.complete else []
    return problems if manifest.complete else ["the build was interrupted: run it again to resume"]
