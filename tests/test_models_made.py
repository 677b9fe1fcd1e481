"""How often a build makes models and reads weights: each model once a stage, each file's digest and moments once."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import digits_task
from gradtrace import CheckpointRecorder, devices, load_checkpoints
from gradtrace.checkpoints.second_moments import SecondMoments
from gradtrace.models.gradient_model import GradientModel
from gradtrace_indexer import add_checkpoints, append_rows, build_index

CHECKPOINTS = 5


def train(directory: Path) -> None:
    """Record five checkpoints with second moments."""
    task = digits_task.TASK
    torch.manual_seed(0)
    network = task.model()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    images, labels = task.collate([task.train[row] for row in range(digits_task.TRAIN_ROWS)])
    with CheckpointRecorder(directory, every=4, optimizer_state=True) as recorder:
        for _ in range(4 * CHECKPOINTS):
            optimizer.zero_grad()
            F.cross_entropy(network(images), labels).backward()
            optimizer.step()
            recorder.step(network, optimizer)


class Counts:
    """Real calls: models by checkpoint, files that are read byte by byte to be hashed, second moments loaded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, checkpoints: Path) -> None:
        self.models: Counter[str] = Counter()
        self.hashed: Counter[str] = Counter()
        self.moments = 0
        make_model, make_moments, open_file = GradientModel.__init__, SecondMoments.__init__, Path.open

        def model(instance: Any, task: Any, checkpoint: Any, *others: Any, **settings: Any) -> None:
            self.models[checkpoint.name] += 1
            make_model(instance, task, checkpoint, *others, **settings)

        def moments(*arguments: Any) -> None:
            self.moments += 1
            make_moments(*arguments)

        def opened(path: Path, *arguments: Any, **settings: Any) -> Any:
            if path.parent == checkpoints.resolve() and path.suffix == ".safetensors":
                self.hashed[path.name] += 1
            return open_file(path, *arguments, **settings)

        monkeypatch.setattr(GradientModel, "__init__", model)
        monkeypatch.setattr(SecondMoments, "__init__", moments)
        monkeypatch.setattr(Path, "open", opened)


@pytest.mark.parametrize(("precision", "threads", "stages"), [("int8", 1, 4), ("int8", 4, 4), ("int4", 1, 5)])
def test_a_build_makes_each_model_once_a_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: Any, threads: int, stages: int
) -> None:
    """The stages are the spectral basis, its rotation, int4's column scales, writing and checking rows, and opening."""
    train(tmp_path / "checkpoints")
    counts = Counts(monkeypatch, tmp_path / "checkpoints")
    found = load_checkpoints(tmp_path / "checkpoints")
    with devices.threads(threads):  # as many row workers
        build_index(digits_task.TASK, found, tmp_path / "index", dimensions=64, precision=precision, progress=False)
    *earlier, last = (checkpoint.name for checkpoint in found)
    assert len(earlier) == CHECKPOINTS - 1
    assert {counts.models[name] for name in earlier} == {stages}
    assert counts.models[last] == 3  # the reference of the fit is used for the rotation and the scales, too
    assert set(counts.hashed.values()) == {1}
    assert len(counts.hashed) == 2 * CHECKPOINTS  # weights and second moments
    assert counts.moments == CHECKPOINTS


def test_an_update_makes_what_is_new_and_opens_the_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tmp_path / "checkpoints")
    *earlier, last = load_checkpoints(tmp_path / "checkpoints")
    build_index(digits_task.TASK, earlier, tmp_path / "index", dimensions=64, progress=False)
    counts = Counts(monkeypatch, tmp_path / "checkpoints")
    add_checkpoints(tmp_path / "index", digits_task.TASK, [last], progress=False)
    assert counts.models[last.name] == 2  # computing its columns, and opening
    assert counts.models[earlier[-1].name] == 2  # recognising the task, and opening
    assert {counts.models[checkpoint.name] for checkpoint in earlier[:-1]} == {1}
    assert counts.moments == 1
    assert all("000000020" in name for name in counts.hashed)
    append_rows(tmp_path / "index", digits_task.TASK, progress=False)
    assert {counts.models[checkpoint.name] for checkpoint in earlier[:-1]} == {2}
