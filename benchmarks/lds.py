"""How well each method predicts retraining on half of the rows: `python -m benchmarks.lds --dimensions 2048 all`.

The linear datamodeling score on MNIST-6k, or with `--task` on 5,000 images of CIFAR-10, on 4,000 rows of California
housing (`benchmarks.retrained`), on 1,500 texts of WikiText-2 (`benchmarks.wikitext`), or on RTE or 2,000 sentences of
SST-2 (`benchmarks.glue`). Training runs, and what the ground truth lacks, are trained first (`--workers`); all indexes
and methods are measured against the same one. With two seeds or more, it is told how well one seed predicts another.
Each run has an index of its own or, with `--together`, all have one, whose scores are means over them. On MNIST-6k,
`fast-source` has an index of the averages of three segments, and `hydra` one of the same training, recorded.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr

from benchmarks import glue, wikitext
from benchmarks.datasets import task_spec
from benchmarks.retrained import CIFAR_EPOCHS, HOUSING_EPOCHS
from gradtrace.checkpoints import load_checkpoints
from gradtrace.checkpoints.recorder import CheckpointRecorder
from gradtrace.index import Index
from gradtrace.opening import open_index
from gradtrace.recording import InfluenceRecorder
from gradtrace.store.manifest import BasisKind
from gradtrace.task import Task
from gradtrace_indexer import Retrainings, add_kernels, build_index, fit_representer, subset_outputs
from gradtrace_indexer.evaluation.evaluate import measured
from gradtrace_indexer.evaluation.ground_truth import SubsetOutputs
from gradtrace_indexer.task_loading import load_task

_ALL = "all"
_EPOCHS, _BATCH_SIZE = 18, 64  # of the example


@dataclass(frozen=True)
class Recipe:
    """spec: of the task.  epochs, batch_size: of its training.  checkpoints: to keep.  adaptive: trained with Adam
    margins: are measured, of classes, so that the sign says whether a query is classified correctly"""

    spec: str
    epochs: int
    batch_size: int = _BATCH_SIZE
    checkpoints: int = 6
    adaptive: bool = False
    margins: bool = False


TASKS = {
    "mnist6k": Recipe(task_spec("mnist6k"), _EPOCHS, margins=True),
    "cifar5k": Recipe("benchmarks/retrained.py:CIFAR5K", CIFAR_EPOCHS, margins=True),
    "housing4k": Recipe("benchmarks/retrained.py:HOUSING4K", HOUSING_EPOCHS),
    "wikitext2": Recipe("benchmarks/wikitext.py:WIKITEXT2", wikitext.EPOCHS, wikitext.BATCH_SIZE, 3, adaptive=True),
    # by module: the folder's datasets.py, on the import path, would hide the library of this name from the Trainer
    "rte": Recipe("benchmarks.glue:Rte", glue.EPOCHS["rte"], glue.BATCH_SIZE, 4, adaptive=True, margins=True),
    "sst2-2k": Recipe("benchmarks.glue:Sst2", glue.EPOCHS["sst2"], glue.BATCH_SIZE, 4, adaptive=True, margins=True),
}
_MOST_KERNEL = 8192  # dimensions; a kernel has the square of it


@dataclass(frozen=True)
class Bench:
    """Where indexes of some training runs are made; a run's number is its seed.

    directory: has run-0 ...;  path: of the index, removed after use
    """

    task: Task
    directory: Path
    path: Path
    runs: Sequence[int]
    dimensions: int
    precision: str
    basis: BasisKind
    with_recording: bool

    def indexes(self, methods: Sequence[str] | None) -> Iterator[tuple[Index, str]]:
        """An index for each of the methods, None: of all that the runs can be asked by."""
        kinds: dict[str, Callable[[], Index]] = {"fast-source": self._averaged, "hydra": self._recorded}
        if len(self.runs) > 1 or self.dimensions > _MOST_KERNEL:
            del kinds["hydra"]  # one run is recorded, and its basis cannot be exact
        if not self.with_recording:
            kinds = {}
        usual = None if methods is None else [method for method in methods if method not in kinds]
        if usual is None or usual:
            index = self._usual(kernels=usual is None or "trak" in usual)
            for method in usual or index.methods:
                yield index, method
        for method in kinds if methods is None else kinds.keys() & set(methods):
            shutil.rmtree(self.path, ignore_errors=True)
            yield kinds[method](), method
        shutil.rmtree(self.path)

    def _build(self, **arguments: object) -> Index:
        checkpoints = [load_checkpoints(self.directory / f"run-{run}" / "checkpoints") for run in self.runs]
        some = checkpoints if len(checkpoints) > 1 else checkpoints[0]
        rows = {"rows": "sparse"} if self.basis == "sparse" else {"rows": "dense", "basis": self.basis}
        shape = {"dimensions": self.dimensions, "precision": self.precision, **rows}
        return build_index(self.task, some, self.path, progress=False, **shape, **arguments)  # type: ignore[arg-type]

    def _usual(self, kernels: bool) -> Index:
        self._build()
        if self.task.label(self.task.train[0]) is None:  # texts
            return open_index(self.path, self.task)
        fit_representer(self.path)
        if kernels and self.dimensions <= _MOST_KERNEL:
            add_kernels(self.path, progress=False)
        return open_index(self.path, self.task)

    def _averaged(self) -> Index:
        return self._build(average_segments=3)

    def _recorded(self) -> Index:
        recording = self.path.with_name("lds-recording")
        record(self.task, self.runs[0], InfluenceRecorder(recording, self.task, dimensions=self.dimensions))
        index = self._build(recording=recording)
        shutil.rmtree(recording)
        return index


def record(task: Task, seed: int, recorder: InfluenceRecorder) -> None:
    """The example's training once more, on all rows."""
    inputs, labels = task.collate(task.train.__getitems__(range(len(task.train))))
    torch.manual_seed(seed)
    model = task.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9, weight_decay=1e-3)
    for _ in range(_EPOCHS):
        for some in torch.randperm(len(labels)).split(_BATCH_SIZE):
            with recorder.step(model, optimizer, some.tolist()):
                optimizer.zero_grad()
                F.cross_entropy(model(inputs[some]), labels[some]).backward()
                optimizer.step()
    recorder.finish()


def train(task: Task, directory: Path, run: int, recipe: Recipe) -> None:
    """A run's checkpoints, unless they are there."""
    checkpoints = directory / f"run-{run}" / "checkpoints"
    if checkpoints.exists():
        return
    rows = range(len(task.train))
    every = recipe.epochs * -(-len(rows) // recipe.batch_size) // recipe.checkpoints
    recorder = CheckpointRecorder(
        checkpoints, every=every, batch_size=recipe.batch_size, optimizer_state=recipe.adaptive
    )
    task.fit(rows, run, recorder.step)  # type: ignore[call-arg]  # these tasks call it after each step


def agreement(truth: SubsetOutputs) -> float:
    """Spearman's correlation over the halves between the first two seeds, the mean over the queries."""
    first, second = truth.outputs[:, 0], truth.outputs[:, 1]  # [halves, queries]
    return float(np.mean([spearmanr(*pair).statistic for pair in zip(first.T, second.T, strict=True)]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dimensions", nargs="+", default=["512", "1024", "2048", "4096"], help='numbers, or "all"')
    parser.add_argument("--runs", type=int, nargs="+", default=[0], help="numbers of training runs")
    parser.add_argument("--together", action="store_true", help="all runs in one index")
    parser.add_argument("--task", choices=TASKS, default="mnist6k")
    parser.add_argument("--precision", nargs="+", default=["int8"])
    parser.add_argument(
        "--basis", nargs="+", default=["gauss-newton"], help="kinds of bases, or sparse rows, one after the other"
    )
    parser.add_argument("--methods", nargs="+", help="default: all")
    parser.add_argument("--subsets", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--directory", type=Path, help="has run-0 ... and truth; default: runs and the task's name")
    parser.add_argument("--to-zero", action="store_true", help="trainings whose learning rate falls linearly to zero")
    parser.add_argument("--indexes", type=Path, help="where they are made and removed; default: the directory")
    arguments = parser.parse_args()
    recipe = TASKS[arguments.task]
    spec = task_spec("mnist6k", "TO_ZERO") if arguments.to_zero else recipe.spec
    directory = arguments.directory or Path("runs") / arguments.task
    task = load_task(spec)
    for run in arguments.runs:
        train(task, directory, run, recipe)
    retrainings = Retrainings(spec, directory / "truth", workers=arguments.workers)
    truth = subset_outputs(retrainings, arguments.subsets, arguments.seeds)
    examples, halves = retrainings.examples, len(truth.subsets)
    print(f"{arguments.task}: {len(examples)} queries, {halves} halves x {truth.outputs.shape[1]} seeds")
    if arguments.seeds > 1:
        print(f"one seed predicts another: {agreement(truth):.3f}")
    if recipe.margins:
        print(f"queries that the models of the halves classify correctly: {(truth.outputs < 0).mean():.1%}")
    print()
    print("| basis | precision | dimensions a checkpoint | runs | method | LDS | 95 % interval | ms a query |")
    print("|---|---|--:|--:|---|--:|---|--:|")
    weights = sum(weight.numel() for weight in task.model().parameters())
    path = (arguments.indexes or directory) / "lds-index"
    runs_of_indexes = [arguments.runs] if arguments.together else [[run] for run in arguments.runs]
    shapes = product(arguments.basis, arguments.precision, arguments.dimensions, runs_of_indexes)
    for basis, precision, dimensions, runs in shapes:
        size = weights if dimensions == _ALL else int(dimensions)
        bench = Bench(task, directory, path, runs, size, precision, basis, arguments.task == "mnist6k")
        for index, method in bench.indexes(arguments.methods):
            cells = measured(index, examples, truth, method)
            shape = f"{basis} | {precision} | {dimensions} | {'+'.join(map(str, runs))}"
            print(f"| {shape} | {method} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
