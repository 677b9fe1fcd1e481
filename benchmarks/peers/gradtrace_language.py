"""Gradtrace's index of the small GPT-2, for `benchmarks.peers.language`."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from benchmarks.peers.comparison import Scores
from benchmarks.wikitext import Wikitext2
from gradtrace.checkpoints import load_checkpoints
from gradtrace_indexer import build_index


class SparseRows:
    """The default for language models: 1,024 coordinates of each text. count: of checkpoints, the last ones"""

    def __init__(self, task: Wikitext2, count: int) -> None:
        self.task, self.checkpoints = task, load_checkpoints(task.directory / "run-0" / "checkpoints")[-count:]

    def build(self, directory: Path) -> None:
        self.index = build_index(self.task, self.checkpoints, directory / "index", progress=False)
        self.directory = directory / "index"

    def scores(self, queries: Tensor) -> Scores:
        return self.index.scores(list(queries), method="influence")

    def bytes(self) -> int:
        files = [file for kind in ("rows", "columns") for file in (self.directory / kind).rglob("*") if file.is_file()]
        return sum(file.stat().st_size for file in files)
