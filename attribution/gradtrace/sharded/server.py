"""What one shard does: it opens its rows of one generation, and answers questions about them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from gradtrace.errors import CorruptIndexError
from gradtrace.search.exact_search import ProgressiveSearcher
from gradtrace.search.scored_rows import Floats, Rows, ScoredRows
from gradtrace.sparse.store import SparseStore
from gradtrace.sparse.vectors import Entries
from gradtrace.store.dense_rows import RowPass
from gradtrace.store.index_files import check_files
from gradtrace.store.manifest import Manifest
from gradtrace.store.rows import RowStore, representation_store
from gradtrace.store.stored_rows import StoredRows

T = TypeVar("T")

RowKind = Literal["gradients", "representations"]
Question = Callable[["ShardServer"], T]  # pickled on its way


@dataclass(frozen=True)
class ShardOpening:
    """What a shard opens.

    manifest: of the generation;  window: the shard's rows
    threads: that the shard computes with;  verify: compare the checksums of its files first
    """

    directory: Path
    manifest: Manifest
    window: range
    threads: int
    verify: bool = False

    def __str__(self) -> str:
        return f"rows {self.window.start:,} to {self.window.stop:,} of {self.directory}"

    def files(self) -> Manifest:
        """A manifest that names the files of the window's rows alone."""
        shards = [
            shard for shard in self.manifest.shards if shard.start < self.window.stop and shard.stop > self.window.start
        ]
        return self.manifest.model_copy(update={"shards": shards})


class ShardServer:
    """Answers questions about a window of an index's rows. It counts them from the window's first."""

    def __init__(self, opening: ShardOpening) -> None:
        """Raises CorruptIndexError where its files are missing or damaged."""
        directory, manifest, self._window = opening.directory, opening.manifest, opening.window
        if opening.verify and (problems := check_files(directory, opening.files(), True, None)):
            raise CorruptIndexError(f"{directory} is damaged: {'; '.join(problems)}. Restore the files")
        self._searcher: Any  # of the kind of the rows
        self._stored: dict[RowKind, StoredRows] = {}
        self._dense: dict[RowKind, RowStore] = {}
        if (representations := representation_store(directory, manifest, self._window)) is not None:
            self._dense["representations"] = representations
        if manifest.basis.is_sparse:
            self._sparse = SparseStore(directory, manifest, self._window)
            self._stored["gradients"], self._searcher = self._sparse, self._sparse.searcher
        else:
            self._dense["gradients"] = RowStore(directory, manifest, self._window)
            self._searcher = ProgressiveSearcher(self._dense["gradients"])
        self._stored |= self._dense
        for store in self._stored.values():
            store.open_all()  # the shard answers even when its generation is pruned

    def search(
        self,
        queries: Any,
        checkpoints: Sequence[int],
        k: int,
        row_scale: Any,
        allowed: NDArray[np.bool_] | None,
    ) -> list[ScoredRows]:
        """The ends of each query's ranking, whose rows count from the index's first. Arguments as of `RowSearcher`."""
        by_query = self._searcher.scored(queries, checkpoints, k, row_scale=row_scale, allowed=allowed)
        return [scored.at_the_ends(k, self._window.start) for scored in by_query]

    def scores(self, queries: Any, checkpoints: Sequence[int], row_scale: Any) -> Floats:
        """float32 [q, rows of the window]"""
        scores: Floats = self._searcher.scores(queries, checkpoints, row_scale=row_scale)
        return scores

    def norms(self, kind: RowKind, checkpoint: int) -> Floats:
        return self._stored[kind].norms(checkpoint)

    def gather(self, kind: RowKind, checkpoints: Sequence[int], rows: Rows) -> Floats:
        """float32 [m, len(checkpoints), dimensions]"""
        gathered: Floats = self._dense[kind].gather(checkpoints, rows).numpy()
        return gathered

    def gather_sparse(self, checkpoint: int, rows: Rows) -> Entries:
        """rows: ascending"""
        return self._sparse.gather(checkpoint, rows)

    def each_row(self, kind: RowKind, checkpoints: Sequence[int], block_rows: int, row_pass: RowPass) -> NDArray[Any]:
        """row_pass: of the window's rows, see `RowPass.of_rows`"""
        results: NDArray[Any] = self._dense[kind].each_row(checkpoints, block_rows, row_pass).numpy()
        return results

    def square_sums(self, checkpoint: int, factors: NDArray[np.float64]) -> NDArray[np.float64]:
        return self._sparse.square_sums(checkpoint, factors)
