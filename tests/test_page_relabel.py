"""A person cleans a training set of which every tenth label is wrong, on the page, and the model gets better."""

from __future__ import annotations

import csv
import re
import runpy
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from sklearn.datasets import load_digits

import gradtrace
from conftest import wait_until
from gradtrace import CheckpointRecorder
from gradtrace_client import Client
from gradtrace_indexer import build_index
from gradtrace_service.app import create_service
from gradtrace_service.indexes.hosted import Hosted
from gradtrace_service.server import serving
from gradtrace_service.settings import Settings
from page_browser import Visit

TRAIN_ROWS, FLIPPED_ROWS, LOOKED_AT = 1_200, 120, 200
JOB_MS = 600_000  # of a job, whose process loads PyTorch first
SEEDS = range(3)

# Reads the digits beside it. Trains with whole batches, so that the seed matters only for the first weights.
SCRIPT = """
from pathlib import Path
import numpy as np
import torch
from torch import nn
from gradtrace.tasks import ImageClassification

FILE = Path(__file__).with_name("digits.npz")

def model():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

def load(split):
    with np.load(FILE) as arrays:
        return arrays[f"{split}_images"], arrays[f"{split}_labels"]

class Digits(ImageClassification):
    def fit(self, rows, seed, after_step=None):
        torch.manual_seed(seed)
        network = self.model()
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
        images, labels = self.collate([self.train[row] for row in rows])
        for _ in range(STEPS):
            optimizer.zero_grad()
            self.loss(network, (images, labels)).mean().backward()
            optimizer.step()
            if after_step:
                after_step(network, optimizer)
        return network

STEPS = 300
TASK = Digits(model, lambda: load("train"), lambda: load("query"), class_names=[str(digit) for digit in range(10)])
"""


@dataclass(frozen=True)
class Project:
    """The task's folder, and what its owner does not know: the true labels."""

    folder: Path
    truth: npt.NDArray[np.int64]
    flipped: frozenset[int]

    @property
    def task(self) -> str:
        return f"{self.folder / 'task.py'}:TASK"


def write_task(folder: Path, labels: npt.NDArray[np.int64]) -> Any:
    """The task on these labels of the training rows; the query rows have their true ones."""
    digits = load_digits()
    images = (digits.images * 255 / 16).round().astype(np.uint8)
    folder.mkdir(exist_ok=True)
    (folder / "task.py").write_text(SCRIPT)
    arrays = {
        "train_images": images[:TRAIN_ROWS],
        "train_labels": labels,
        "query_images": images[TRAIN_ROWS:],
        "query_labels": digits.target[TRAIN_ROWS:],
    }
    np.savez(folder / "digits.npz", **arrays)
    return runpy.run_path(str(folder / "task.py"))["TASK"]


def accuracy(task: Any, rows: Sequence[int]) -> float:
    """On the query rows, after training on these rows: the mean over seeds."""
    images, labels = task.collate([task.query[row] for row in range(len(task.query))])
    networks = [task.fit(rows, seed) for seed in SEEDS]
    with torch.no_grad():
        return float(np.mean([(network(images).argmax(1) == labels).float().mean() for network in networks]))


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Every tenth label is another digit's; a training run with three checkpoints, and its index."""
    folder = tmp_path_factory.mktemp("relabel")
    truth = load_digits().target[:TRAIN_ROWS].astype(np.int64)
    random = np.random.default_rng(0)
    flipped = random.choice(TRAIN_ROWS, FLIPPED_ROWS, replace=False)
    labels = truth.copy()
    labels[flipped] = (labels[flipped] + random.integers(1, 10, FLIPPED_ROWS)) % 10
    task = write_task(folder, labels)
    recorder = CheckpointRecorder(folder / "checkpoints", every=100)
    task.fit(range(TRAIN_ROWS), 0, recorder.step)
    checkpoints = gradtrace.load_checkpoints(folder / "checkpoints")
    build_index(task, checkpoints, folder / "index", dimensions=256, progress=False)
    return Project(folder, truth, frozenset(flipped.tolist()))


@pytest.fixture
def visit(browser: Any, project: Project, tmp_path: Path) -> Iterator[Visit]:
    """Clean, of a service over a copy of the index."""
    shutil.copytree(project.folder, tmp_path / "project")
    hosted = Hosted("digits", tmp_path / "project" / "index", f"{tmp_path / 'project' / 'task.py'}:TASK")
    with serving(create_service([hosted], Settings(processes=0, state=tmp_path / "state.sqlite"))) as url:
        visit = Visit(browser, url, "#/clean")
        yield visit
        visit.page.context.close()
    assert not visit.complaints


def look_through(visit: Visit, project: Project, rows: Sequence[int]) -> None:
    """Goes through the rows as somebody would who sees in the pictures which digits they are."""
    visit.page.get_by_role("list", name="Rows to look at").get_by_role("button").first.click()
    for row in rows:
        tile = visit.page.locator(f'[aria-current="true"][aria-label^="row {row:,},"]')
        tile.and_(visit.page.locator(":focus")).wait_for()
        visit.page.get_by_label("The row that is looked at").get_by_text(f"Row {row:,}", exact=True).wait_for()
        if row in project.flipped:
            mark_wrong(visit, str(project.truth[row]), tile)
        else:
            visit.page.keyboard.press("j")


def mark_wrong(visit: Visit, digit: str, tile: Any) -> None:
    """By a key where the page suggests the right digit; else that is chosen. Then the next row is looked at."""
    suggestion = visit.page.get_by_role("combobox", name="Suggested label")
    if suggestion.locator("option:checked").text_content() == digit:
        visit.page.keyboard.press("w")
    else:
        suggestion.select_option(digit)
        tile.click()  # quick keys work again
        visit.page.keyboard.press("j")


def save_csv(visit: Visit, path: Path) -> dict[int, int]:
    """The label that the exported file suggests for each row that is marked wrong."""
    with visit.page.expect_download() as download:
        visit.page.get_by_role("button", name="CSV").click()
    download.value.save_as(path)
    with path.open(newline="") as file:
        return {int(line["row"]): int(line["label"]) for line in csv.DictReader(file) if line["mark"] == "wrong"}


def test_wrong_labels_are_found_by_keyboard_and_the_model_gets_better(
    visit: Visit, project: Project, tmp_path: Path
) -> None:
    with Client(visit.url) as client:
        first = [hit.row for hit in client.self_influence(k=LOOKED_AT).results]
        look_through(visit, project, first)
        wrong = project.flipped.intersection(first)
        wait_until(lambda: client.marks("wrong").rows_total == len(wrong))

        visit.page.get_by_role("link", name=re.compile("Act on the marks")).click()
        labels = save_csv(visit, tmp_path / "marks.csv")
        assert labels == {row: project.truth[row] for row in wrong}

        training = visit.page.get_by_role("region", name="Retraining")
        training.get_by_role("button", name=f"Train without {len(wrong)} rows").click()
        training.get_by_text("Measured, accuracy").wait_for(timeout=JOB_MS)
        (job,) = (job for job in client.jobs().jobs if job.operation == "retrain")
        measured = client.job(job).result
        assert measured is not None
        assert measured.accuracy is not None

        deletion = visit.page.get_by_role("region", name="Deletion")
        deletion.get_by_role("button", name=f"Delete {len(wrong)} rows").click()
        visit.page.get_by_role("dialog").get_by_role("button", name="Delete", exact=True).click()
        deletion.get_by_text("succeeded").wait_for(timeout=JOB_MS)
        assert client.generations().generations[0].rows == TRAIN_ROWS - len(wrong)

    before = write_task(tmp_path / "before", np.load(project.folder / "digits.npz")["train_labels"])
    corrected = np.load(project.folder / "digits.npz")["train_labels"]
    corrected[list(labels)] = list(labels.values())
    put_right = write_task(tmp_path / "put_right", corrected)
    everything = range(TRAIN_ROWS)
    accuracies = {
        "as it is": accuracy(before, everything),
        "without the marked rows": accuracy(before, [row for row in everything if row not in wrong]),
        "with their labels put right": accuracy(put_right, everything),
    }
    print(f"{len(wrong)} of {FLIPPED_ROWS} found in {LOOKED_AT}; job {measured.accuracy}; {accuracies}")
    assert len(wrong) > FLIPPED_ROWS / 2  # by chance, a sixth
    assert accuracies["without the marked rows"] > accuracies["as it is"]
    assert accuracies["with their labels put right"] > accuracies["as it is"]
