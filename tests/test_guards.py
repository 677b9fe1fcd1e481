"""What ruins attribution is refused with a remedy, and the user's model comes out as it went in."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

import tiny
from gradtrace import DatasetError, GradtraceError, Index, LossError, StoreError, TaskError
from gradtrace.errors import SlowPathWarning
from gradtrace.gradients.plan import GradientPath
from gradtrace_indexer.writing.shard_writer import ShardWriter
from tiny import ClassTask, PairTask

ROWS = tiny.classes(20)


def refused(error: type[GradtraceError], task: Any, directory: Path, *words: str, **arguments: Any) -> str:
    """The text of the error that building raises."""
    found = tiny.checkpoints(PairTask(task.make, ROWS), directory / "checkpoints")
    with pytest.raises(error) as caught:
        tiny.build_index(task, found, directory / "index", progress=False, **arguments)
    for word in words:
        assert re.search(word, str(caught.value)), str(caught.value)
    return str(caught.value)


def cross_entropy(**arguments: Any) -> tiny.Loss:
    return lambda model, batch: F.cross_entropy(model(batch[0]), batch[1], **arguments)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_reduced_loss(tmp_path: Path, reduction: str) -> None:
    task = PairTask(tiny.mlp, ROWS, cross_entropy(reduction=reduction))
    refused(LossError, task, tmp_path, r"shape \(\)", 'reduction="none"')


@pytest.mark.parametrize(
    ("loss", "word"),
    [
        (lambda model, batch: model(batch[0]), r"shape \(16, 3\)"),
        (lambda model, batch: F.cross_entropy(model(batch[0]), batch[1])[None], r"shape \(1,\)"),
        (lambda model, batch: 1.5, "shape float"),
        (lambda model, batch: (model(batch[0]).argmax(1) != batch[1]).long(), "int64"),
        (lambda model, batch: F.cross_entropy(model(batch[0]).detach(), batch[1], reduction="none"), "detach"),
    ],
    ids=["matrix", "mean with a dimension", "no tensor", "integers", "detached"],
)
def test_loss_that_is_no_number_per_example(tmp_path: Path, loss: tiny.Loss, word: str) -> None:
    refused(LossError, PairTask(tiny.mlp, ROWS, loss), tmp_path, word)


def with_input(row: int, value: float, rows: int = 200) -> list[tuple[Tensor, int]]:
    train = tiny.classes(rows)
    train[row] = (torch.full((5,), value), train[row][1])
    return train


@pytest.mark.parametrize("basis", ["gauss-newton", "spectral", "none"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_loss_that_is_not_finite_names_the_row(tmp_path: Path, basis: str, value: float) -> None:
    task = ClassTask(lambda: nn.Linear(5, 3), with_input(150, value))
    refused(LossError, task, tmp_path, "NaN or infinite", r"row\(s\) 150:", basis=basis)


def test_gradient_that_is_not_finite_names_the_row(tmp_path: Path) -> None:
    """The root of zero is finite, its slope is not."""
    task = PairTask(
        lambda: nn.Linear(5, 3, bias=False), with_input(150, 0.0), lambda m, b: m(b[0]).square().sum(1).sqrt()
    )
    refused(LossError, task, tmp_path, "gradient", "NaN or infinite", r"row\(s\) 150:", basis="none")


def test_loss_that_is_too_large_names_the_row(tmp_path: Path) -> None:
    """Finite, but no norm of its gradient would be."""
    rows = [(x, torch.tensor(1e32 if row == 150 else 1.0)) for row, (x, _) in enumerate(tiny.classes(200))]
    task = PairTask(lambda: nn.Linear(5, 1), rows, lambda m, b: m(b[0]).flatten() * b[1])
    found = tiny.checkpoints(task, tmp_path / "checkpoints")
    with pytest.raises(GradtraceError, match=r"150: the loss .* above 1e\+30"):
        tiny.build_index(task, found, tmp_path / "index", basis="none", batch_size=64, progress=False)


class Full(ShardWriter):
    """Has no room for a second batch."""

    def append(self, rows: Tensor) -> None:
        if self._written:
            raise StoreError("full")
        super().append(rows)


def test_threads_are_as_before_while_an_error_is_at_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its traceback keeps alive what the build was in the middle of."""
    monkeypatch.setattr("gradtrace_indexer.build.completion.ShardWriter", Full)
    torch.set_num_threads(3)
    with pytest.raises(StoreError, match="full") as caught:
        tiny.build(PairTask(tiny.mlp, ROWS), tmp_path, batch_size=4)
    assert torch.get_num_threads() == 3, f"changed while {caught.value} is handled"
    torch.set_num_threads(1)


class Stream(IterableDataset):  # type: ignore[type-arg]
    def __iter__(self) -> Iterator[Any]:
        return iter(ROWS)


class Augmented(Dataset):  # type: ignore[type-arg]
    """Every second view of an example is flipped, as torchvision's RandomHorizontalFlip does."""

    def __len__(self) -> int:
        return 20

    def __getitem__(self, row: int) -> Any:
        x, y = ROWS[row]
        return (x.flip(0) if torch.rand(()) < 0.5 else x), y


@pytest.mark.parametrize(
    ("train", "words"),
    [
        (DataLoader(ROWS, shuffle=True), ["DataLoader", r"loader\.dataset"]),  # type: ignore[arg-type]
        (Stream(), ["map-style"]),
        (None, ["map-style"]),
        ([], ["empty"]),
    ],
    ids=["loader", "stream", "nothing", "empty"],
)
def test_no_data_set(tmp_path: Path, train: Any, words: list[str]) -> None:
    refused(DatasetError, PairTask(tiny.mlp, train), tmp_path, *words)


@pytest.mark.parametrize("seed", range(10))
def test_random_augmentation(tmp_path: Path, seed: int) -> None:
    torch.manual_seed(seed)
    found = tiny.checkpoints(PairTask(tiny.mlp, ROWS), tmp_path / "checkpoints")
    torch.manual_seed(seed)
    with pytest.raises(DatasetError, match="augmentation"):
        tiny.build_index(PairTask(tiny.mlp, Augmented()), found, tmp_path / "index", progress=False)


def test_nothing_is_written_for_a_refused_task(tmp_path: Path) -> None:
    refused(LossError, PairTask(tiny.mlp, ROWS, cross_entropy()), tmp_path)
    assert tiny.files(tmp_path / "index") == {}


def test_missing_values_are_not_taken_for_augmentation(tmp_path: Path) -> None:
    """NaN is not equal to itself, but it is the same byte for byte."""
    refused(LossError, ClassTask(lambda: nn.Linear(5, 3), with_input(0, float("nan"))), tmp_path, "NaN")


class AlwaysDropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.layer(x), 0.5)  # no training=self.training


class BatchStatistics(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(5, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 3))


def test_dropout_in_eval_mode(tmp_path: Path) -> None:
    refused(LossError, PairTask(AlwaysDropping, ROWS), tmp_path, "F.dropout")


def test_batch_statistics(tmp_path: Path) -> None:
    refused(LossError, PairTask(BatchStatistics, ROWS), tmp_path, "track_running_stats=False", "alone")


def test_loss_divided_by_the_batch_size(tmp_path: Path) -> None:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none") / len(batch[0])

    refused(LossError, PairTask(tiny.mlp, ROWS, loss), tmp_path, "division by the batch size")


def test_layer_that_vmap_cannot_differentiate(tmp_path: Path) -> None:
    """It is differentiated by autograd, one example at a time."""
    task = PairTask(lambda: nn.Sequential(nn.Linear(5, 3), tiny.OwnScale(3)), ROWS)
    with pytest.warns(SlowPathWarning, match=r"1\.weight.*one example at a time.*layers"):
        index = tiny.build(task, tmp_path, count=1)
    assert index.contents.models[0].examination.choice.paths["1.weight"] is GradientPath.ALONE
    exact = [autograd_row(task, index, example) for example in ROWS]
    torch.testing.assert_close(tiny.stored(index)[:, 0], torch.stack(exact), rtol=1e-3, atol=1e-4)


def autograd_row(task: PairTask, index: Index, example: Any) -> Tensor:
    """All parameters' gradients of one example, in the order of the model's layers, biases last within a weight's."""
    model = task.model()
    model.load_state_dict(index.contents.models[0].model.state_dict())
    loss = task.loss(model, task.collate([example])).sum()
    weight, bias, scale = torch.autograd.grad(loss, list(model.parameters()))
    return torch.cat([torch.cat([weight, bias[:, None]], dim=1).flatten(), scale])


def test_nothing_to_train(tmp_path: Path) -> None:
    refused(TaskError, PairTask(lambda: nn.Linear(5, 3).requires_grad_(False), ROWS), tmp_path, "requires a gradient")


def test_wrong_arguments_are_refused_at_once(tmp_path: Path) -> None:
    task = PairTask(tiny.mlp, ROWS)
    for arguments in ({"dimensions": 0}, {"basis": "fourier"}, {"precision": "float8"}, {"batch_size": 0}):
        refused(GradtraceError, task, tmp_path, next(iter(arguments)).replace("_", ".?"), **arguments)


def state(model: nn.Module) -> dict[str, Any]:
    """Everything that may not change."""
    found: dict[str, Any] = {f"training of {name}": module.training for name, module in model.named_modules()}
    for name, module in model.named_modules():
        found[f"hooks of {name}"] = (
            len(module._forward_hooks),
            len(module._backward_hooks),
            len(module._forward_pre_hooks),
        )
        found[f"attributes of {name}"] = sorted(vars(module))
    for name, tensor in model.state_dict(keep_vars=True).items():
        where = (tensor.data_ptr(), tensor.stride(), tensor.dtype, tensor.requires_grad, tensor.grad is None)
        found[name] = (where, tensor.detach().numpy().tobytes())
    return found


def convolutional() -> nn.Module:
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Dropout(), nn.Flatten(), nn.Linear(64, 3)
    )
    model[1].eval()  # as when a part is fine-tuned
    model[0].bias.requires_grad_(False)
    return model


@pytest.mark.parametrize("fails", [False, True])
def test_model_is_left_as_it_was(tmp_path: Path, fails: bool) -> None:
    model = convolutional()
    rows = tiny.classes(20, (2, 6, 6))

    def failing(model: nn.Module, batch: Any) -> Tensor:
        loss = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
        return loss * float("nan") if len(batch[0]) > 2 else loss  # the guards pass, the build does not

    task = ClassTask(lambda: model, rows, failing if fails else None)
    found = tiny.checkpoints(task, tmp_path / "checkpoints")
    torch.set_num_threads(3)
    before, drawn = state(model), torch.random.get_rng_state()
    if fails:
        with pytest.raises(LossError):
            tiny.build_index(task, found, tmp_path / "index", dimensions=16, progress=False)
    else:
        index = tiny.build_index(task, found, tmp_path / "index", dimensions=16, progress=False)
        index.influence(rows[:2], k=3)
    assert state(model) == before
    assert torch.get_num_threads() == 3
    torch.set_num_threads(1)
    assert torch.equal(torch.random.get_rng_state(), drawn)
    assert torch.is_grad_enabled()


def test_attention_kernels_are_left_as_they_were(tmp_path: Path) -> None:
    """Parameters left to vmap need the plain attention kernel for a while, in several threads at once."""
    make: Callable[[], nn.Module] = lambda: nn.Sequential(  # noqa: E731
        nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), nn.Flatten(), nn.Linear(12, 3)
    )
    before = (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled())
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        tiny.build(ClassTask(make, tiny.classes(120, (3, 4))), tmp_path, count=1, batch_size=2)
    finally:
        torch.set_num_threads(threads)
    assert (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()) == before


def test_diverged_checkpoint_is_named(tmp_path: Path) -> None:
    task = PairTask(tiny.mlp, ROWS)
    found = tiny.checkpoints(task, tmp_path / "checkpoints")
    torch.save({name: value * float("nan") for name, value in found[0].load().items()}, found[0].path)
    with pytest.raises(LossError, match=r"checkpoint 1\.pt.*NaN"):
        tiny.build_index(task, found, tmp_path / "index", progress=False)
