"""Rows in shards, as methods ask for them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradtrace.errors import QueryError
from gradtrace.search.scored_rows import Floats, Rows
from gradtrace.sharded.row_shards import RowShards
from gradtrace.sharded.searcher import ShardedSearcher
from gradtrace.sharded.server import RowKind, ShardServer
from gradtrace.sparse.inverted_rows import InvertedRows, InvertedSearcher
from gradtrace.sparse.vectors import Entries
from gradtrace.store.dense_rows import DenseRows, RowPass
from gradtrace.store.manifest import Manifest


class ShardedDenseRows(DenseRows):
    """Gradient rows, or representations. Columns (label, loss ...) and row ids are read here."""

    def __init__(self, directory: Path, manifest: Manifest, shards: RowShards, kind: RowKind) -> None:
        """manifest: that of these rows, see `representations_manifest`"""
        super().__init__(directory, manifest)
        self.dimensions, self._shards, self._kind = manifest.levels[-1], shards, kind

    def open_all(self) -> None:
        """The shards have opened them."""

    def norms(self, checkpoint: int) -> Floats:
        question = partial(ShardServer.norms, kind=self._kind, checkpoint=checkpoint)
        return np.concatenate(self._shards.ask_all(lambda window: question))

    def gather(self, checkpoints: Sequence[int], rows: Tensor | Rows | Sequence[int]) -> Tensor:
        asked = torch.as_tensor(rows, dtype=torch.int64).numpy()
        if len(asked) and (asked.min() < 0 or asked.max() >= self.rows):
            raise QueryError(f"rows must lie in 0 to {self.rows - 1}; got {asked.min()} to {asked.max()}")
        question = partial(ShardServer.gather, kind=self._kind, checkpoints=checkpoints)
        out = torch.empty(len(asked), len(checkpoints), self.dimensions)
        for places, gathered in self._shards.ask_for_rows(asked, lambda local: partial(question, rows=local)):
            out[torch.from_numpy(places)] = torch.from_numpy(gathered)
        return out

    def each_row(self, checkpoints: Sequence[int], block_rows: int, row_pass: RowPass) -> Tensor:
        question = partial(ShardServer.each_row, kind=self._kind, checkpoints=checkpoints, block_rows=block_rows)
        by_shard = self._shards.ask_all(
            lambda window: partial(question, row_pass=row_pass.of_rows(window.start, window.stop))
        )
        return torch.from_numpy(np.concatenate(by_shard))


class ShardedInvertedRows(InvertedRows):
    """Sparse rows."""

    def __init__(self, directory: Path, manifest: Manifest, shards: RowShards) -> None:
        super().__init__(directory, manifest)
        self._shards = shards
        self._searcher: InvertedSearcher = ShardedSearcher(shards)

    @property
    def searcher(self) -> InvertedSearcher:
        return self._searcher

    def open_all(self) -> None:
        """The shards have opened them."""

    def norms(self, checkpoint: int) -> Floats:
        question = partial(ShardServer.norms, kind="gradients", checkpoint=checkpoint)
        return np.concatenate(self._shards.ask_all(lambda window: question))

    def gather(self, checkpoint: int, rows: Rows) -> Entries:
        question = partial(ShardServer.gather_sparse, checkpoint=checkpoint)
        gathered = self._shards.ask_for_rows(rows, lambda local: partial(question, rows=local))
        none = Entries(0, np.zeros(0, np.int64), np.zeros(0, np.uint32), np.zeros(0))
        placed = [(np.zeros(0, np.int64), none), *gathered]
        return Entries(
            len(rows),
            np.concatenate([places[entries.places] for places, entries in placed]),
            np.concatenate([entries.coordinates for _, entries in placed]),
            np.concatenate([entries.values for _, entries in placed]),
        )

    def square_sums(self, checkpoint: int, factors: NDArray[np.float64]) -> NDArray[np.float64]:
        question = partial(ShardServer.square_sums, checkpoint=checkpoint, factors=factors)
        return np.concatenate(self._shards.ask_all(lambda window: question))
