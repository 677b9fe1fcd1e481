"""The main path on bundled real data: train, build the index, serve it, ask it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import ClassVar

import typer

import gradtrace
from gradtrace.tasks.language import TASK_FILE, TaskFile, task_file_text
from gradtrace_client import Client
from gradtrace_indexer import build_index
from gradtrace_indexer.task_loading import import_source, load_task
from gradtrace_service.console import print_answer
from gradtrace_service.indexes.hosted import Hosted
from gradtrace_service.settings import DEFAULTS


class Dataset(str, Enum):
    digits = "digits"
    mnist = "mnist"
    cifar10 = "cifar10"
    california = "california"
    dbpedia = "dbpedia"
    sst2 = "sst2"
    wikitext = "wikitext"


def run_demo(dataset: Dataset, out: Path, *, host: str, port: int, once: bool) -> None:
    """Train, build, serve and ask; go on serving until Ctrl-C unless `once`. What `out` already holds is reused.

    Raises:
        GradtraceError: a stage failed, or the index there belongs to other data or checkpoints.
        OSError: the port is taken.
    """
    from gradtrace_service.app import create_service  # with FastAPI, which other commands do not need: see `cli`
    from gradtrace_service.server import serving

    example = _example(_examples_folder() / dataset.value, out)
    if example.checkpoints.is_dir():
        typer.echo(f"Checkpoints: those in {example.checkpoints}")
    else:
        with _stage("Training"):
            example.train()
    task, spec = load_task(example.spec), example.spec
    with _stage("Index"):
        build_index(task, gradtrace.load_checkpoints(example.checkpoints), out / "index")
    hosted = Hosted(dataset.value, out / "index", spec)
    with serving(create_service([hosted], DEFAULTS.model_copy(update={"processes": 0})), host, port) as url:
        with _stage("Asking"), Client(url) as client:
            answer = client.influence(query_rows=[0], k=5, method=example.method)
        print_answer(answer)
        typer.echo(f"\nServing at {url}; the API is described at {url}/docs")
        if not once:
            _wait_for_interrupt()


@dataclass(frozen=True)
class _Example:
    """An example whose task is written in Python. folder: of it;  out: what was made of it;  method: to ask by"""

    folder: Path
    out: Path
    method: ClassVar[str] = "tracin"

    @property
    def spec(self) -> str:
        return f"{self.folder / 'task.py'}:TASK"

    @property
    def checkpoints(self) -> Path:
        return self.out / "checkpoints"

    def train(self) -> None:
        with self._unfinished() as unfinished:
            import_source(str(self.folder / "train.py")).train(load_task(self.spec), unfinished)
            (unfinished / "checkpoints").rename(self.checkpoints)

    @contextmanager
    def _unfinished(self) -> Iterator[Path]:
        """A folder that is renamed at the end, so that an interrupted training is not taken for a complete one."""
        unfinished = self.out / "training"
        shutil.rmtree(unfinished, ignore_errors=True)
        yield unfinished
        shutil.rmtree(unfinished)


class _LanguageExample(_Example):
    """An example whose training leaves a Hugging Face model and its data, of which the task is made."""

    method = "influence"  # TracIn is far behind it there: docs/language-models.md

    @property
    def spec(self) -> str:
        return str(self.out / "index" / TASK_FILE)

    @property
    def checkpoints(self) -> Path:
        return self.out / "model"

    def train(self) -> None:
        with self._unfinished() as unfinished:
            import_source(str(self.folder / "train.py")).train(unfinished)
            for name in ("train.jsonl", "query.jsonl", "model"):  # the model last: it tells that all is there
                (unfinished / name).rename(self.out / name)
        data, queries = self.out / "train.jsonl", self.out / "query.jsonl"
        text = task_file_text(TaskFile(model=self.checkpoints, data=data, query_data=queries))
        Path(self.spec).parent.mkdir(exist_ok=True)
        Path(self.spec).write_text(text, encoding="utf-8")


def _example(folder: Path, out: Path) -> _Example:
    return _Example(folder, out) if (folder / "task.py").is_file() else _LanguageExample(folder, out)


def _examples_folder() -> Path:
    """Beside this file in an installed package, at the root in a checkout."""
    inside = Path(__file__).parent / "examples"
    return inside if inside.is_dir() else Path(__file__).parents[2] / "examples"


@contextmanager
def _stage(name: str) -> Iterator[None]:
    typer.echo(f"{name} ...")
    started = time.perf_counter()
    yield
    typer.echo(f"{name}: done in {time.perf_counter() - started:.1f} s")


def _wait_for_interrupt() -> None:
    typer.echo("Press Ctrl-C to stop.")
    try:
        while True:
            time.sleep(1)  # not for ever: Ctrl-C in the moment before a wait is noticed at its end
    except KeyboardInterrupt:
        typer.echo("\nStopped.")
