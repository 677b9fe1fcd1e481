"""Shards in the test's own process, which are asked as other processes are: what passes is pickled. For properties of
which many small indexes are looked at; tests/test_shard_processes.py has real processes."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gradtrace.sharded.ranges import row_ranges
from gradtrace.sharded.row_shards import RowShards
from gradtrace.sharded.server import Question, ShardOpening, ShardServer
from gradtrace.sharded.transport import ShardTransport, answered, unless_failed
from gradtrace.store.manifest import Manifest


class SameProcess(ShardTransport):
    def __init__(self, openings: Sequence[ShardOpening]) -> None:
        self._servers = [ShardServer(opening) for opening in openings]

    def ask(self, questions: Mapping[int, Question[Any]]) -> list[Any]:
        sent = {number: pickle.loads(pickle.dumps(question)) for number, question in questions.items()}
        replies = [answered(self._servers[number], question) for number, question in sent.items()]
        return [unless_failed(pickle.loads(pickle.dumps(reply))) for reply in replies]

    def close(self) -> None:
        """Nothing runs."""


def row_shards(directory: Path, manifest: Manifest, count: int) -> RowShards:
    windows = row_ranges(manifest.rows, manifest.stretches(), count)
    return RowShards(windows, SameProcess([ShardOpening(directory, manifest, window, 1) for window in windows]))
