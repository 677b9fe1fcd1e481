"""Trainings of a task on some of its rows, each done once and kept: what every kind of ground truth is made of.

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
import os
import pickle
import textwrap
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils._pytree import tree_map
from tqdm import tqdm

from gradtrace.data.dataset import content_hash, fetch
from gradtrace.data.guards import check_dataset, check_losses
from gradtrace.errors import MismatchError, QueryError, StoreError, TaskError
from gradtrace.fingerprint import weightless_identity
from gradtrace.task import Example, Task
from gradtrace_indexer.held_out import Split
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
    """Trains and measures, or reads what was measured before; one in each process.

    Attributes:
        queries: numbers of the examples in `split` on which the models are measured.
        target: "loss" measures the loss even where the task defines a measurement.
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
            np.save(content, self._measured(self._trained(training)))
            write_file(path.parent, path.name, content.getvalue())
        try:
            found: Outputs = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise StoreError(f"{path} is damaged ({error}); delete it and run the same again") from error
        return found

    def _trained(self, training: Training) -> nn.Module:
        """No rows at all: the model as it is before training."""
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
    def _measured(self, model: nn.Module) -> Outputs:
        task, dataset = self.task, getattr(self.task, self.split)
        device = next(model.parameters()).device
        measure = task.loss if self.target == "loss" else task.measurement
        model.eval()
        parts = []
        for start in range(0, len(self.queries), _MEASURED_TOGETHER):
            examples = fetch(dataset, self.queries[start : start + _MEASURED_TOGETHER])
            batch = tree_map(lambda x: x.to(device) if isinstance(x, torch.Tensor) else x, task.collate(examples))
            values = measure(model, batch)
            check_losses(values, len(examples))
            parts.append(values.float().cpu().numpy())
        return np.concatenate(parts)


class Retrainings:
    """The trainings of one task in one directory. Killed at any moment, all that were finished are there again.

    Ground truths of every kind share them: a training on the same rows with the same seed is never done twice.

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
        """Open a directory of trainings, or begin one.

        Args:
            task: one that defines `fit`; by name, or where `workers` is 1 or it can be pickled, the task itself.
            queries: numbers of examples in `split`; default: those of the directory, or all where it begins.
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
        loaded = _loaded(task)
        self.rows = check_dataset(loaded)
        dataset = getattr(loaded, split)
        if not loaded.has_fit:
            raise TaskError(
                f"{type(loaded).__name__} cannot be retrained: define fit(self, rows, seed), which trains a new model "
                "on these rows of self.train and returns it"
            )
        if dataset is None:
            raise TaskError(f"{type(loaded).__name__} has no query data: define query, or measure on split='train'")
        recorded = _recorded(Path(directory))
        if queries is None:
            queries = recorded["queries"] if recorded else range(len(dataset))
        self.queries = [int(row) for row in queries]
        self.workers, self.progress, self._task = workers, progress, task
        self._trainer = Trainer(loaded, Path(directory), split, self.queries, target)
        self._begin(_identity(self._trainer), recorded)

    @property
    def examples(self) -> list[Example]:
        """Those on which every model is measured."""
        return fetch(getattr(self._trainer.task, self._trainer.split), self.queries)

    def outputs(self, trainings: Sequence[Training]) -> Outputs:
        """What is measured after each training. float32 [trainings, queries]; raises as `map`."""
        missing = {training.name: training for training in trainings if not self._trainer.path(training).exists()}
        self.map(Trainer.output, list(missing.values()), "train")
        return np.stack([self._trainer.output(training) for training in trainings])

    def map(self, function: Callable[[Trainer, J], R], jobs: Sequence[J], title: str) -> list[R]:
        """What the function gives for each job, in order; the jobs run side by side.

        Raises:
            StoreError: another process is training in the directory, or the disk is full.
            TaskError: a training failed, or its process died.
        """
        if not jobs:
            return []
        with sole_writer(self._trainer.directory):
            done = self._done(function, jobs)
            results = dict(tqdm(done, title, total=len(jobs), disable=not self.progress))
        return [results[number] for number in range(len(jobs))]

    def _done(self, function: Callable[[Trainer, J], R], jobs: Sequence[J]) -> Iterator[tuple[int, R]]:
        """Results with the numbers of their jobs, as they come."""
        if self.workers == 1:
            yield from enumerate(function(self._trainer, job) for job in jobs)
            return
        with _pool(self.workers, self._task, self._trainer) as pool:
            numbers = {pool.submit(_call, function, job): number for number, job in enumerate(jobs)}
            for future in as_completed(numbers):
                yield numbers[future], future.result()

    def _begin(self, identity: dict[str, Any], recorded: dict[str, Any] | None) -> None:
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


def _recorded(directory: Path) -> dict[str, Any] | None:
    """What the trainings of a directory have in common; None where there are none yet."""
    if not (directory / "trainings").exists():
        return None
    path = directory / IDENTITY_NAME
    try:
        found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise StoreError(f"{path} is damaged ({error}); restore it, or train in another directory") from error
    return found


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


def _loaded(task: Task | str) -> Task:
    return load_task(task) if isinstance(task, str) else task


_trainer: Trainer  # of a process of the pool


@contextmanager
def _pool(workers: int, task: Task | str, trainer: Trainer) -> Iterator[Executor]:
    """Processes that load the task once."""
    _check_pickles(task)
    # Not forked: PyTorch's threads and CUDA do not survive that.
    context = multiprocessing.get_context("spawn")
    others = (trainer.directory, trainer.split, trainer.queries, trainer.target)
    pool = ProcessPoolExecutor(workers, context, initializer=_start_process, initargs=(task, *others))
    try:
        yield pool
    except BrokenProcessPool as error:
        raise TaskError(
            f"a training process could not start or was ended from outside: {_BY_NAME}, call from under "
            "`if __name__ == '__main__'`, and use fewer workers where memory is short; run again, it resumes"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_BY_NAME = "name the task as module:attribute or path/to/file.py:attribute"


def _check_pickles(task: Task | str) -> None:
    try:
        pickle.dumps(task)
    except Exception as error:  # whatever the task holds
        raise TaskError(
            f"{type(task).__name__} cannot be sent to other processes ({error}): {_BY_NAME}, or use workers=1"
        ) from error


def _start_process(task: Task | str, directory: Path, split: Split, queries: Sequence[int], target: str | None) -> None:
    global _trainer
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _trainer = Trainer(_loaded(task), directory, split, queries, target)


def _end_with_parent() -> None:
    """A parent that is killed cannot tell its processes to end."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _call(function: Callable[[Trainer, J], R], job: J) -> R:
    return function(_trainer, job)
