"""Write a small index in the format of the Gradtrace that is installed, with its checkpoints and its answers.

    python tests/data/formats/make.py tests/data/formats/3

Run it once for each new format, and never again for an old one: these are the files that older releases left.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from gradtrace import Checkpoint, Task, open_index
from gradtrace_indexer import build_index, delete_rows


def numbers(count: int, step: float) -> Tensor:
    """Some that are the same everywhere. float32 [count]."""
    return torch.sin(torch.arange(1, count + 1, dtype=torch.float64) * step).float()


class SmallTask(Task):
    """Twenty rows of three numbers, in three classes."""

    def __init__(self) -> None:
        self.train = [(numbers(3, 0.7 * row + 1), row % 3) for row in range(20)]

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    def predict(self, model: nn.Module, batch: Any) -> Tensor:
        return model(batch[0])  # type: ignore[no-any-return]


TASK = SmallTask()


def main(out: Path) -> None:
    task, checkpoints = TASK, []
    (out / "checkpoints").mkdir(parents=True)
    for step in (10, 20):
        path = out / "checkpoints" / f"{step}.safetensors"
        state = task.model().state_dict()
        save_file({name: numbers(value.numel(), step + 0.1).view(value.shape) for name, value in state.items()}, path)
        checkpoints.append(Checkpoint(path, step, 0.1))
    build_index(task, checkpoints, out / "index", rows="sparse", dimensions=16, progress=False)  # before 5: dense
    delete_rows(out / "index", [4])
    index = open_index(out / "index", task)
    answers = {method: index.scores(task.train[:3], method=method).tolist() for method in ("tracin", "influence")}
    (out / "answers.json").write_text(json.dumps(answers, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
