"""Settings of all tests; fixtures and helpers for what is shared between files: the index of the digits, a full disk,
programs in processes of their own, waiting. Small tasks and data are in `tiny`."""

from __future__ import annotations

import asyncio
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from fastapi import FastAPI
from hypothesis import HealthCheck, settings

import damaged_index
import digits_task
import gradtrace
from gradtrace import Index
from gradtrace_client import Client
from gradtrace_client.service_schemas import Job
from gradtrace_indexer import build_index
from gradtrace_service.app import create_app
from gradtrace_service.server import serving
from gradtrace_service.state import jobs as job_states
from gradtrace_service.state.database import Database
from page_browser import browser as browser  # fixtures of all files that use one
from page_browser import shown as shown

# The tests' tensors are small: a second thread gains nothing, and on a busy machine the threads wait for each other.
# `make test-portable` shows that nothing depends on their number.
THREADS = int(os.environ.get("GRADTRACE_TEST_THREADS", "1"))
torch.set_num_threads(THREADS)
os.environ["OMP_NUM_THREADS"] = str(THREADS)  # for the processes that tests start

# No test trusts a certificate authority, and httpx would read all of them for each request without a client: 25 ms,
# again and again where a test asks whether a service is ready.
os.environ.pop("SSL_CERT_FILE", None)
os.environ["SSL_CERT_DIR"] = os.devnull

# A shell's background jobs ignore Ctrl-C, and so would the programs that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Machines differ in speed: an answer that is slow to come is not a failure, nor is a property that is slow to check.
os.environ["GRADTRACE_DEADLINE_SECONDS"] = "900"

# `make test-long` looks at each property with all its examples; other runs with a third, each with others.
THOROUGH = "GRADTRACE_TEST_THOROUGH" in os.environ


def examples(thorough: int) -> int:
    """How many examples of a property a run looks at. thorough: in `make test-long`"""
    return thorough if THOROUGH else thorough // 3


settings.register_profile(
    "any machine", deadline=None, max_examples=examples(100), suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("any machine")

# The files that compute longest, the longest first. Begun last, they would keep one process busy while others idle.
LONGEST_FILES = (
    "test_jobs", "test_drain", "test_models", "test_page_relabel", "test_hostile_tasks", "test_retrain",
    "test_row_jobs", "test_page_views", "test_page_everybody", "test_cli", "test_build", "test_takeover",
    "test_page_hostile", "test_page_together", "test_page_dbpedia", "test_page_california", "test_updates", "test_sdk",
    "test_fuzz", "test_search", "test_searchers", "test_runs", "test_examples", "test_generations", "test_engine",
    "test_workers", "test_slow_openings", "test_limits", "test_benchmarks", "test_marks",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`make test` hands files to its processes in this order."""
    for item in items:
        if item.path.stem.startswith("test_page_"):
            item.add_marker(pytest.mark.browser)
    order = {name: place for place, name in enumerate(LONGEST_FILES)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


def mostly_long(parameters: Iterable[Any], *everyday: Any) -> list[Any]:
    """Parameters of a test, tuples where it has several. `make test` takes the everyday ones, and leaves the others
    to `make test-long`."""
    listed = list(parameters)
    assert all(parameter in listed for parameter in everyday)
    values = [parameter if isinstance(parameter, tuple) else (parameter,) for parameter in listed]
    marks = [() if parameter in everyday else (pytest.mark.long,) for parameter in listed]
    return [pytest.param(*value, marks=mark) for value, mark in zip(values, marks, strict=True)]


@dataclass(frozen=True)
class DigitsRun:
    """What a user has after training and building: folders, and the task as the command line names it."""

    checkpoints: Path
    index: Path
    task: str

    def open(self) -> Index:
        """A new Index, as each thread needs its own."""
        return gradtrace.open_index(self.index, digits_task.TASK)


FRAMEWORK_WARNINGS = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of the frameworks, of PyTorch and of each other
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore:.*:ResourceWarning"),
]


@pytest.fixture(scope="session")
def digits_index(tmp_path_factory: pytest.TempPathFactory) -> DigitsRun:
    """A trained model of 400 digits with three checkpoints, and its index."""
    out = tmp_path_factory.mktemp("digits")
    digits_task.train(out / "checkpoints")
    checkpoints = gradtrace.load_checkpoints(out / "checkpoints")
    build_index(digits_task.TASK, checkpoints, out / "index", dimensions=256, progress=False)
    return DigitsRun(out / "checkpoints", out / "index", f"{digits_task.__file__}:TASK")


@pytest.fixture
def copied_run(digits_index: DigitsRun, tmp_path: Path) -> DigitsRun:
    """A copy of it, to be changed."""
    shutil.copytree(digits_index.checkpoints, tmp_path / "checkpoints")
    shutil.copytree(digits_index.index, tmp_path / "index")
    return DigitsRun(tmp_path / "checkpoints", tmp_path / "index", digits_index.task)


@pytest.fixture(scope="module")
def idle_run(digits_index: DigitsRun, tmp_path_factory: pytest.TempPathFactory) -> DigitsRun:
    """A copy of it for all tests of a file that change nothing, though a failure of what they test might."""
    copied = Path(shutil.copytree(digits_index.index.parent, tmp_path_factory.mktemp("idle") / "digits"))
    return DigitsRun(copied / "checkpoints", copied / "index", digits_index.task)


@pytest.fixture
def growing_run(digits_index: DigitsRun, tmp_path: Path) -> DigitsRun:
    """An index of the first two of three checkpoints; the third lies beside them."""
    checkpoints = Path(shutil.copytree(digits_index.checkpoints, tmp_path / "checkpoints"))
    first = gradtrace.load_checkpoints(checkpoints)[:2]
    build_index(digits_task.TASK, first, tmp_path / "index", dimensions=256, progress=False)
    return DigitsRun(checkpoints, tmp_path / "index", digits_index.task)


@pytest.fixture(scope="session")
def undamaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an index that has all that one can have, its checkpoints, and files of others: never changed."""
    return damaged_index.made(tmp_path_factory.mktemp("undamaged"))


@pytest.fixture
def home(undamaged: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(undamaged, tmp_path / "home"))


@pytest.fixture(scope="module")
def index(digits_index: DigitsRun) -> Index:
    """Of the digits, for the test's own use, beside the one that the service of `url` owns."""
    return digits_index.open()


@pytest.fixture(scope="module")
def url(digits_index: DigitsRun) -> Iterator[str]:
    """Of a service over the index of the digits."""
    with serving_when_ready(create_app(digits_index.open())) as address:
        yield address


@pytest.fixture
def client(url: str) -> Iterator[Client]:
    """Tries nothing again."""
    with Client(url, retries=0) as connected:
        yield connected


@pytest.fixture
def largest_file() -> Iterator[Callable[[int], None]]:
    """Writing past so many bytes of a file fails from now on, as on a full disk; in processes that are started, too."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def keep_job(index: Path, job: Job) -> None:
    """As a service that has this index first keeps it, in the state file beside it."""
    database = Database(index.with_name(f"{index.name}.state.sqlite"))

    async def write() -> None:
        await database.write(lambda connection: job_states.keep(connection, str(index.resolve()), job))
        await database.close()

    asyncio.run(write())


@contextmanager
def program(*words: str, **pipes: Any) -> Iterator[subprocess.Popen[str]]:
    """Python with these words, in a process that does not outlive a failed test. pipes: as of subprocess.Popen"""
    with subprocess.Popen([sys.executable, *words], text=True, **pipes) as process:
        try:
            yield process
        except BaseException:
            process.kill()
            raise


@contextmanager
def serving_when_ready(app: FastAPI) -> Iterator[str]:
    """The address of a service once it says that it is ready, which takes a slow machine a while."""
    with serving(app) as address:
        wait_until(lambda: httpx.get(f"{address}/readyz", timeout=60).status_code == 200)
        yield address


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hugging Face's libraries ask no server."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def wait_until(condition: Callable[[], bool], seconds: float = 180) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)
