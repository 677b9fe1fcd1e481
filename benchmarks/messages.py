"""What is said when something is wrong. Each mistake is really made, on a small index: `python -m benchmarks.messages`.

`runs/digits` in the messages stands for a temporary directory.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from gradtrace import GradtraceError, load_checkpoints, open_index
from gradtrace.data.dataset import fetch
from gradtrace.task import Batch, Task
from gradtrace.tasks import ImageClassification
from gradtrace_client import Client, ClientError
from gradtrace_indexer import build_index, verify
from gradtrace_indexer.task_loading import import_source
from gradtrace_service.app import create_app
from gradtrace_service.server import serving

digits = import_source("examples/digits/task.py")
TASK, TRAIN = digits.TASK, digits.TASK.train
WEIGHTS, SHARD, MANIFEST = "checkpoints/*.safetensors", "index/rows/*/*.rows", "index/manifest.json"
Step = Callable[[Path], object]  # something done in a run: a folder with checkpoints/ and index/


class MeanLoss(ImageClassification):
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])


class SmoothedLoss(ImageClassification):
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none", label_smoothing=0.1)


def network(first: nn.Module) -> nn.Module:
    return nn.Sequential(first, nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


class SortedBatches(ImageClassification):
    """As collate functions for packed sequences do."""

    def collate(self, examples: list[Any]) -> Batch:
        return super().collate(sorted(examples, key=lambda example: float(example[0].sum())))


def missing_value() -> Task:
    train = fetch(TRAIN, range(len(TRAIN)))
    train[700][0][0, 3, 3] = float("nan")
    return ImageClassification(digits.model, train)


def reversed_rows() -> Task:
    return ImageClassification(digits.model, fetch(TRAIN, range(len(TRAIN)))[::-1])


def opened(task: Task) -> Step:
    return lambda run: open_index(run / "index", task)


def built(task: Task) -> Step:
    return lambda run: build_index(task, load_checkpoints(run / "checkpoints"), run / "other", progress=False)


def asked(run: Path) -> object:
    with serving(create_app(open_index(run / "index", TASK))) as url, Client(url) as client:
        return client.influence(query_rows=[0], method="tracln")


def removed(pattern: str) -> Step:
    return lambda run: min(run.glob(pattern)).unlink()


def swapped(run: Path) -> object:
    return shutil.copyfile(min(run.glob(WEIGHTS)), max(run.glob(WEIGHTS)))


def flipped(pattern: str) -> Step:
    def flip(run: Path) -> None:
        path = min(run.glob(pattern))
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)

    return flip


MISTAKES: dict[str, list[Step]] = {
    "another architecture": [opened(ImageClassification(lambda: network(nn.Flatten()), TRAIN))],
    "another loss": [opened(SmoothedLoss(digits.model, TRAIN))],
    "training rows in another order": [opened(reversed_rows())],
    "a checkpoint replaced by another": [swapped, opened(TASK)],
    "a mean-reduced loss": [built(MeanLoss(digits.model, TRAIN))],
    "a NaN among the inputs of row 700": [built(missing_value())],
    "a checkpoint missing at the build": [removed(WEIGHTS), built(TASK)],
    "a checkpoint missing afterwards": [removed(WEIGHTS), opened(TASK)],
    "a shard missing": [removed(SHARD), opened(TASK)],
    "one bit of a shard flipped, `verify`": [flipped(SHARD), lambda run: verify(run / "index")],
    "the same, opened": [flipped(SHARD), opened(TASK)],
    "one bit of the manifest flipped": [flipped(MANIFEST), opened(TASK)],
    "a collate that sorts": [built(SortedBatches(digits.model, TRAIN))],
    "an unknown method over HTTP": [asked],
}


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    print("| what is wrong | what is said |\n|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        whole, run = Path(folder).resolve() / "whole", Path(folder).resolve() / "run"
        with contextlib.redirect_stdout(io.StringIO()):
            import_source("examples/digits/train.py").train(TASK, whole, epochs=2)
        build_index(TASK, load_checkpoints(whole / "checkpoints"), whole / "index", dimensions=128, progress=False)
        for mistake, steps in MISTAKES.items():
            shutil.copytree(whole, run)
            text = said(run, steps).replace(str(run), "runs/digits").replace("|", "\\|")
            print(f"| {mistake} | {' '.join(text.split())} |", flush=True)
            shutil.rmtree(run)


def said(run: Path, steps: list[Step]) -> str:
    """The error of the last step, or the problems that it found."""
    for step in steps[:-1]:
        step(run)
    try:
        found = steps[-1](run)
    except (GradtraceError, ClientError) as error:
        return f"{type(error).__name__}: {error}"
    if isinstance(found, list) and found:
        return "; ".join(found)
    sys.exit("a mistake was made and nothing was said")


if __name__ == "__main__":
    main()
