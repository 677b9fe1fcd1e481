"""What recording adds to a training step, against the same training without: `python -m benchmarks.recording mnist`.

Trainings as in the examples (batch, momentum, weight decay, train mode), side by side in one process, in turns of a few
steps. Processor time, since a busy machine changes it least. "Loaded" steps fetch and collate their batch as well.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from statistics import median

import torch

from benchmarks.datasets import task_spec
from gradtrace.data.dataset import fetch
from gradtrace.recording import InfluenceRecorder
from gradtrace.task import Batch, Task
from gradtrace_indexer.task_loading import load_task

_SGD = {
    "digits": {"lr": 0.1},
    "mnist": {"lr": 0.1},
    "cifar10": {"lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4, "nesterov": True},
}
_BATCH = {"digits": 64, "mnist": 64, "cifar10": 128}

Step = Callable[[list[int], Batch], None]


def training(task: Task, recorder: InfluenceRecorder | None, sgd: dict[str, float]) -> Step:
    torch.manual_seed(0)
    model = task.model().train()
    optimizer = torch.optim.SGD(model.parameters(), **sgd)  # type: ignore[arg-type]

    def step(rows: list[int], batch: Batch) -> None:
        block: AbstractContextManager[None] = recorder.step(model, optimizer, rows) if recorder else nullcontext()
        with block:
            loss = task.loss(model, batch).mean()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset", choices=_SGD)
    parser.add_argument("--dimensions", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=10, help="of each training in a round")
    arguments = parser.parse_args()
    task, size = load_task(task_spec(arguments.dataset)), _BATCH[arguments.dataset]
    generator = torch.Generator().manual_seed(0)
    chosen = [torch.randint(len(task.train), (size,), generator=generator).tolist() for _ in range(arguments.steps)]
    with tempfile.TemporaryDirectory(dir="runs" if Path("runs").is_dir() else None) as folder:

        def recorder(name: str, dimensions: int, probes: int) -> InfluenceRecorder:
            examples = [task.query[row] for row in range(probes)]
            return InfluenceRecorder(Path(folder) / name, task, dimensions=dimensions, probes=examples)

        dimensions = arguments.dimensions
        recorders = {
            "not recorded": None,
            f"HyDRA rows of {dimensions} dimensions": recorder("rows", dimensions, 0),
            "scores on 1 probe": recorder("one", 0, 1),
            "scores on 8 probes": recorder("eight", 0, 8),
            "HyDRA rows and 8 probes": recorder("all", dimensions, 8),
        }
        steps = {name: training(task, one, _SGD[arguments.dataset]) for name, one in recorders.items()}
        times: dict[str, list[float]] = {name: [] for name in [*steps, "loading"]}
        for number in range(arguments.rounds + 1):
            started = time.process_time()
            batches = [(rows, task.collate(fetch(task.train, rows))) for rows in chosen]
            times["loading"].append(time.process_time() - started)
            for name, step in steps.items():
                started = time.process_time()
                for rows, batch in batches:
                    step(rows, batch)
                if number:  # the first round plans, and touches new memory
                    times[name].append(time.process_time() - started)
    report(f"{arguments.dataset}, batch {size}", {n: 1e3 * median(t) / arguments.steps for n, t in times.items()})


def report(title: str, milliseconds: dict[str, float]) -> None:
    loading, plain = milliseconds.pop("loading"), milliseconds["not recorded"]
    print(f"| {title} | ms a step | more | ms, loaded | more |\n|---|--:|--:|--:|--:|")
    for name, own in milliseconds.items():
        loaded = (own - plain) / (plain + loading)
        print(f"| {name} | {own:.2f} | {own / plain - 1:.0%} | {own + loading:.2f} | {loaded:.0%} |")


if __name__ == "__main__":
    main()
