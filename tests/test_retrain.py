"""Retraining without some rows: by the command line, and as a job that may be killed, against training by hand."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fastapi import FastAPI
from scipy.stats import spearmanr
from typer.testing import CliRunner

import digits_task
import gradtrace
from conftest import DigitsRun, wait_until
from gradtrace import Task
from gradtrace_client import Client, InvalidRequestError, ProblemError
from gradtrace_indexer import delete_rows
from gradtrace_indexer.cli import app as commands
from gradtrace_indexer.task_loading import load_task
from gradtrace_service.app import create_service
from gradtrace_service.indexes.hosted import Hosted
from gradtrace_service.server import serving
from gradtrace_service.settings import Settings

LOGGED = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from digits_task import NAMES, TASK as PLAIN, Retrained

LOG = Path(__file__).with_name("fits")

class Logged(Retrained):
    def fit(self, rows, seed):
        with LOG.open("a") as log:
            log.write(f"{{os.getpid()}} {{len(rows)}}\\n")
        while Path(__file__).with_name("wait").exists() and len(rows) < 400:
            time.sleep(0.1)
        return super().fit(rows, seed)

TASK = Logged(PLAIN.model, PLAIN.train, PLAIN.query, class_names=NAMES)
"""
REMOVED = list(range(0, 400, 5))
QUERIES = [3, 1, 4, 15]
PATIENCE = 1800  # seconds: a process starts, opens the index and trains, and does so again where it is killed


@pytest.fixture
def run(copied_run: DigitsRun, tmp_path: Path) -> DigitsRun:
    script = tmp_path / "retrained.py"
    script.write_text(LOGGED.format(tests=str(Path(digits_task.__file__).parent)))
    return replace(copied_run, task=f"{script}:TASK")


def service(run: DigitsRun) -> FastAPI:
    return create_service([Hosted("index", run.index, run.task)], Settings(processes=0))


@pytest.fixture
def client(run: DigitsRun) -> Iterator[Client]:
    with serving(service(run)) as address, Client(address, retries=0) as connected:
        yield connected


@pytest.fixture(scope="module")
def idle(idle_run: DigitsRun) -> Iterator[Client]:
    """Of a service that is asked for nothing that it does."""
    run = replace(idle_run, task=f"{digits_task.__file__}:RETRAINED")
    with serving(service(run)) as address, Client(address, retries=0) as connected:
        yield connected


def by_hand(task: Task, rows: list[int], seed: int, queries: list[int]) -> tuple[Any, float]:
    """Losses [queries] and accuracy of a model trained on these rows."""
    model = task.fit(rows, seed)
    images, labels = task.collate([task.query[row] for row in queries])
    with torch.no_grad():
        logits = model(images)
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    return losses.numpy(), float((logits.argmax(1) == labels).double().mean())


def check(result: Any, run: DigitsRun, everything: list[int], queries: list[int], seed: int = 0) -> None:
    """A result, as a dict, against training by hand and sums of scores."""
    task = load_task(run.task)
    remaining = [row for row in everything if row not in REMOVED]
    (before, right_before), (after, right_after) = (
        by_hand(task, rows, seed, queries) for rows in (everything, remaining)
    )
    np.testing.assert_allclose(result["before"], before, rtol=1e-4)
    np.testing.assert_allclose(result["after"], after, rtol=1e-4)
    np.testing.assert_allclose(result["measured"], [before.mean(), after.mean()], rtol=1e-4)
    assert result["measured_change"] == pytest.approx((after - before).mean(), rel=1e-3, abs=1e-6)
    assert result["accuracy"] == pytest.approx([right_before, right_after])
    assert (result["queries"], result["seed"], result["measurement"]) == (queries, seed, "loss")
    assert (result["rows"], result["removed"]) == (len(everything), len(everything) - len(remaining))
    index = gradtrace.open_index(run.index, task)
    out = [row for row in REMOVED if row in everything]
    for of in result["predictions"]:
        sums = index.scores([task.query[row] for row in queries], method=of["method"])[:, out].sum(1, dtype=float)
        np.testing.assert_allclose(of["score_sums"], sums, rtol=1e-4)
        correlation = spearmanr(sums, after - before).statistic
        assert of["spearman"] == pytest.approx(correlation, abs=1e-6)
        if (divisor := {"influence": 1200, "source": 400}.get(of["method"])) is not None:
            np.testing.assert_allclose(of["predicted_changes"], sums / divisor, rtol=1e-4)
            assert of["predicted_change"] == pytest.approx(sums.mean() / divisor, rel=1e-4)


def test_the_command_line_compares_with_all_methods_that_forecast(run: DigitsRun, tmp_path: Path) -> None:
    (tmp_path / "rows").write_text("".join(f"{row}\n" for row in REMOVED))
    words = ["retrain", str(run.index), "--task", run.task, "--without-rows", str(tmp_path / "rows")]
    words += ["--out", str(tmp_path / "out.json"), "--seed", "7"]
    done = CliRunner().invoke(commands, words, catch_exceptions=False)
    result = json.loads((tmp_path / "out.json").read_text())
    check(result, run, list(range(400)), list(range(60)), seed=7)
    assert [of["method"] for of in result["predictions"]] == ["influence", "source"]
    assert (result["method"], result["predicted_change"]) == ("influence", result["predictions"][0]["predicted_change"])
    assert "mean of 60 query rows" in done.stdout
    assert "| influence | " in done.stdout
    assert not (tmp_path / "out.json.trainings").exists()


def test_a_job_retrains_and_keeps_its_result(run: DigitsRun, client: Client) -> None:
    job = client.wait(client.retrain(REMOVED, query_rows=QUERIES, seed=3, method="tracin"))
    assert (job.operation, job.state, job.rows, job.seed, job.generation) == ("retrain", "succeeded", 80, 3, 1)
    assert job.result is not None
    check(job.result.model_dump(mode="json"), run, list(range(400)), QUERIES, seed=3)
    assert (job.result.method, job.result.predicted_change) == (None, None)
    assert list(job.result.to_pandas()["row"]) == QUERIES
    assert "without 80 rows" in job._repr_html_()
    assert [listed.result for listed in client.jobs().jobs] == [None]
    wait_until(lambda: not list((run.index / "jobs").iterdir()))
    with serving(service(run)) as url, Client(url) as again:
        assert again.job(job).result == job.result


def test_deleted_rows_are_in_neither_training(run: DigitsRun, client: Client) -> None:
    delete_rows(run.index, [1, 2, 3])
    wait_until(lambda: client.index().generation == 2)
    job = client.wait(client.retrain(REMOVED, query_rows=QUERIES, method="influence"))
    assert job.result is not None
    check(job.result.model_dump(mode="json"), run, [0, *range(4, 400)], QUERIES)


@pytest.mark.long
def test_a_killed_process_is_started_again_and_trains_only_what_lacks(run: DigitsRun, client: Client) -> None:
    """The index can be written meanwhile, and no second model is retrained."""
    waiting, fits = run.index.with_name("wait"), run.index.with_name("fits")
    waiting.touch()
    job = client.retrain(REMOVED, query_rows=QUERIES)
    for started in (2, 3):
        wait_until(lambda count=started: begun(fits) == count, PATIENCE)  # type: ignore[misc]
        assert client.job(job).progress in (0.0, 0.5)
        os.kill(int(fits.read_text().split()[-2]), signal.SIGKILL)
    wait_until(lambda: begun(fits) == 4 and client.job(job).progress == 0.5, PATIENCE)
    with pytest.raises(ProblemError, match=job.id) as caught:
        client.retrain([1])
    assert caught.value.status == 409
    assert client.wait(client.delete_rows([1])).generation == 2
    waiting.unlink()
    last = client.wait(job)
    assert (last.state, last.attempts) == ("succeeded", 3)
    assert [line.split()[1] for line in fits.read_text().splitlines()] == ["400", "320", "320", "320"]
    assert last.result is not None
    check(last.result.model_dump(mode="json"), run, list(range(400)), QUERIES)


def begun(fits: Path) -> int:
    """Trainings."""
    return len(fits.read_text().splitlines()) if fits.exists() else 0


@pytest.mark.long
def test_a_service_that_is_started_again_resumes_the_retraining(run: DigitsRun) -> None:
    waiting, fits = run.index.with_name("wait"), run.index.with_name("fits")
    waiting.touch()
    with serving(service(run)) as url, Client(url) as client:
        job = client.retrain(REMOVED, query_rows=QUERIES)
        wait_until(lambda: client.job(job).progress == 0.5, PATIENCE)
    waiting.unlink()
    with serving(service(run)) as url, Client(url) as client:
        last = client.wait(job)
    assert last.result is not None
    assert [line.split()[1] for line in fits.read_text().splitlines()].count("400") == 1
    check(last.result.model_dump(mode="json"), run, list(range(400)), QUERIES)


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "without_rows"),
        ({"without_rows": []}, "without_rows"),
        ({"without_rows": [1, 400]}, "without_rows[1]"),
        ({"without_rows": list(range(400))}, "without_rows"),
        ({"without_rows": [1], "query_rows": [0, 60]}, "query_rows[1]"),
        ({"without_rows": [1], "query_rows": [0] * 129}, "query_rows"),
        ({"without_rows": [1], "seed": -1}, "seed"),
        ({"without_rows": [1], "seed": 2**32}, "seed"),
        ({"without_rows": [1], "method": "trak"}, "method"),
        ({"without_rows": [1], "index": "other"}, "index"),
        ({"without_rows": [1], "k": 1}, "k"),
    ],
)
def test_what_cannot_be_retrained_is_refused_by_its_field(idle: Client, body: object, field: str) -> None:
    refused = idle._http.post("/retrain", json=body)
    assert refused.status_code == 422, refused.text
    assert refused.json()["errors"][0]["field"] == field
    assert idle.jobs().jobs == []


def test_a_task_without_fit_says_what_to_define(digits_index: DigitsRun) -> None:
    hosted = [Hosted("index", digits_index.index, digits_index.task)]
    app = create_service(hosted, Settings(processes=0))
    refused = pytest.raises(InvalidRequestError, match=r"define fit\(self, rows, seed\)")
    with serving(app) as url, Client(url) as client, refused:
        client.retrain([1])


def test_a_failing_fit_fails_the_job(run: DigitsRun, client: Client) -> None:
    script = run.index.with_name("retrained.py")
    script.write_text(script.read_text().replace("return super().fit(rows, seed)", "raise ValueError('no luck')"))
    *_, last = client.follow(client.retrain([1], query_rows=[0]))
    assert last.state == "failed"
    assert "no luck" in str(last.error)
    wait_until(lambda: not list((run.index / "jobs").iterdir()))
