"""What kinds of models cost, and how right they are: `python -m benchmarks.models`, or with words of the names wanted.

For each kind: the path by layer, the lowest correlation of scores with autograd's (one example at a time), and gradient
rows a second in the default basis against a batched training step of the same model in the same run, by turns, on one
thread. Then the peak memory of a build whose tied embedding is trained against one whose embedding is frozen. Without
words, the table in docs/models.md is written anew; that takes about half an hour.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import gradtrace
from benchmarks import model_kinds, sequence_kinds, transformer_kinds
from benchmarks.memory import peak
from benchmarks.model_kinds import ROWS, Kind, KindTask, padded, sentences
from benchmarks.sequence_kinds import NanoGPT, next_token
from gradtrace.basis import load_bases
from gradtrace.checkpoints import Checkpoint
from gradtrace.models.gradient_model import GradientModel
from gradtrace.models.path_report import layer_lines
from gradtrace_indexer import build_index

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
BEGIN, END = "<!-- benchmarks.models: begin -->", "<!-- benchmarks.models: end -->"
_COMPARED = 16  # rows of the comparison with autograd
_QUERIES = 4


class Line(NamedTuple):
    """Of the table. `ratio`: gradient rows a second by training rows a second."""

    kind: Kind
    path: str
    lowest_r: float
    rows_per_second: float
    ratio: float

    def __str__(self) -> str:
        speed = f"{self.rows_per_second:,.0f} | {self.ratio:.2f} x"
        return f"| {self.kind.name} | {self.kind.size} | {self.path} | {self.lowest_r:.5f} | {speed} |"


def saved(task: KindTask, folder: Path) -> Checkpoint:
    """The checkpoint of a model after a few steps of training, so that no weight is zero."""
    model = task.model().train()
    step = training_step(task, model, rate=0.01)
    for start in range(0, 4 * task.kind.batch, task.kind.batch):
        step([task.train[row % ROWS] for row in range(start, start + task.kind.batch)])
    torch.save(model.state_dict(), folder / "weights.pt")
    return Checkpoint(folder / "weights.pt", 4, 1.0)


def training_step(task: KindTask, model: nn.Module, rate: float = 1e-6) -> Callable[[list[object]], None]:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=rate)

    def step(examples: list[object]) -> None:
        optimizer.zero_grad(set_to_none=True)
        task.loss(model, task.collate(examples)).mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def lowest_r(task: KindTask, checkpoint: Checkpoint, folder: Path) -> float:
    """Of the queries' scores in an index without a basis, with inner products of autograd's gradients."""
    whole, task.train = task.train, task.train[:_COMPARED]
    try:
        options = {"basis": "none", "precision": "float16", "batch_size": 8}
        index = build_index(task, [checkpoint], folder / "exact", progress=False, **options)  # type: ignore[arg-type]
        scores = index.scores(task.train[:_QUERIES])
        model = loaded(task, checkpoint).eval()
        queries = [gradient(task, model, row) for row in range(_QUERIES)]
        rows = (gradient(task, model, row) for row in range(_COMPARED))
        expected = np.array([[float(row @ query) for query in queries] for row in rows]).T
    finally:
        task.train = whole
    return min(float(np.corrcoef(a, b)[0, 1]) for a, b in zip(scores, expected, strict=True))


def loaded(task: KindTask, checkpoint: Checkpoint) -> nn.Module:
    model = task.model()
    model.load_state_dict(checkpoint.load())
    return model


def gradient(task: KindTask, model: nn.Module, row: int) -> Tensor:
    """By autograd, of one example in a batch of its own. [parameters]."""
    model.zero_grad(set_to_none=True)
    task.loss(model, task.collate([task.train[row]])).sum().backward()  # type: ignore[no-untyped-call]
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])


def paths(model: GradientModel) -> str:
    """How many layers take which path."""
    counts = Counter(line.path for line in layer_lines(model))
    return ", ".join(f"{count} {path}" for path, count in counts.items())


def speeds(task: KindTask, checkpoint: Checkpoint, folder: Path, rounds: int) -> tuple[str, float, float]:
    """The path by layer, gradient rows a second in the basis, and their ratio to rows of a training step."""
    index = build_index(task, [checkpoint], folder / "index", batch_size=task.kind.batch, progress=False)
    (basis,) = load_bases(folder / "index", index.manifest)
    model = GradientModel(task, checkpoint, torch.device("cpu"), task.train[:2])
    step = training_step(task, loaded(task, checkpoint).train())
    size = task.kind.batch
    batches = [task.train[start : start + size] for start in range(0, ROWS - size + 1, size)]
    times: dict[str, list[float]] = {"train": [], "rows": []}
    for number in range(rounds + 1):  # the first round is left out: it warms up
        for examples in batches:
            times["train"].append(seconds(lambda examples=examples: step(examples)))
            times["rows"].append(seconds(lambda examples=examples: model.encode(basis, model.batch(examples))))
        if not number:
            times = {name: [] for name in times}
    plain, rows = (median(times[name]) for name in ("train", "rows"))
    return paths(model), size / rows, plain / rows


def seconds(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def measured(kind: Kind, rounds: int) -> Line:
    task = kind.task()
    with tempfile.TemporaryDirectory() as name:
        checkpoint = saved(task, Path(name))
        path, rate, ratio = speeds(task, checkpoint, Path(name), rounds)
        return Line(kind, path, lowest_r(task, checkpoint, Path(name)), rate, ratio)


def table(kinds: list[Kind], rounds: int) -> Iterator[str]:
    yield "| model | size | layers by path | lowest r | rows/s | against a training step |"
    yield "|---|---|---|--:|--:|--:|"
    for kind in kinds:
        if kind.needs and find_spec(kind.needs) is None:
            yield f"| {kind.name} | {kind.size} | {kind.needs} is not installed | | | |"
            continue
        try:
            yield str(measured(kind, rounds))
        except (gradtrace.GradtraceError, RuntimeError, IndexError, TypeError) as error:
            yield f"| {kind.name} | {kind.size} | **fails**: {type(error).__name__}: {str(error)[:120]} | | | |"


def tied(frozen: bool) -> Kind:
    """A language model whose head is its embedding, of 30,000 x 128."""

    def make() -> nn.Module:
        model = NanoGPT(vocabulary=30_000)
        model.wte.requires_grad_(not frozen)
        return model

    name = "frozen" if frozen else "trained"
    return Kind(name, "4 layers x 128", make, sentences(30_000, 32, 64), next_token, padded)


def peak_of_build(frozen: bool) -> float:
    """MB of this process at its largest, once an index was built in it."""
    task = tied(frozen).task()
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "weights.pt"
        torch.save(task.model().state_dict(), path)
        build_index(task, [Checkpoint(path, 1, 1.0)], Path(name) / "index", batch_size=32, progress=False)
    return peak()


def memory() -> str:
    peaks = []
    for frozen in (False, True):  # in processes of their own, which must not inherit what this one holds
        command = [sys.executable, "-m", "benchmarks.models", "--peak", "frozen" if frozen else "trained"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        peaks.append(float(done.stdout.split()[-1]))
    trained, frozen_peak = peaks
    return (
        f"Peak memory of a build with a tied embedding of 30,000 x 128, batches of 32: {trained:,.0f} MB, with the "
        f"embedding frozen {frozen_peak:,.0f} MB ({trained / frozen_peak:.2f} x)."
    )


def write(lines: list[str]) -> None:
    """Put the lines between the marks of the page, at its end where there are none."""
    page = PAGE.read_text() if PAGE.exists() else "# Models\n"
    if BEGIN not in page:
        page += f"\n{BEGIN}\n{END}\n"
    before, _, rest = page.partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n" + "\n".join(lines) + f"\n{END}{rest.partition(END)[2]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="kinds whose names contain one of these; default: all, and memory")
    parser.add_argument("--rounds", type=int, default=3, help="over all 256 rows, each by turns with training")
    parser.add_argument("--peak", choices=["trained", "frozen"], help="build in this process and print its peak, MB")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if arguments.peak:
        print(f"{peak_of_build(arguments.peak == 'frozen'):.0f}")
        return
    kinds = [*model_kinds.KINDS, *sequence_kinds.KINDS, *transformer_kinds.KINDS]
    chosen = [k for k in kinds if any(name.lower() in k.name.lower() for name in arguments.names)]
    lines = []
    for line in table(chosen if arguments.names else kinds, arguments.rounds):
        print(line, flush=True)
        lines.append(line)
    if not arguments.names:
        lines += ["", memory()]
        print(lines[-1])
        write(lines)


if __name__ == "__main__":
    main()
