"""Names of searchers, and opening the searcher of a name.

"progressive" is exact and needs no file; "faiss:HNSW32,SQfp16" and "annoy:50" need a file that a build wrote.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from gradtrace.errors import StoreError
from gradtrace.search.annoy import AnnoySearcher
from gradtrace.search.exact_search import ProgressiveSearcher
from gradtrace.search.faiss import FaissSearcher
from gradtrace.search.searcher import DenseSearcher
from gradtrace.store.manifest import Manifest
from gradtrace.store.regular_files import regular_path
from gradtrace.store.rows import RowStore


@dataclass(frozen=True, slots=True)
class SearcherName:
    """KIND[:ARGUMENT[;PARAMETERS]], such as faiss:IVF1024,Flat;nprobe=32

    kind: "progressive", "faiss" or "annoy"
    argument: FAISS's factory string, or Annoy's number of trees
    parameters: search parameters; empty: the build chooses them
    """

    kind: str
    argument: str
    parameters: str

    @classmethod
    def parse(cls, name: str) -> SearcherName:
        """Raises StoreError if no searcher has this name."""
        kind, _, rest = name.partition(":")
        argument, _, parameters = rest.partition(";")
        complete = {"progressive": not rest, "faiss": bool(argument), "annoy": argument.isdecimal() and int(argument)}
        if not complete.get(kind):
            raise StoreError(
                f"there is no searcher {name!r}: choose progressive, faiss:FACTORY such as faiss:HNSW32,SQfp16, or "
                "annoy:TREES such as annoy:50"
            )
        return cls(kind, argument, parameters)


def open_searcher(
    directory: Path, manifest: Manifest, store: RowStore, name: str | None, device: str | torch.device
) -> DenseSearcher:
    """The searcher of this name; None: the one that the index was built with.

    An approximate searcher that is older than the index's rows or checkpoints is not used: exact search answers.

    Raises:
        StoreError: the index has no such searcher, or its library is missing.
        CorruptIndexError: its file cannot be read.
    """
    entry = manifest.searcher
    built = "progressive" if entry is None else entry.name
    if name not in (None, built):
        raise StoreError(
            f"{directory} has no searcher {name!r}, only {built}: add it with `gradtrace build ... --searcher {name}`"
        )
    if entry is None or manifest.searcher_is_stale():
        return ProgressiveSearcher(store, device)
    path = regular_path(directory, entry.file.path)
    if SearcherName.parse(entry.name).kind == "annoy":
        return AnnoySearcher(store, path, entry.parameters, device)
    return FaissSearcher(store, path, entry.parameters, device)
