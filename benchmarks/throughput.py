"""Gradient rows a second against a plain training step of the same model: `python -m benchmarks.throughput mnist`.

Every figure is a median over interleaved rounds in one process; batches are fetched beforehand except where said.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import nn

from benchmarks.datasets import DATASETS, task_spec
from gradtrace.basis import load_bases
from gradtrace.checkpoints import load_checkpoints
from gradtrace.data.dataset import fetch
from gradtrace.models.gradient_model import GradientModel
from gradtrace.store.shards import ShardLayout
from gradtrace.task import Batch, Task
from gradtrace_indexer import build_index
from gradtrace_indexer.build.bad_rows import BadRows
from gradtrace_indexer.build.row_kinds import DenseRows
from gradtrace_indexer.build.row_reader import RowReader
from gradtrace_indexer.build.rows import RowWorkers, write_rows
from gradtrace_indexer.task_loading import load_task
from gradtrace_indexer.writing.shard_writer import ShardWriter

_BATCHES = 8


def training_step(task: Task, model: nn.Module) -> Callable[[Batch], object]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)

    def step(batch: Batch) -> None:
        model.train()
        optimizer.zero_grad(set_to_none=True)
        task.loss(model, batch).mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def input_gradient(task: Task, model: nn.Module) -> Callable[[Batch], object]:
    """Forward and backward to the input alone: the least that any method must do."""

    def step(batch: Batch) -> torch.Tensor:
        x = batch[0].detach().requires_grad_(True)
        return torch.autograd.grad(task.loss(model, (x, *batch[1:])).sum(), x)[0]

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset", choices=DATASETS)
    parser.add_argument("--dimensions", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    arguments = parser.parse_args()
    run: Path = arguments.runs / arguments.dataset
    task = load_task(task_spec(arguments.dataset))
    checkpoints = load_checkpoints(run / "checkpoints")
    path = run / f"index-gauss-newton-{arguments.dimensions}-float16"
    index = build_index(task, checkpoints, path, dimensions=arguments.dimensions, precision="float16")
    (basis,) = load_bases(path, index.manifest)

    def gradient_model() -> GradientModel:
        return GradientModel(task, checkpoints[-1], torch.device("cpu"), [task.train[0], task.train[1]])

    model = gradient_model()
    trained = gradient_model().model.requires_grad_(True)

    size = arguments.batch_size
    workers = RowWorkers([gradient_model() for _ in range(torch.get_num_threads())], DenseRows(basis))
    numbers = [list(range(i * size, (i + 1) * size)) for i in range(_BATCHES)]
    fetched = [(rows, fetch(task.train, rows)) for rows in numbers]
    batches = [model.batch(examples) for _, examples in fetched]
    layout = ShardLayout(size * _BATCHES, tuple(index.manifest.levels), "float16")

    def every(step: Callable[[Batch], object]) -> Callable[[], None]:
        return lambda: [step(batch.collated) for batch in batches] and None

    def pipeline() -> None:
        with tempfile.TemporaryDirectory(dir=run) as folder, ShardWriter(Path(folder), "a.rows", layout) as writer:
            reader, bad = RowReader(task.train), BadRows({}, skipping=False)
            write_rows(reader, workers, range(size * _BATCHES), size, writer, lambda count: None, bad)
            writer.commit()

    def in_basis() -> None:
        for _ in workers.encode(fetched, BadRows({}, skipping=False)):
            pass

    measured: dict[str, Callable[[], None]] = {
        "training step": every(training_step(task, trained)),
        "forward and backward to the input": every(input_gradient(task, model.model)),
        "rows stacked, and in the basis": in_basis,
        "rows fetched, in the basis, predicted, rounded, written, synced": pipeline,
    }
    times: dict[str, list[float]] = {name: [] for name in measured}
    for _ in range(arguments.rounds):
        for name, action in measured.items():
            started = time.perf_counter()
            action()
            times[name].append(time.perf_counter() - started)
    plain = median(times["training step"])
    print(
        f"| {arguments.dataset}, batch {size}, {arguments.dimensions} dimensions | rows/s | against a training step |"
        "\n|---|--:|--:|"
    )
    for name, found in times.items():
        print(f"| {name} | {size * _BATCHES / median(found):,.0f} | {plain / median(found):.2f} x |")


if __name__ == "__main__":
    main()
