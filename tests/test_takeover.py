"""What is published beside a running service is taken over by it; `wait` returns when it answers. By the commands."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

import gradtrace
import tiny
from conftest import DigitsRun, wait_until
from digits_task import TASK
from gradtrace.store.manifest_file import read_manifest
from gradtrace_client import AsyncClient, Client, NotTakenOverError
from gradtrace_client.service_schemas import Job
from gradtrace_indexer import add_kernels, build_index, fit_representer
from gradtrace_indexer.task_loading import load_task
from gradtrace_service.app import create_service
from gradtrace_service.indexes.catalog import Catalog
from gradtrace_service.indexes.hosted import Hosted
from gradtrace_service.indexes.job_commands import last_complaint
from gradtrace_service.server import serving
from gradtrace_service.settings import Settings

COMMAND = [sys.executable, "-m", "gradtrace_service"]
FIRST, ALL = 40, 52

_DATA = """
import numpy as np
from pathlib import Path

stored = np.load(Path(__file__).with_name("rows.npz"))
INPUTS, LABELS = stored["inputs"], stored["labels"]
"""
_TASK = """
import torch
import torch.nn.functional as F
from torch import nn
import gradtrace
from {module} import INPUTS, LABELS

class MyTask(gradtrace.Task):
    def __init__(self):
        self.train = list(zip(torch.from_numpy(INPUTS), LABELS.tolist()))
    def model(self):
        return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    def predict(self, model, batch):
        return model(batch[0])
    def loss(self, model, batch):
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")
"""


def write_description(folder: Path, checkpoints: list[gradtrace.Checkpoint]) -> None:
    entries = [{"file": one.path.name, "step": one.step, "learning_rate": one.learning_rate} for one in checkpoints]
    (folder / "checkpoints.json").write_text(json.dumps({"checkpoints": entries}))


class Project:
    """A user's folder: a data file, the module that reads it, the task, checkpoints and an index."""

    def __init__(self, folder: Path, module: str) -> None:
        self.folder, self.index, self.task = folder, folder / "index", f"{folder}/task.py:MyTask"
        (folder / f"{module}.py").write_text(_DATA)
        (folder / "task.py").write_text(_TASK.format(module=module))
        self.store(FIRST)
        task = load_task(self.task)
        found = tiny.checkpoints(task, folder / "checkpoints")
        write_description(folder / "checkpoints", found)
        build_index(task, found, self.index, progress=False)

    def store(self, rows: int) -> None:
        random = np.random.default_rng(0)
        inputs = random.normal(size=(ALL, 5)).astype(np.float32)
        labels = random.integers(3, size=ALL)
        np.savez(self.folder / "rows.npz", inputs=inputs[:rows], labels=labels[:rows])

    def command(self, *words: str) -> str:
        done = subprocess.run([*COMMAND, *words], capture_output=True, text=True, timeout=240, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    @contextmanager
    def served(self, *flags: str) -> Iterator[str]:
        port = free_port()
        words = ["serve", str(self.index), "--task", self.task, "--port", str(port), *flags]
        log = self.folder / "log"
        with log.open("wb") as stderr:
            process = subprocess.Popen([*COMMAND, *words], stderr=stderr)
        url = f"http://127.0.0.1:{port}"
        try:
            wait_until(lambda: process.poll() is None and is_ready(url), seconds=120)
            yield url
        finally:
            process.terminate()
            process.wait(60)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz").status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.long
@pytest.mark.parametrize("flags", [[], ["--processes", "1"]])
def test_append_beside_a_service_is_followed(tmp_path: Path, flags: list[str]) -> None:
    """The data file is read by a module that the task imports."""
    project = Project(tmp_path, f"rows_of_{len(flags)}")
    with project.served(*flags) as url, Client(url) as client:
        assert client.index().rows == FIRST
        project.store(ALL)
        assert client.influence(train_rows=[0]).index.rows == FIRST  # the old generation goes on
        assert f"{ALL} rows" in project.command("append", str(project.index), "--task", project.task)
        wait_until(lambda: client.index().generation == 2, seconds=30)
        answer = client.influence(train_rows=[ALL - 1], k=1, method="cosine", include=[])
        assert answer.index.rows == ALL
        assert answer.results[0].proponents[0].row == ALL - 1
        assert answer.results[0].proponents[0].score == pytest.approx(1, abs=0.02)  # int8 rows


def test_reindex_beside_a_service_says_what_was_lost_and_wait_returns_when_it_answers(tmp_path: Path) -> None:
    project = Project(tmp_path, "rows_of_a_reindex")
    add_kernels(project.index, progress=False)
    fit_representer(project.index)
    before = read_manifest(project.index).generation
    with (
        serving(create_service([Hosted("a", project.index, project.task)], Settings(processes=0))) as url,
        Client(url) as client,
    ):
        assert {"trak", "representer"} <= set(client.index().methods)
        project.store(ALL)
        job = client.wait(client.reindex(), progress=False)
        assert client.index().generation == job.generation > before
        assert client.index().rows == ALL
        assert set(job.lost_methods) == {"trak", "representer"}
        assert "gradtrace kernels" in job.lost_methods["trak"]
        assert "gradtrace representer" in job.lost_methods["representer"]
        assert "no trak any more" in job._repr_html_()
        project.store(FIRST)
        back = client.wait(client.reindex(roll_back_to=before), progress=False)
        assert back.lost_methods == {}
        assert "trak" in client.index().methods


@pytest.fixture
def behind(digits_index: DigitsRun, tmp_path: Path) -> DigitsRun:
    """An index that lacks the last of three checkpoints."""
    checkpoints = Path(shutil.copytree(digits_index.checkpoints, tmp_path / "checkpoints"))
    build_index(TASK, gradtrace.load_checkpoints(checkpoints)[:2], tmp_path / "index", dimensions=256, progress=False)
    return DigitsRun(checkpoints, tmp_path / "index", digits_index.task)


def test_wait_returns_when_the_new_generation_answers(behind: DigitsRun, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Hosted.open

    def slowly(hosted: Hosted, verified: Any) -> Any:
        index = opened(hosted, verified)
        time.sleep(2 * (index.manifest.generation == 2))
        return index

    monkeypatch.setattr(Hosted, "open", slowly)

    async def wait_async(url: str, job: Job) -> tuple[int, int]:
        async with AsyncClient(url) as client:
            ended = await client.wait(job.id, progress=False)
            return ended.generation, (await client.index()).generation

    app = create_service([Hosted("a", behind.index, behind.task)], Settings(processes=0))
    with serving(app) as url, Client(url) as client, ThreadPoolExecutor(1) as other:
        job = client.reindex()
        waiting = other.submit(asyncio.run, wait_async(url, job))
        ended = client.wait(job, progress=False)
        assert client.index().generation == ended.generation == 2
        assert waiting.result() == (2, 2)
        assert client.wait(job.id, progress=False) == ended  # long ended


@pytest.mark.long
def test_wait_ends_where_the_new_generation_cannot_be_opened(
    behind: DigitsRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def wait_async(url: str, job: Job) -> None:
        async with AsyncClient(url) as client:
            await client.wait(job, progress=False, take_over_timeout=0.5)

    with serving(create_service([Hosted("a", behind.index, behind.task)], Settings(processes=0))) as url:
        monkeypatch.setattr(Hosted, "open", lambda *_: 1 / 0)
        with Client(url) as client:
            job = client.reindex()
            with pytest.raises(
                NotTakenOverError, match=r"generation 2 of index a .* within 0.5 s.* log says why"
            ) as late:
                client.wait(job, progress=False, take_over_timeout=0.5)
            assert late.value.job.state == "succeeded"
            with pytest.raises(NotTakenOverError):
                asyncio.run(wait_async(url, job))
            assert client.influence(query_rows=[0]).index.generation == 1


@pytest.mark.parametrize(
    ("stderr", "complaint"),
    [
        (
            'index: 10%\nerror: no checkpoints.json; write\n  {"file": ...}\n',
            'no checkpoints.json; write\n  {"file": ...}',
        ),
        ("error: first\nerror: last\n", "last"),
        ("Traceback ...\nKeyError: 3\n", "KeyError: 3"),
        ("", ""),
    ],
)
def test_a_job_s_error_is_told_whole(stderr: str, complaint: str) -> None:
    assert last_complaint(stderr) == complaint


def test_data_that_cannot_be_read_again_is_told_with_the_remedy(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    project = Project(tmp_path, "rows_read_once")
    module = tmp_path / "rows_read_once.py"
    module.write_text(_DATA + "import sys\nassert not hasattr(sys, 'read_once'), 'twice'\nsys.read_once = True\n")
    catalog = Catalog([Hosted("a", project.index, project.task)])
    try:
        catalog.open_default()
        assert catalog.get(None).rows == FIRST
        project.store(ALL)
        project.command("append", str(project.index), "--task", project.task)
        wait_until(lambda: "restart the service" in caplog.text)
        assert "the old generation goes on answering" in caplog.text
        assert f"built from {ALL} training rows, task.train has {FIRST}" in caplog.text
        assert catalog.get(None).rows == FIRST
    finally:
        catalog.close()
