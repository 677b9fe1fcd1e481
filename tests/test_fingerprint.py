"""An index answers only for the task that it was built from; the message says what differs."""

from __future__ import annotations

import copy
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import tiny
from gradtrace import CheckpointError, DatasetError, GradtraceError, MismatchError, open_index
from gradtrace.data.dataset import content_hash
from tiny import ClassTask

ROWS = tiny.classes(100)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("built")
    tiny.build(ClassTask(tiny.mlp, ROWS), directory)
    return directory


def refused(directory: Path, task: ClassTask, error: type[GradtraceError], *words: str, **arguments: Any) -> None:
    with pytest.raises(error) as caught:
        open_index(directory / "index", task, **arguments)
    for word in words:
        assert re.search(word, str(caught.value)), str(caught.value)


def test_the_same_task_opens_from_another_process(built: Path) -> None:
    script = (
        "import sys, tiny\nfrom gradtrace import open_index\n"
        "print(open_index(sys.argv[1], tiny.ClassTask(tiny.mlp, tiny.classes(100))).rows)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(built / "index")], capture_output=True, text=True,
                          cwd=Path(__file__).parent, check=False)  # fmt: skip
    assert done.stdout == "100\n", done.stderr


# The data


def changed(row: int) -> list[tuple[Tensor, int]]:
    rows = list(ROWS)
    rows[row] = (rows[row][0].clone(), rows[row][1])
    rows[row][0][0] += 1e-6
    return rows


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([*ROWS, ROWS[0]], ["100 training rows", "has 101"]),
        (ROWS[:-1], ["100 training rows", "has 99"]),
        (changed(0), [r"train\[0\]", "content"]),
        (changed(99), [r"train\[99\]"]),
        (ROWS[::-1], [r"train\[0\]", "reordered"]),
        ([(x, (y + 1) % 3) for x, y in ROWS], [r"train\[0\]"]),
        ([(x.double(), y) for x, y in ROWS], [r"train\[0\]"]),
        (tiny.classes(100, seed=1), [r"train\[0\]"]),
    ],
    ids=["longer", "shorter", "first row", "last row", "reordered", "relabelled", "another dtype", "other data"],
)
def test_changed_data(built: Path, rows: Any, words: list[str]) -> None:
    refused(built, ClassTask(tiny.mlp, rows), MismatchError, *words)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (torch.zeros(2, 3), torch.zeros(3, 2)),
        (torch.zeros(2), torch.zeros(2).bfloat16()),
        (np.zeros(2, np.float32), np.zeros(2, np.int32)),
        ("ab", "ba"),
        (1, 1.5),
        (True, False),
        (Image.new("L", (2, 3)), Image.new("L", (3, 2))),
        (Image.new("RGB", (2, 2)), Image.new("RGB", (2, 2), "red")),
        ({"x": torch.zeros(2), "y": 1}, {"x": torch.zeros(2), "y": 2}),
        ([1, 2], [2, 1]),
    ],
)
def test_content_hash_tells_content_apart(a: Any, b: Any) -> None:
    assert content_hash((a, 0)) == content_hash((copy.deepcopy(a), 0))
    assert content_hash((a, 0)) != content_hash((b, 0))


def test_content_that_has_no_bytes() -> None:
    with pytest.raises(DatasetError, match="function"):
        content_hash((lambda: 0, 1))


def test_images_that_collate_turns_into_tensors(tmp_path: Path) -> None:
    """Data sets of PIL images, as Hugging Face's are: a new object at every read."""

    class Images:
        def __len__(self) -> int:
            return 30

        def __getitem__(self, row: int) -> Any:
            return Image.new("L", (5, 1), row), row % 3

    class ImageTask(ClassTask):
        def collate(self, examples: list[Any]) -> Any:
            inputs = torch.stack([torch.from_numpy(np.array(image)).flatten() / 255 for image, _ in examples])
            return inputs, torch.tensor([label for _, label in examples])

    assert tiny.build(ImageTask(tiny.mlp, Images()), tmp_path).rows == 30


# The model and the loss


class Scaled(nn.Sequential):
    """Prints as the plain model does, but computes something else."""

    def __init__(self) -> None:
        super().__init__(*tiny.mlp())

    def _get_name(self) -> str:
        return "Sequential"

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * 1.1)


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)), "parameters differ"),
        (lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)), "parameters differ"),
        (lambda: tiny.mlp().double(), "parameters differ"),
        (lambda: nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)), "layers differ"),
        (Scaled, r"loss of task\.train\[\d+\].*forward"),
    ],
    ids=["other names", "other shapes", "other dtype", "another activation", "another forward that prints the same"],
)
def test_changed_model(built: Path, make: Callable[[], nn.Module], word: str) -> None:
    refused(built, ClassTask(make, ROWS), MismatchError, word)


@pytest.mark.parametrize(
    "loss",
    [
        lambda model, batch: 2 * F.cross_entropy(model(batch[0]), batch[1], reduction="none"),
        lambda model, batch: F.cross_entropy(model(batch[0]), batch[1], reduction="none", label_smoothing=0.05),
        lambda model, batch: F.cross_entropy(
            model(batch[0]), batch[1], reduction="none", weight=torch.tensor([1, 1, 1.2])
        ),
    ],
    ids=["scaled", "smoothed", "weighted"],
)
def test_changed_loss(built: Path, loss: tiny.Loss) -> None:
    refused(built, ClassTask(tiny.mlp, ROWS, loss), MismatchError, r"loss of task\.train\[\d+\]", "was")


def test_changed_loss_of_a_model_that_is_nearly_always_right(tmp_path: Path) -> None:
    """Losses of 1e-5 and below, as trained models have: doubled ones are still seen."""
    rows = [(F.one_hot(torch.tensor(row % 3), 5).float() * (11 + row / 100), row % 3) for row in range(60)]
    make = lambda: nn.Linear(5, 3)  # noqa: E731
    task = ClassTask(make, rows)
    found = tiny.checkpoints(task, tmp_path / "checkpoints", 1)
    torch.save({"weight": torch.eye(5)[:3], "bias": torch.zeros(3)}, found[0].path)
    tiny.build_index(task, found, tmp_path / "index", basis="none", progress=False)
    double = ClassTask(make, rows, lambda model, batch: 2 * ClassTask.loss(task, model, batch))
    refused(tmp_path, double, MismatchError, "loss of task")


# The checkpoints


@pytest.fixture
def copied(built: Path, tmp_path: Path) -> Path:
    shutil.copytree(built, tmp_path / "copy")
    return tmp_path / "copy"


def test_index_and_checkpoints_move_together(copied: Path) -> None:
    (copied.parent / "elsewhere").mkdir()
    moved = Path(shutil.move(copied, copied.parent / "elsewhere"))
    assert open_index(moved / "index", ClassTask(tiny.mlp, ROWS)).rows == 100


def test_swapped_checkpoints(copied: Path) -> None:
    first, second = copied / "checkpoints" / "1.pt", copied / "checkpoints" / "2.pt"
    first.rename(copied / "other"), second.rename(first), (copied / "other").rename(second)
    refused(copied, ClassTask(tiny.mlp, ROWS), MismatchError, r"1\.pt is not the checkpoint", "SHA-256")


def test_checkpoint_trained_on(copied: Path) -> None:
    path = copied / "checkpoints" / "2.pt"
    state = torch.load(path, weights_only=True)
    state["0.bias"][0] += 1e-7
    torch.save(state, path)
    refused(copied, ClassTask(tiny.mlp, ROWS), MismatchError, r"2\.pt is not the checkpoint")


def test_missing_checkpoint(copied: Path) -> None:
    (copied / "checkpoints" / "1.pt").unlink()
    refused(copied, ClassTask(tiny.mlp, ROWS), CheckpointError, r"checkpoint 1\.pt are not at", "checkpoints=")


def test_moved_checkpoints(copied: Path) -> None:
    shutil.move(copied / "checkpoints", copied / "elsewhere")
    task = ClassTask(tiny.mlp, ROWS)
    refused(copied, task, CheckpointError, r"1\.pt are not at")
    assert open_index(copied / "index", task, checkpoints=copied / "elsewhere").rows == 100
    (copied / "elsewhere" / "2.pt").unlink()
    refused(copied, task, CheckpointError, r"2\.pt are not at", checkpoints=copied / "elsewhere")
