"""Trainings of a task on subsets of its rows, each done once and kept: what every kind of ground truth is made of.

DIRECTORY/retrainings.json            the task, the queries and what is measured on them
DIRECTORY/trainings/AB/ABCDEF….npy    float32 [queries], measured after one training; named by its rows and seed
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import io
import json
import multiprocessing
import pickle
import textwrap
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from gradtrace.child_processes import end_with_parent
from gradtrace.data.batches import collate
from gradtrace.data.dataset import content_hash, fetch
from gradtrace.data.guards import check_dataset, check_losses
from gradtrace.errors import MismatchError, QueryError, StoreError, TaskError
from gradtrace.fingerprint import weightless_identity
from gradtrace.task import Example, Task
from gradtrace_indexer.held_out import Split
from gradtrace_indexer.progress import progress_bar
from gradtrace_indexer.task_loading import load_task
from gradtrace_indexer.writing.files import sole_writer, write_file

IDENTITY_NAME = "retrainings.json"
_MEASURED_TOGETHER = 256
Outputs = NDArray[np.float32]
J = TypeVar("J")
R = TypeVar("R")


@dataclass(frozen=True)
class Training:
    """Rows of the training data, and the seed of everything else."""

    rows: Sequence[int]
    seed: int

    @property
    def name(self) -> str:
        """The same for the same rows in any order."""
        content = np.array([self.seed, *sorted(self.rows)], dtype="<i8").tobytes()
        return hashlib.sha256(content).hexdigest()


@dataclass(frozen=True, slots=True)
class Trainer:
    """Trains and measures, or reads what was measured before. Each process has its own.

    Its attributes are the arguments of `Retrainings`.
    """

    task: Task
    directory: Path
    split: Split
    queries: Sequence[int]
    target: str | None

    def path(self, training: Training) -> Path:
        return self.directory / "trainings" / training.name[:2] / f"{training.name}.npy"

    def output(self, training: Training) -> Outputs:
        """What is measured on each query after this training, lower is better. float32 [queries].

        Raises:
            TaskError: the task's `fit` failed.
            LossError: a measured value is NaN or infinite.
            StoreError: the result cannot be read or written.
        """
        path = self.path(training)
        if not path.exists():
            content = io.BytesIO()
            np.save(content, self.measured(self.trained(training)))
            write_file(path.parent, path.name, content.getvalue())
        try:
            outputs: Outputs = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise StoreError(f"{path} is damaged ({error}); delete it and run the same again") from error
        return outputs

    def trained(self, training: Training) -> nn.Module:
        """A new model; without any row, as it is before training. Raises TaskError: the task's `fit` failed."""
        if not training.rows:
            with torch.random.fork_rng():
                torch.manual_seed(training.seed)
                return self.task.model()
        try:
            model = self.task.fit(sorted(training.rows), training.seed)
        except Exception as error:  # whatever the user's code raises
            raise TaskError(
                f"{type(self.task).__name__}.fit failed on {len(training.rows)} rows with seed {training.seed}: "
                f"{type(error).__name__}: {error}; correct it, and train with another fit in a directory of its own"
            ) from error
        if not isinstance(model, nn.Module):
            raise TaskError(
                f"{type(self.task).__name__}.fit must return the trained model, a torch.nn.Module, not "
                f"{type(model).__name__}"
            )
        return model

    @torch.no_grad()
    def measured(self, model: nn.Module) -> Outputs:
        """What is measured on each query, lower is better. float32 [queries].

        Raises:
            LossError: a measured value is NaN or infinite.
        """
        task, dataset = self.task, getattr(self.task, self.split)
        device = next(model.parameters()).device
        measure = task.loss if self.target == "loss" else task.measurement
        model.eval()
        by_batch = []
        for start in range(0, len(self.queries), _MEASURED_TOGETHER):
            examples = fetch(dataset, self.queries[start : start + _MEASURED_TOGETHER])
            values = measure(model, collate(task, examples, device).collated)
            check_losses(values, len(examples))
            by_batch.append(values.float().cpu().numpy())
        return np.concatenate(by_batch)


class Retrainings:
    """The trainings of one task in one directory. Those that were finished survive a kill at any moment.

    All kinds of ground truth share them: a training on the same rows with the same seed is never done twice.

    Attributes:
        rows: number of training rows.
        queries: numbers of the examples on which every model is measured.
    """

    def __init__(
        self,
        task: Task | str,
        directory: str | Path,
        *,
        queries: Sequence[int] | None = None,
        split: Split = "query",
        target: str | None = None,
        workers: int = 1,
        progress: bool = True,
    ) -> None:
        """Open a directory of trainings, or create one.

        Args:
            task: defines `fit`; its name, or where `workers` is 1 or it can be pickled, the task itself.
            queries: numbers of examples in `split`; default: those of the directory, or in a new one all.
            split: "query" for the task's query data, "train" for its training rows.
            target: "loss" measures the loss even where the task defines a measurement.
            workers: processes that train at the same time, with one thread of PyTorch each; 1: this process, with all.

        Raises:
            TaskError: the task has no `fit`, or no query data.
            QueryError: an unknown target.
            MismatchError: the directory holds trainings of another task, or measured on other queries.
        """
        if target not in (None, "loss"):
            raise QueryError(f'unknown target {target!r}; leave it out or pass "loss"')
        loaded = load_task(task) if isinstance(task, str) else task
        self.rows = check_dataset(loaded)
        check_retrainable(loaded, split)
        recorded = _recorded(Path(directory))
        if queries is None:
            queries = recorded["queries"] if recorded else range(len(getattr(loaded, split)))
        self.queries = [int(row) for row in queries]
        self.workers, self.progress, self._task = workers, progress, task
        self._trainer = Trainer(loaded, Path(directory), split, self.queries, target)
        self._record_or_compare(_identity(self._trainer), recorded)

    @property
    def examples(self) -> list[Example]:
        """The examples on which every model is measured."""
        return fetch(getattr(self._trainer.task, self._trainer.split), self.queries)

    def outputs(self, trainings: Sequence[Training]) -> Outputs:
        """What is measured after each training. float32 [trainings, queries]; raises as `map`."""
        missing = {training.name: training for training in trainings if not self._trainer.path(training).exists()}
        self.map(Trainer.output, list(missing.values()), "train")
        return np.stack([self._trainer.output(training) for training in trainings])

    def map(self, function: Callable[[Trainer, J], R], jobs: Sequence[J], title: str) -> list[R]:
        """The function's result for each job, in order; `workers` jobs run at the same time.

        Raises:
            StoreError: another process is training in the directory, or the disk is full.
            TaskError: a training failed, or its process died.
        """
        if not jobs:
            return []
        with sole_writer(self._trainer.directory):
            if self.workers == 1:
                results: Iterator[R] = (function(self._trainer, job) for job in jobs)
            else:
                results = _in_processes(self.workers, self._task, self._trainer, function, jobs)
            return list(progress_bar(title, len(jobs), shown=self.progress, items=results))

    def _record_or_compare(self, identity: dict[str, Any], recorded: dict[str, Any] | None) -> None:
        directory = self._trainer.directory
        if recorded is None:
            write_file(directory, IDENTITY_NAME, json.dumps(identity, indent=1).encode())
            return
        differing = [name for name in identity if identity[name] != recorded.get(name)]
        if differing:
            raise MismatchError(
                f"{directory} holds trainings of something else (other {', '.join(differing)}): make the task and the "
                "queries what they were, or train in another directory"
            )


def check_retrainable(task: Task, split: Split) -> None:
    """Raises TaskError where the task has no `fit`, or not this data set."""
    if not task.has_fit:
        raise TaskError(
            f"{type(task).__name__} cannot be retrained: define fit(self, rows, seed), which trains a new model "
            "on these rows of self.train and returns it"
        )
    if getattr(task, split) is None:
        raise TaskError(f"{type(task).__name__} has no query data: define query, or measure on split='train'")


def _recorded(directory: Path) -> dict[str, Any] | None:
    """What the trainings of a directory have in common; None where there are none yet."""
    if not (directory / "trainings").exists():
        return None
    path = directory / IDENTITY_NAME
    try:
        recorded: dict[str, Any] = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise StoreError(f"{path} is damaged ({error}); restore it, or train in another directory") from error
    return recorded


def _identity(trainer: Trainer) -> dict[str, Any]:
    """What all trainings of a directory have in common."""
    task = trainer.task
    examples = "".join(content_hash(example) for example in fetch(getattr(task, trainer.split), trainer.queries))
    return {
        **weightless_identity(task),
        "fit": _code(type(task).fit),
        "split": trainer.split,
        "queries": trainer.queries,
        "query_examples": hashlib.sha256(examples.encode()).hexdigest(),
        "target": trainer.target or _code(type(task).measurement),
    }


def _code(function: Callable[..., Any]) -> str:
    """A hash of a function's source, whatever its comments and layout; empty where there is none."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return ""
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()


_BY_NAME = "name the task as module:attribute or path/to/file.py:attribute"
_trainer: Trainer  # in a worker process


def _in_processes(
    workers: int, task: Task | str, trainer: Trainer, function: Callable[[Trainer, J], R], jobs: Sequence[J]
) -> Iterator[R]:
    """The function's results in order, from processes that each load the task once."""
    try:
        pickle.dumps(task)
    except Exception as error:  # whatever the task holds
        raise TaskError(
            f"{type(task).__name__} cannot be sent to other processes ({error}): {_BY_NAME}, or use workers=1"
        ) from error
    # Not forked: PyTorch's threads and CUDA do not survive that.
    context = multiprocessing.get_context("spawn")
    settings = (task, trainer.directory, trainer.split, trainer.queries, trainer.target)
    pool = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=settings)
    try:
        yield from pool.map(partial(_call, function), jobs)
    except BrokenProcessPool as error:
        raise TaskError(
            f"a training process could not start or was ended from outside: {_BY_NAME}, call from under "
            "`if __name__ == '__main__'`, and use fewer workers where memory is short; run again, it resumes"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(task: Task | str, directory: Path, split: Split, queries: Sequence[int], target: str | None) -> None:
    global _trainer
    torch.set_num_threads(1)
    end_with_parent()
    _trainer = Trainer(load_task(task) if isinstance(task, str) else task, directory, split, queries, target)


def _call(function: Callable[[Trainer, J], R], job: J) -> R:
    return function(_trainer, job)
