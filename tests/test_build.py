"""A build: killed and resumed, refused, out of space; and what it writes, byte for byte and row by row."""

from __future__ import annotations

import re
import resource
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tiny
from conftest import DigitsRun, mostly_long
from gradtrace import (
    CheckpointError,
    CorruptIndexError,
    IncompleteIndexError,
    Index,
    LossError,
    MismatchError,
    StoreError,
    gradients_reference,
    open_index,
)
from gradtrace_indexer import build_index, verify
from gradtrace_indexer.build import begin
from tiny import ClassTask, PairTask

ROWS = tiny.classes(50)


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven shards of 8 rows for each checkpoint of a task of 50 rows."""
    monkeypatch.setattr(begin, "_SHARD_ROWS", 8)


# Killed and resumed


@pytest.mark.recipe
@pytest.mark.parametrize("operation", mostly_long(["build", "add", "append", "delete", "compact"], "build"))
def test_what_is_killed_resumes_to_the_same_bytes(digits_index: DigitsRun, tmp_path: Path, operation: str) -> None:
    """Real processes, ended by SIGKILL before the first commit, inside shards and between them; another one reads."""
    command = [sys.executable, "-m", "benchmarks.kill_resume", "--operation", operation, "--task", digits_index.task,
               "--checkpoints", str(digits_index.checkpoints), "--runs", str(tmp_path), "--dimensions", "64",
               "--kills", "6" if operation == "build" else "4", "--shard-rows", "40"]  # fmt: skip
    root = Path(__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    moments = re.findall(r"^\| +\d+ \| [^|]* \| (\w[\w ]*\w) ", done.stdout, re.MULTILINE)
    assert len(moments) == (6 if operation == "build" else 4), done.stdout
    assert "before the first commit" in moments
    assert "inside a shard" in moments or operation == "delete"
    if operation != "build":
        assert re.search(r"every answer right: \d+ of generation [12]", done.stdout), done.stdout


def interrupted(directory: Path, task: ClassTask, **arguments: Any) -> None:
    """Leave the build of the task's rows unfinished: some shards are there, others not."""
    reads, pending = 0, directory / "index" / "pending.json"

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        nonlocal reads
        rows = pending.exists() and torch.is_grad_enabled()  # else the task is being examined
        reads += rows and len(batch[1]) == 8
        if reads == 3:
            raise LossError("stop here")
        return ClassTask.loss(task, model, batch)

    with pytest.raises(LossError, match="stop here"):
        tiny.build(ClassTask(task.make, task.train, loss), directory, batch_size=8, **arguments)
    manifest = pending.read_text()
    assert 0 < manifest.count('"start"') < 14


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("precision", ["float16", "int4"])
def test_interrupted_build_is_refused_by_readers_and_resumed_by_builders(tmp_path: Path, precision: str) -> None:
    task = ClassTask(tiny.mlp, ROWS)
    tiny.build(task, tmp_path / "whole", batch_size=8, precision=precision)
    interrupted(tmp_path / "broken", task, precision=precision)
    with pytest.raises(IncompleteIndexError, match="run it again"):
        open_index(tmp_path / "broken" / "index", task)
    assert verify(tmp_path / "broken" / "index") == ["the build was interrupted: run it again to resume"]
    tiny.build(task, tmp_path / "broken", batch_size=8, precision=precision)
    assert tiny.files(tmp_path / "broken" / "index") == tiny.files(tmp_path / "whole" / "index")


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("change", ["rows", "loss", "model"])
def test_resuming_with_another_task_is_refused_before_a_row_is_written(tmp_path: Path, change: str) -> None:
    """Else an index would hold rows of both, and look whole."""
    task = ClassTask(tiny.mlp, ROWS)
    interrupted(tmp_path, task)
    before = tiny.files(tmp_path / "index")
    other = {
        "rows": ClassTask(tiny.mlp, tiny.classes(50, seed=1)),
        "loss": ClassTask(tiny.mlp, ROWS, lambda model, batch: 2 * ClassTask.loss(task, model, batch)),
        "model": ClassTask(lambda: nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)), ROWS),
    }[change]
    with pytest.raises(MismatchError):
        tiny.build(other, tmp_path, batch_size=8)
    assert tiny.files(tmp_path / "index") == before


# Refused


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"basis": "gaussian", "dimensions": 16}, "dimensions"),
        ({"basis": "spectral", "dimensions": 12}, "basis"),
        ({"basis": "gaussian", "dimensions": 12, "precision": "int8"}, "precision"),
        ({"basis": "gaussian", "dimensions": 12, "seed": 1}, "seed"),
        ({"basis": "gaussian", "dimensions": 12, "count": 3}, "checkpoints"),
    ],
)
def test_directory_with_another_index_is_refused(tmp_path: Path, arguments: dict[str, Any], named: str) -> None:
    tiny.build(PairTask(tiny.mlp, ROWS), tmp_path, basis="gaussian", dimensions=12)
    before = tiny.files(tmp_path / "index")
    with pytest.raises(StoreError, match=rf"another index \(other {named}\)"):
        tiny.build(PairTask(tiny.mlp, ROWS), tmp_path, **arguments)
    assert tiny.files(tmp_path / "index") == before


@pytest.mark.parametrize("basis", ["gauss-newton", "spectral", "two-sided", "gaussian", "rademacher", "none"])
def test_finished_build_is_opened(tmp_path: Path, basis: str) -> None:
    """Also where fewer dimensions could be kept than were asked for."""

    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = tiny.mlp(), nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)  # type: ignore[no-any-return]

    task = PairTask(Unused, ROWS)
    tiny.build(task, tmp_path, basis=basis, dimensions=1000)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "index").rglob("*")}
    index = tiny.build(task, tmp_path, basis=basis, dimensions=1000)
    assert index.rows == 50
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "index").rglob("*")} == before


def test_two_builders_at_once(tmp_path: Path) -> None:
    """The lock is held by a process of its own."""
    script = (
        "import sys\nfrom pathlib import Path\nfrom gradtrace_indexer.writing.files import sole_writer\n"
        "with sole_writer(Path(sys.argv[1])):\n    print('locked', flush=True)\n    sys.stdin.read()\n"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "index")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert other.stdout is not None
    try:
        assert other.stdout.readline() == b"locked\n"
        with pytest.raises(StoreError, match="another process is building"):
            tiny.build(PairTask(tiny.mlp, ROWS), tmp_path)
    finally:
        other.communicate()
    assert tiny.build(PairTask(tiny.mlp, ROWS), tmp_path).rows == 50  # the lock went with its process


def test_a_name_that_files_of_an_index_cannot_carry_is_refused_in_words(tmp_path: Path) -> None:
    task = PairTask(tiny.mlp, ROWS)
    (found,) = tiny.checkpoints(task, tmp_path / "checkpoints", 1)
    for length, fits in ((200, True), (201, False), (250, False)):
        name = "c" * (length - 3) + ".pt"
        checkpoint = replace(found, path=found.path.rename(tmp_path / name))
        with nullcontext() if fits else pytest.raises(CheckpointError, match="200 bytes"):
            build_index(task, [checkpoint], tmp_path / str(length), progress=False)
        found = checkpoint


def test_checkpoints_are_given_once_and_in_order(tmp_path: Path) -> None:
    task = PairTask(tiny.mlp, ROWS)
    found = tiny.checkpoints(task, tmp_path / "checkpoints", 3)
    for wrong in ([], [found[0], found[0]], [found[1], found[0]]):
        with pytest.raises(CheckpointError):
            build_index(task, wrong, tmp_path / "index", progress=False)
    assert not (tmp_path / "index").exists()


def test_symbolic_links_lead_to_the_checkpoints(tmp_path: Path) -> None:
    """The index directory is reached through a link from elsewhere."""
    real = tmp_path / "disk" / "deep"
    real.mkdir(parents=True)
    (tmp_path / "runs").symlink_to(real)
    task = PairTask(tiny.mlp, ROWS)
    found = tiny.checkpoints(task, tmp_path / "checkpoints")
    assert build_index(task, found, tmp_path / "runs" / "index", progress=False).rows == 50
    assert open_index(real / "index", task).rows == 50


# Out of space


@pytest.mark.parametrize(
    ("limit", "basis"), [(100, "none"), (2200, "none"), (6000, "spectral"), (9000, "gauss-newton")]
)
def test_full_disk(tmp_path: Path, largest_file: Callable[[int], None], limit: int, basis: str) -> None:
    """At the basis, at the manifest, or at a shard: reported, and what is there is used once there is space."""
    task = ClassTask(tiny.mlp, tiny.classes(200))
    found = tiny.checkpoints(task, tmp_path / "full" / "checkpoints")
    torch.set_num_threads(3)  # which round a rotation in their own way
    tiny.build(task, tmp_path / "whole", basis=basis)
    largest_file(limit)
    with pytest.raises(StoreError, match=r"could not be written.*free some space") as caught:
        build_index(task, found, tmp_path / "full" / "index", basis=basis, precision="float16", progress=False)
    largest_file(resource.RLIM_INFINITY)
    assert torch.get_num_threads() == 3, f"left so while {caught.value} is handled"
    torch.set_num_threads(1)
    assert not list((tmp_path / "full").rglob("*.tmp"))
    tiny.build(task, tmp_path / "full", basis=basis)
    assert tiny.files(tmp_path / "full" / "index") == tiny.files(tmp_path / "whole" / "index")


# Damaged


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("whole")
    tiny.build(ClassTask(tiny.mlp, ROWS), directory, basis="gauss-newton")
    return directory


def index_files(directory: Path) -> list[str]:
    return list(tiny.files(directory))


NAMES = [
    "bases/0.1.safetensors",
    "columns/1.pt/000000000.1.parquet",
    "columns/2.pt/000000000.1.parquet",
    "curvature/1.pt.1.safetensors",
    "curvature/2.pt.1.safetensors",
    "manifest.json",
    "representations/2.pt/000000000.1.rows",
    "rows/1.pt/000000000.1.rows",
    "rows/2.pt/000000000.1.rows",
]
ONE_OF_EACH_KIND = [name for name in NAMES if not name.startswith(("columns/1", "curvature/1", "rows/1"))]


def test_an_index_has_these_files_and_no_others(whole: Path) -> None:
    assert index_files(whole / "index") == NAMES


def opened(directory: Path) -> Index:
    return open_index(directory / "index", ClassTask(tiny.mlp, ROWS))


def refuses(directory: Path, name: str) -> None:
    """`verify` names the file, and opening is refused for it."""
    with pytest.raises(CorruptIndexError, match=re.escape(name)):
        opened(directory)
    try:
        problems = verify(directory / "index")
    except CorruptIndexError as error:
        problems = [str(error)]
    assert len(problems) == 1
    assert name in problems[0]


@pytest.mark.parametrize("name", mostly_long(NAMES, *ONE_OF_EACH_KIND))
def test_one_changed_byte_is_found(whole: Path, name: str) -> None:
    """At the first and the last byte and at random ones, by one bit and by any amount."""
    path = whole / "index" / name
    content = path.read_bytes()
    random = np.random.default_rng(0)
    places = [0, len(content) - 1, *random.integers(len(content), size=20).tolist()]
    try:
        for place in places:
            for change in (1 << int(random.integers(8)), int(random.integers(1, 256)), 0x80):
                damaged = bytearray(content)
                damaged[place] ^= change
                path.write_bytes(damaged)
                refuses(whole, name)
    finally:
        path.write_bytes(content)
    assert opened(whole).rows == 50


def test_every_change_of_the_manifest_is_found(whole: Path) -> None:
    """Also those that mean the same to a JSON parser: other white space, another spelling of a number."""
    path = whole / "index" / "manifest.json"
    content = path.read_bytes()
    try:
        for damaged in (
            content.replace(b"\n ", b"\n\t", 1),
            content + b"\n",
            content.replace(b"0.05", b"0.050", 1),
            content.replace(b"0.05", b"0.05000000000000000277", 1),  # the same float64
            content.replace(b'"generation": 1', b'"generation": 2'),
        ):
            assert damaged != content
            path.write_bytes(damaged)
            refuses(whole, "manifest.json")
    finally:
        path.write_bytes(content)


@pytest.mark.parametrize("name", NAMES)
def test_truncated_or_missing_files_are_found(whole: Path, name: str) -> None:
    path = whole / "index" / name
    content = path.read_bytes()
    try:
        path.write_bytes(content[:-1])
        refuses(whole, name)
        if name != "manifest.json":
            with pytest.raises(CorruptIndexError, match=re.escape(name)):
                open_index(whole / "index", ClassTask(tiny.mlp, ROWS), verify=False)
        path.unlink()
        with pytest.raises(StoreError, match=re.escape(name)):
            opened(whole)
    finally:
        path.write_bytes(content)


def test_what_is_no_index(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "file"):
        with pytest.raises(StoreError, match="no index at"):
            open_index(path, PairTask(tiny.mlp, ROWS))


# Rows


@pytest.mark.parametrize("precision", ["float16", "int8", "int4"])
def test_rows_are_the_gradients_of_the_reference(tmp_path: Path, precision: str) -> None:
    task = ClassTask(tiny.mlp, ROWS)
    index = tiny.build(task, tmp_path, precision=precision, batch_size=7)
    for number, checkpoint in enumerate(tiny.checkpoints(task, tmp_path / "checkpoints")):
        model = tiny.loaded(task, checkpoint)
        gradients = gradients_reference(task, model, ROWS)
        names = ["0.weight", "0.bias"], ["2.weight", "2.bias"]
        expected = torch.cat(  # a layer's matrix with its bias as the last column
            [torch.cat([gradients[w], gradients[b][..., None]], dim=2).flatten(1) for w, b in names], dim=1
        )
        stored = tiny.stored(index)[:, number].double()
        largest = expected.abs().amax(dim=1, keepdim=True)
        if precision == "int4":  # some coordinates are clipped, see test_precision.py for single ones
            assert ((stored - expected).norm(dim=1) <= expected.norm(dim=1) * 0.25).all()
            continue
        step = largest / 127 / 2 if precision == "int8" else expected.abs() * 2**-11 + largest * 2**-24
        assert ((stored - expected).abs() <= step * 1.001 + 1e-6 * largest).all()


@pytest.mark.parametrize("basis", ["gauss-newton", "spectral", "two-sided", "gaussian", "none"])
def test_rows_do_not_depend_on_the_batch(tmp_path: Path, basis: str) -> None:
    """Rows of a build with another batch size, and one by one, agree to rounding."""
    task = ClassTask(tiny.mlp, ROWS)
    by_fifty = tiny.build(task, tmp_path / "fifty", basis=basis, dimensions=30, batch_size=50)
    one_by_one = tiny.build(task, tmp_path / "one", basis=basis, dimensions=30, batch_size=1)
    for checkpoint in range(2):
        a, b = (tiny.stored(index)[:, checkpoint] for index in (by_fifty, one_by_one))
        torch.testing.assert_close(a, b, rtol=2e-3, atol=1e-5)
        basis_of, model = by_fifty.contents.basis_of(checkpoint), by_fifty.contents.models[checkpoint]
        alone = torch.cat([model.encode(basis_of, model.batch([row]))[0] for row in ROWS])
        torch.testing.assert_close(a, alone, rtol=2e-3, atol=1e-5)


def test_rows_do_not_depend_on_the_number_of_threads(tmp_path: Path) -> None:
    """Four workers side by side write the bytes of one."""
    make = lambda: nn.Sequential(nn.Linear(5, 5), nn.Tanh(), OwnLayer())  # noqa: E731
    rows = tiny.classes(300)
    for threads in (1, 4):
        torch.set_num_threads(threads)
        tiny.build(ClassTask(make, rows), tmp_path / str(threads), basis="spectral", dimensions=20, batch_size=8)
    torch.set_num_threads(1)
    assert tiny.files(tmp_path / "4" / "index") == tiny.files(tmp_path / "1" / "index")


def test_columns_are_those_of_the_last_checkpoint(tmp_path: Path) -> None:
    task = ClassTask(tiny.mlp, ROWS)
    index = tiny.build(task, tmp_path, batch_size=7)
    model = tiny.loaded(task, tiny.checkpoints(task, tmp_path / "checkpoints")[-1])
    batch = task.collate(ROWS)
    with torch.no_grad():
        losses, predicted = task.loss(model, batch), task.predict(model, batch).argmax(1)
    gradients = tiny.flat(gradients_reference(task, model, ROWS))
    assert index.columns["label"].tolist() == [label for _, label in ROWS]
    assert index.columns["prediction"].tolist() == predicted.tolist()
    assert index.columns["correct"].tolist() == [
        p == label for p, (_, label) in zip(predicted.tolist(), ROWS, strict=True)
    ]
    np.testing.assert_allclose(index.columns["loss"], losses, rtol=1e-5)
    np.testing.assert_allclose(index.columns["norm"], gradients.norm(dim=1), rtol=1e-5)


def test_boolean_labels_are_classes(tmp_path: Path) -> None:
    rows = [(x, bool(label % 2)) for x, label in ROWS]
    task = PairTask(
        tiny.mlp, rows, lambda model, batch: F.cross_entropy(model(batch[0]), batch[1].long(), reduction="none")
    )
    index = tiny.build(task, tmp_path, count=1)
    assert index.columns["label"].tolist() == [int(label) for _, label in rows]


def test_wide_models_are_stored_in_float32_scales(tmp_path: Path) -> None:
    """float64 weights, losses and gradients: the rows are those of the float32 model."""
    rows = [(x.double(), label) for x, label in ROWS]
    for basis in ("none", "spectral", "gauss-newton"):
        wide = tiny.build(ClassTask(lambda: tiny.mlp().double(), rows), tmp_path / basis / "wide", basis=basis)
        narrow = tiny.build(ClassTask(tiny.mlp, ROWS), tmp_path / basis / "narrow", basis=basis)
        assert wide.influence(rows[:1])[0].proponents[0].row == narrow.influence(ROWS[:1])[0].proponents[0].row


class OwnLayer(nn.Module):
    """Nothing that Gradtrace knows."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.zeros(5, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.matrix


class Folded(nn.Module):
    """Positions folded into the batch before a layer, and unfolded after it."""

    def __init__(self) -> None:
        super().__init__()
        self.each, self.out = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        each = self.each(x.reshape(-1, 5)).tanh().reshape(len(x), -1, 4)
        return self.out(each.mean(1))


@pytest.mark.parametrize("basis", ["gauss-newton", "spectral", "none"])
@pytest.mark.parametrize(("make", "shape"), [(OwnLayer, (5,)), (Folded, (3, 5)), (lambda: nn.Linear(5, 3), (5,))])
def test_models_that_need_vmap_or_have_one_layer(
    tmp_path: Path, make: Callable[[], nn.Module], shape: tuple[int, ...], basis: str
) -> None:
    rows = tiny.classes(50, shape)
    task = ClassTask(make, rows)
    index = tiny.build(task, tmp_path, count=1, basis=basis)
    gradients = tiny.flat(
        gradients_reference(task, tiny.loaded(task, tiny.checkpoints(task, tmp_path / "checkpoints", 1)[0]), rows)
    )
    expected = gradients[:5] @ gradients.T
    np.testing.assert_allclose(
        index.scores(rows[:5], method="graddot"), expected, atol=2e-3 * float(expected.abs().max())
    )


class DeviceTask(ClassTask):
    """Asks the model for its parameters and its mode, as users' code does."""

    def predict(self, model: nn.Module, batch: Any) -> torch.Tensor:
        assert not model.training
        where = next(model.parameters()).device
        assert isinstance(model, nn.Sequential)
        return model(batch[0].to(where))  # type: ignore[no-any-return]


def test_predict_sees_the_model_itself(tmp_path: Path) -> None:
    index = tiny.build(DeviceTask(tiny.mlp, ROWS), tmp_path)
    assert (
        index.columns["prediction"].tolist()
        == tiny.build(ClassTask(tiny.mlp, ROWS), tmp_path / "other").columns["prediction"].tolist()
    )
