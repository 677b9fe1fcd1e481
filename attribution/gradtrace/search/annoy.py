"""Candidates from an Annoy index, a forest of random projection trees (https://github.com/spotify/annoy)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gradtrace.errors import CorruptIndexError
from gradtrace.search.candidates import CandidateSearcher, import_library, unfiltered_count
from gradtrace.search.scored_rows import Floats, Rows
from gradtrace.store.rows import RowStore


def import_annoy() -> Any:
    """The annoy module. Raises StoreError if it is not installed."""
    return import_library("an Annoy", "annoy", "pip install gradtrace[annoy] (it needs a C++ compiler)")


class AnnoySearcher(CandidateSearcher):
    """Searches the forest that `gradtrace build --searcher annoy:50` wrote. Annoy memory-maps the file.

    parameters: "search_k=50000", the number of nodes to inspect for each end
    """

    _candidates_per_hit = 2
    _smallest_share = 0.9  # Annoy cannot filter: a search for one row in ten took 15 times as long as exact search

    def __init__(self, store: RowStore, path: Path, parameters: str, device: str | torch.device = "cpu") -> None:
        super().__init__(store, path, device)
        self._forest = import_annoy().AnnoyIndex(store.checkpoints * store.dimensions, "dot")
        self._search_k = int(parameters.removeprefix("search_k="))
        try:
            self._forest.load(str(path))
        except OSError as error:
            raise CorruptIndexError(f"{path} cannot be opened: {error}; rebuild it with `gradtrace build`") from error
        if self._forest.get_n_items() != store.rows:
            raise CorruptIndexError(f"{path} holds other rows than the index: rebuild it with `gradtrace build`")

    def _nearest(self, vectors: Floats, count: int, allowed: NDArray[np.bool_] | None) -> list[Rows]:
        count = count if allowed is None else unfiltered_count(count, allowed)
        nodes = max(self._search_k, self._forest.get_n_trees() * count)
        return [np.array(self._forest.get_nns_by_vector(v, count, nodes), dtype=np.int64) for v in vectors]
