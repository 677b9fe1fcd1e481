"""What a recorder sees of a training, against autograd, closed forms and finite differences."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tiny
from gradtrace import InfluenceRecorder, RecordingError, Task, UnsupportedLayerError, read_recording
from gradtrace.recording.hydra import ReplayedSgd, SgdStep

ALL = 1 << 20  # dimensions: every parameter, so that the basis is the identity
ROWS = 24


def network() -> nn.Module:
    """Dropout, batch statistics, and every kind of common layer."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Dropout(0.3),
        nn.Flatten(), nn.Linear(100, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3),
    )  # fmt: skip


def image_task() -> Task:
    return tiny.ClassTask(network, tiny.classes(ROWS, (1, 5, 5)))


def mlp_task(rows: int = ROWS) -> Task:
    return tiny.ClassTask(tiny.mlp, tiny.classes(rows))


def batches(task: Task, size: int, steps: int) -> Iterator[tuple[Tensor, Any]]:
    """Rows and their batch; drawn with repetition, so that some stand twice in a batch."""
    generator = torch.Generator().manual_seed(5)
    for _ in range(steps):
        rows = torch.randint(len(task.train), (size,), generator=generator)
        yield rows, task.collate([task.train[row] for row in rows.tolist()])


Step = Callable[[nn.Module, torch.optim.Optimizer, Tensor], Any]


def train(
    task: Task,
    recorder: InfluenceRecorder | None,
    size: int = 6,
    steps: int = 12,
    start: int = 0,
    begun: tuple[nn.Module, torch.optim.Optimizer] | None = None,
    **sgd: Any,
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A training with a schedule; goes on from `begun` at step `start`."""
    if begun is None:
        torch.manual_seed(0)
        model = task.model().train()
        begun = model, torch.optim.SGD(model.parameters(), **{"lr": 0.1, **sgd})
    model, optimizer = begun
    for step, (rows, batch) in enumerate(batches(task, size, steps)):
        if step < start:
            continue
        optimizer.param_groups[0]["lr"] = 0.1 / (1 + 0.1 * step)
        if recorder is None:
            one_step(task, model, optimizer, batch)
        else:
            with recorder.step(model, optimizer, rows):
                one_step(task, model, optimizer, batch)
    return model, optimizer


def one_step(task: Task, model: nn.Module, optimizer: torch.optim.Optimizer, batch: Any) -> None:
    loss = task.loss(model, batch).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


@pytest.mark.parametrize("size", [1, 6])
def test_training_is_the_same_to_the_last_bit(tmp_path: Path, size: int) -> None:
    task = image_task()
    plain, _ = train(task, None, size, momentum=0.9)
    expected = torch.rand(3)
    recorder = InfluenceRecorder(tmp_path, task, dimensions=128, probes=[task.train[0], task.train[1]])
    recorded, _ = train(task, recorder, size, momentum=0.9)
    assert torch.equal(torch.rand(3), expected)
    assert recorded.training
    for name, value in plain.state_dict().items():
        assert torch.equal(recorded.state_dict()[name], value), name
    assert not any(module._forward_hooks for module in recorded.modules())


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_ideal_scores_sum_up_to_the_whole_fall_of_the_loss(tmp_path: Path, momentum: float) -> None:
    """Lemma 3.1 of Pruthi et al. 2020."""
    task = image_task()
    probes = [task.train[row] for row in range(5)]
    recorder = InfluenceRecorder(tmp_path, task, dimensions=0, probes=probes)
    torch.manual_seed(0)
    batch = task.collate(probes)
    with torch.no_grad():
        before = task.loss(task.model().eval(), batch).double()
    model, _ = train(task, recorder, size=1, steps=60, momentum=momentum)
    recording = recorder.finish()
    with torch.no_grad():
        after = task.loss(model.eval(), batch).double()
    np.testing.assert_array_equal(recording.probe_losses, torch.stack([before, after]).numpy())
    fall = (before - after).numpy()
    assert np.abs(fall).min() > 1e-3
    np.testing.assert_allclose(recording.probe_scores.sum(1), fall, rtol=1e-12)


def gradients(task: Task, model: nn.Module, batch: Any) -> Tensor:
    """Per-example gradients by plain autograd, in the order of model.parameters(). [batch, parameters]."""
    parameters = list(model.parameters())
    rows = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in task.loss(model, batch)]
    return torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])


def test_minibatch_scores_are_the_first_order_terms(tmp_path: Path) -> None:
    task = mlp_task()
    probes = [task.train[0], task.train[1]]
    recorder = InfluenceRecorder(tmp_path, task, dimensions=0, probes=probes)
    torch.manual_seed(0)
    model = task.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    expected = np.zeros((2, ROWS))
    for rows, batch in batches(task, 4, 10):
        products = gradients(task, model, task.collate(probes)) @ gradients(task, model, batch).T
        np.add.at(expected.T, rows.numpy(), (0.2 / 4 * products.T).numpy())
        with recorder.step(model, optimizer, rows):
            one_step(task, model, optimizer, batch)
    recording = recorder.finish()
    np.testing.assert_allclose(recording.probe_scores, expected, rtol=1e-4, atol=1e-7)
    with pytest.raises(RecordingError, match="on probes alone"):
        _ = recording.hydra_rows


def test_scores_of_networks_with_batch_statistics_add_up_to_the_fall_for_small_steps(tmp_path: Path) -> None:
    """In eval mode of the training, where the probe's loss is that of the training."""
    task = image_task()
    probes = [task.train[0], task.train[1]]
    recorder = InfluenceRecorder(tmp_path, task, dimensions=0, probes=probes)
    torch.manual_seed(0)
    model = task.model().eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    for rows, batch in batches(task, 8, 20):
        with recorder.step(model, optimizer, rows):
            one_step(task, model, optimizer, batch)
    recording = recorder.finish()
    before, after = recording.probe_losses
    np.testing.assert_allclose(recording.probe_scores.sum(1), before - after, rtol=0.02)


def in_parameter_order(recording: Any, model: nn.Module) -> npt.NDArray[np.float64]:
    """HyDRA rows of an identity basis, columns as in model.parameters(). [rows, parameters]."""
    columns = []
    for name, module in model.named_modules():
        if name in recording.basis.layers:
            own = recording.basis.layers[name].columns
            inputs = own.reshape(module.weight.shape[0], -1)
            columns += [inputs[:, : module.weight[0].numel()].flatten()]
            columns += [inputs[:, -1]] if module.bias is not None else []
    return np.asarray(recording.hydra_rows[:, torch.cat(columns).numpy()], np.float64)


def brute_force(task: Task, size: int, steps: int, **sgd: Any) -> Tensor:
    """SGD's recursion for d theta / d w of every row at every step, in float64, without Hessian. [rows, parameters]."""
    torch.manual_seed(0)
    model = task.model()
    optimizer = torch.optim.SGD(model.parameters(), **{"lr": 0.1, **sgd})
    momentum, decay, nesterov = (sgd.get(k, 0) for k in ("momentum", "weight_decay", "nesterov"))
    u = torch.zeros(len(task.train), sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    s = torch.zeros_like(u)
    for step, (rows, batch) in enumerate(batches(task, size, steps)):
        rate = optimizer.param_groups[0]["lr"] = 0.1 / (1 + 0.1 * step)
        g = decay * u
        g.index_add_(0, rows, gradients(task, model, batch).double() / size)
        s = momentum * s + g
        u = u - rate * (g + momentum * s if nesterov else s)
        one_step(task, model, optimizer, batch)
    return -u


SGD = [
    {},
    {"weight_decay": 0.2},
    {"momentum": 0.9},
    {"momentum": 0.8, "weight_decay": 0.2},
    {"momentum": 0.8, "weight_decay": 0.2, "nesterov": True},
    {"momentum": 0.1, "weight_decay": 0.5},
]


@pytest.mark.parametrize("sgd", SGD)
@pytest.mark.parametrize("size", [1, 6])
def test_hydra_rows_are_those_of_the_whole_recursion(tmp_path: Path, sgd: dict[str, Any], size: int) -> None:
    """Some rows are used at the last step, some long before, some never."""
    task = mlp_task(rows=60)
    recorder = InfluenceRecorder(tmp_path, task, dimensions=ALL)
    model, _ = train(task, recorder, size, steps=60, **sgd)
    found = in_parameter_order(recorder.finish(), model)
    expected = brute_force(task, size, steps=60, **sgd).numpy()
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-6 * np.abs(expected).max())
    assert [path.name for path in sorted(tmp_path.iterdir())] == [
        "basis.safetensors", "probes.safetensors", "recording.json", "rows.f32",
    ]  # fmt: skip


class LinearTask(tiny.PairTask):
    """A loss that is linear in the weights, so that nothing has a Hessian."""

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return batch[1] * model(batch[0]).flatten()


def final_weights(task: Task, row: int, extra: float, sgd: dict[str, Any], size: int = 6, steps: int = 40) -> Tensor:
    """At the end of the same training, in float64, with 1 + extra for the row's weight."""
    torch.manual_seed(0)
    model = task.model().double()
    optimizer = torch.optim.SGD(model.parameters(), **{"lr": 0.1, **sgd})
    for step, (rows, batch) in enumerate(batches(task, size, steps)):
        optimizer.param_groups[0]["lr"] = 0.1 / (1 + 0.1 * step)
        weights = 1 + extra * (rows == row).double()
        optimizer.zero_grad()
        (weights * task.loss(model, (batch[0].double(), *batch[1:]))).mean().backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def weight_derivative(task: Task, row: int, sgd: dict[str, Any]) -> Tensor:
    up, down = (final_weights(task, row, extra, sgd) for extra in (1e-4, -1e-4))
    return (up - down) / 2e-4


@pytest.mark.parametrize("sgd", [{}, SGD[3], SGD[4]])
def test_hydra_rows_are_the_derivative_of_the_final_weights(tmp_path: Path, sgd: dict[str, Any]) -> None:
    """Exactly where there is no Hessian."""
    task = LinearTask(lambda: nn.Sequential(nn.Linear(5, 1)), tiny.values(ROWS))
    recorder = InfluenceRecorder(tmp_path, task, dimensions=ALL)
    model, _ = train(task, recorder, steps=40, **sgd)
    found = in_parameter_order(recorder.finish(), model)
    for row in (0, 7, ROWS - 1):
        expected = -weight_derivative(task, row, sgd).numpy()
        np.testing.assert_allclose(found[row], expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_hydra_rows_come_near_the_derivative_where_there_is_a_hessian(tmp_path: Path) -> None:
    task, sgd = mlp_task(), {"momentum": 0.5, "weight_decay": 0.01}
    recorder = InfluenceRecorder(tmp_path, task, dimensions=ALL)
    model, _ = train(task, recorder, steps=40, **sgd)
    found = in_parameter_order(recorder.finish(), model)
    expected = np.stack([-weight_derivative(task, row, sgd).numpy() for row in range(ROWS)])
    agreement = np.corrcoef(found.flatten(), expected.flatten())[0, 1]
    assert agreement > 0.8, agreement


def test_the_projection_of_a_row_is_the_row_of_the_projection(tmp_path: Path) -> None:
    """In fewer dimensions, inner products are kept in expectation."""
    task = image_task()
    found = {}
    for name, dimensions in (("all", ALL), ("few", 300)):
        recorder = InfluenceRecorder(tmp_path / name, task, dimensions=dimensions)
        train(task, recorder, momentum=0.9)
        found[name] = recorder.finish().hydra_rows
    assert found["few"].shape[1] <= 300 < found["all"].shape[1]
    products = [(rows @ rows.T).flatten() for rows in found.values()]
    assert np.corrcoef(products)[0, 1] > 0.9


@pytest.mark.parametrize("sgd", [SGD[1], SGD[4]])
def test_a_resumed_training_leaves_the_same_recording(tmp_path: Path, sgd: dict[str, Any]) -> None:
    task = image_task()
    probes = [task.train[3]]
    whole = InfluenceRecorder(tmp_path / "whole", task, dimensions=200, probes=probes)
    train(task, whole, **sgd)
    whole.finish()

    killed = InfluenceRecorder(tmp_path / "parts", task, dimensions=200, probes=probes)
    begun = train(task, killed, steps=7, **sgd)
    torch.save(killed.state_dict(), tmp_path / "state.pt")
    random = torch.random.get_rng_state()
    resumed = InfluenceRecorder(tmp_path / "parts", task, dimensions=200, probes=probes)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt"))
    torch.random.set_rng_state(random)
    train(task, resumed, start=7, begun=begun)
    resumed.finish()

    assert tiny.files(tmp_path / "whole") == tiny.files(tmp_path / "parts")


def test_a_recording_is_whole_or_none(tmp_path: Path) -> None:
    task = mlp_task()
    recorder = InfluenceRecorder(tmp_path, task)
    train(task, recorder)
    with pytest.raises(RecordingError, match=r"not a finished recording; call InfluenceRecorder.finish"):
        read_recording(tmp_path)
    recorder.finish()
    assert read_recording(tmp_path).entry.steps == 12
    with pytest.raises(RecordingError, match="has a recording already"):
        InfluenceRecorder(tmp_path, task)
    content = (tmp_path / "rows.f32").read_bytes()
    (tmp_path / "rows.f32").write_bytes(bytes([content[0] ^ 1]) + content[1:])
    with pytest.raises(RecordingError, match=r"rows\.f32 of .* differs from its checksum"):
        read_recording(tmp_path)
    (tmp_path / "recording.json").write_text("{}")
    with pytest.raises(RecordingError, match="cannot be read as a recording"):
        read_recording(tmp_path)


def refused(tmp_path: Path, task: Task, step: Step, optimizer: Any = None, rows: Any = (0, 1)) -> None:
    model = task.model()
    optimizer = optimizer(model) if optimizer else torch.optim.SGD(model.parameters(), lr=0.1)
    batch = task.collate([task.train[0], task.train[1]])
    with InfluenceRecorder(tmp_path, task).step(model, optimizer, rows):
        step(model, optimizer, batch)


def plain_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Any) -> None:
    one_step(mlp_task(), model, optimizer, batch)


def clipped_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Any) -> None:
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    optimizer.step()


def two_steps(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Any) -> None:
    plain_step(model, optimizer, batch)
    optimizer.step()


def groups(model: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": model[0].parameters(), "lr": 0.1}, {"params": model[2].parameters(), "lr": 0.2}])


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"step": plain_step, "optimizer": lambda m: torch.optim.Adam(m.parameters())}, "Adam cannot be recorded"),
        ({"step": plain_step, "optimizer": groups}, "parameter groups differ"),
        ({"step": clipped_step}, "no clipping"),
        ({"step": two_steps}, "2 optimizer steps in one block"),
        ({"step": lambda *_: None}, "0 optimizer steps in one block"),
        ({"step": plain_step, "rows": [0, 1, 2]}, "computed 2 examples, 3 rows were named"),
        ({"step": plain_step, "rows": [0, ROWS]}, "from 0 to 23"),
        ({"step": plain_step, "rows": []}, "from 0 to 23"),
    ],
)
def test_what_cannot_be_recorded_is_refused(tmp_path: Path, arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(RecordingError, match=text):
        refused(tmp_path, mlp_task(), **arguments)


def test_parameters_outside_of_layers_are_refused(tmp_path: Path) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))
            self.layer = nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.scale * self.layer(x)

    with pytest.raises(UnsupportedLayerError, match=r"scale: the training's own pass"):
        refused(tmp_path, tiny.PairTask(Scaled, tiny.classes(2)), plain_step)


def test_arguments_are_checked(tmp_path: Path) -> None:
    task = mlp_task()
    with pytest.raises(RecordingError, match="nothing to record"):
        InfluenceRecorder(tmp_path, task, dimensions=0)
    with pytest.raises(RecordingError, match="no step was recorded"):
        InfluenceRecorder(tmp_path, task).finish()
    with pytest.raises(RecordingError, match="at least 2, one for each layer"):
        train(task, InfluenceRecorder(tmp_path, task, dimensions=1))
    recorder = InfluenceRecorder(tmp_path, task)
    train(task, recorder, steps=1)
    with pytest.raises(RecordingError, match="another model than before"):
        train(task, recorder, steps=1)


def test_evaluation_within_a_block_is_not_taken_for_training(tmp_path: Path) -> None:
    task = mlp_task()

    def evaluated(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Any) -> None:
        with torch.no_grad():
            task.loss(model, task.collate([task.train[row] for row in range(7)]))
        plain_step(model, optimizer, batch)

    refused(tmp_path, task, evaluated)  # it is not


@pytest.mark.parametrize(("momentum", "decay"), [(0.0, 1.0), (0.9, 0.02)])
def test_no_training_is_too_long(momentum: float, decay: float) -> None:
    """What the steps leave of a change in the weights, long after nothing is left of the first ones' changes."""
    sgd, step, steps = ReplayedSgd(), SgdStep(0.1, momentum, decay, False), 25_000
    wanted: dict[int, npt.NDArray[np.float64]] = {}  # by step, what has become of (u, sigma) = (1, 0) and (0, 1)
    asked = [0, 1, steps // 2, steps - 300, steps - 3, steps]
    for taken in range(steps):
        sgd.advance(step)
        for moved in wanted.values():  # rows of (u, s), of a step's own (1, r) and (0, 1)
            s = momentum * moved[:, 1] + decay * moved[:, 0]
            moved[:, 1], moved[:, 0] = s, moved[:, 0] - 0.1 * s
        if taken + 1 in asked:
            wanted[taken + 1] = np.array([[1.0, sgd.ratio], [0.0, 1.0]])
    kept, leaked, left = sgd.since(np.array(asked))
    assert np.isfinite([kept, leaked, left]).all()
    assert (kept[-1], leaked[-1]) == (1, 0)
    assert max(kept[:2]) < 1e-200
    for place, at in enumerate(asked[1:], 1):
        u = wanted[at][:, 0]
        np.testing.assert_allclose([kept[place], leaked[place]], u, rtol=1e-6, atol=1e-300)
