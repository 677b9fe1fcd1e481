"""The main path on bundled real data: train, build the index, serve it, ask it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path

import typer

import gradtrace
from gradtrace import Task
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


def run_demo(dataset: Dataset, out: Path, *, host: str, port: int, once: bool) -> None:
    """Train, build, serve and ask; go on serving until Ctrl-C unless `once`. What `out` already holds is reused.

    Raises:
        GradtraceError: a stage failed, or the index there belongs to other data or checkpoints.
        OSError: the port is taken.
    """
    from gradtrace_service.app import create_service  # with FastAPI, which other commands do not need: see `cli`
    from gradtrace_service.server import serving

    folder = _examples_folder() / dataset.value
    spec = f"{folder / 'task.py'}:TASK"
    task = load_task(spec)
    if (out / "checkpoints").is_dir():
        typer.echo(f"Checkpoints: those in {out / 'checkpoints'}")
    else:
        with _stage("Training"):
            _train(folder, task, out)
    with _stage("Index"):
        build_index(task, gradtrace.load_checkpoints(out / "checkpoints"), out / "index")
    hosted = Hosted(dataset.value, out / "index", spec)
    with serving(create_service([hosted], DEFAULTS.model_copy(update={"processes": 0})), host, port) as url:
        with _stage("Asking"), Client(url) as client:
            answer = client.influence(query_rows=[0], k=5)
        print_answer(answer)
        typer.echo(f"\nServing at {url}; the API is described at {url}/docs")
        if not once:
            _wait_for_interrupt()


def _train(folder: Path, task: Task, out: Path) -> None:
    unfinished = out / "training"  # renamed at the end, so that an interrupted run is not taken for a complete one
    shutil.rmtree(unfinished, ignore_errors=True)
    import_source(str(folder / "train.py")).train(task, unfinished)
    (unfinished / "checkpoints").rename(out / "checkpoints")
    shutil.rmtree(unfinished)


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
