"""Adam's second moments by parameter name, against a calculation by hand and through every way to keep them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradtrace.checkpoints import load_checkpoints
from gradtrace.checkpoints.checkpoint import Checkpoint
from gradtrace.checkpoints.recorder import CheckpointRecorder
from gradtrace.errors import CheckpointError

pytestmark = pytest.mark.unit


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.hidden = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.hidden(self.embedding(tokens)).relu()))


def decay_groups(model: nn.Module) -> list[dict[str, Any]]:
    """As most trainings of transformers split them: no weight decay on biases and norms."""
    decayed = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    return [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> dict[str, Tensor]:
    """Train, and run Adam's recursion v = beta2 v + (1 - beta2) g^2 by hand. Returns v / (1 - beta2^steps) by name."""
    moments: dict[str, Tensor] = {}
    for step in range(steps):
        optimizer.zero_grad()
        torch.manual_seed(step)
        model(torch.randint(6, (5,))).square().sum().backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            moments[name] = 0.99 * moments.get(name, torch.zeros(1)) + 0.01 * parameter.grad.double().square()
        optimizer.step()
    return {name: (moment / (1 - 0.99**steps)).float() for name, moment in moments.items()}


def adam(groups: Any, **settings: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.99), eps=1e-6, **settings)


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name])


@pytest.mark.parametrize("grouped", [False, True])
def test_the_recorder_keeps_the_moments_by_name(tmp_path: Path, grouped: bool) -> None:
    model = Tied()
    optimizer = adam(decay_groups(model) if grouped else model.parameters())
    wanted = train(model, optimizer)
    CheckpointRecorder(tmp_path, every=1, optimizer_state=True).step(model, optimizer)
    (checkpoint,) = load_checkpoints(tmp_path)
    assert checkpoint.keeps_second_moments(Tied())
    found = checkpoint.second_moments(Tied())
    assert found is not None
    assert (found.beta2, found.eps) == (0.99, 1e-6)
    assert_same(found.by_name, wanted)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("file", ["folder/optimizer.pt", "folder/optimizer.bin", "a.ckpt"])
def test_a_saved_optimizer_is_matched_by_order_and_shape(tmp_path: Path, grouped: bool, file: str) -> None:
    model = Tied()
    optimizer = adam(decay_groups(model) if grouped else model.parameters())
    wanted = train(model, optimizer)
    path = tmp_path / file.split("/")[0]
    if file == "a.ckpt":
        torch.save({"state_dict": model.state_dict(), "optimizer_states": [optimizer.state_dict()]}, path)
    else:
        path.mkdir()
        torch.save(optimizer.state_dict(), tmp_path / file)
    assert Checkpoint(path, 3, 0.01).keeps_second_moments(Tied())
    found = Checkpoint(path, 3, 0.01).second_moments(Tied())
    assert found is not None
    assert_same(found.by_name, wanted)


def test_names_in_the_optimizer_are_taken_whatever_the_order(tmp_path: Path) -> None:
    model = Tied()
    optimizer = adam(list(reversed(list(model.named_parameters()))))
    wanted = train(model, optimizer)
    torch.save({"optimizer_states": [optimizer.state_dict()]}, tmp_path / "a.ckpt")
    found = Checkpoint(tmp_path / "a.ckpt", 3, 0.01).second_moments(Tied())
    assert found is not None
    assert_same(found.by_name, wanted)


def test_groups_that_fit_in_two_ways_and_other_models_are_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    optimizer = torch.optim.Adam([{"params": [*model[1].parameters()]}, {"params": [*model[0].parameters()]}], lr=0.1)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    torch.save({"optimizer_states": [optimizer.state_dict()]}, tmp_path / "a.ckpt")
    with pytest.raises(
        CheckpointError, match=r"0\.weight \[3, 3\] may be in 2 of the optimizer's groups; .*keeps the names"
    ):
        Checkpoint(tmp_path / "a.ckpt", 1, 0.1).second_moments(model)
    with pytest.raises(CheckpointError, match="give the model that was trained"):
        Checkpoint(tmp_path / "a.ckpt", 1, 0.1).second_moments(Tied())
    with pytest.raises(CheckpointError, match="give the model that was trained"):
        Checkpoint(tmp_path / "a.ckpt", 1, 0.1).keeps_second_moments(Tied())


def test_frozen_parameters_are_left_out_where_the_optimizer_leaves_them_out(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[0].requires_grad_(False)
    optimizer = torch.optim.Adam(model[1].parameters(), lr=0.1)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    torch.save({"optimizer_states": [optimizer.state_dict()]}, tmp_path / "a.ckpt")
    found = Checkpoint(tmp_path / "a.ckpt", 1, 0.1).second_moments(model)
    assert found is not None
    assert found.by_name.keys() == {"1.weight", "1.bias"}


def test_the_larger_moment_of_amsgrad_is_the_one_it_divides_by(tmp_path: Path) -> None:
    model = nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, betas=(0.9, 0.5), amsgrad=True)
    for size in (4.0, 0.0):
        model.weight.grad = torch.full((1, 2), size)
        optimizer.step()
    CheckpointRecorder(tmp_path, every=1, optimizer_state=True).step(model, optimizer)
    found = load_checkpoints(tmp_path)[0].second_moments(model)
    assert found is not None
    torch.testing.assert_close(found.by_name["weight"], torch.full((1, 2), 8 / 0.75))


def test_no_moments_are_none_and_asking_the_recorder_for_them_is_refused(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    CheckpointRecorder(tmp_path / "sgd", every=1).step(model, optimizer)
    assert load_checkpoints(tmp_path / "sgd")[0].second_moments(model) is None
    assert not load_checkpoints(tmp_path / "sgd")[0].keeps_second_moments(model)
    with pytest.raises(CheckpointError, match="SGD keeps no second moments"):
        CheckpointRecorder(tmp_path / "asked", every=1, optimizer_state=True).step(model, optimizer)
    torch.save({"optimizer_states": [optimizer.state_dict()]}, tmp_path / "a.ckpt")
    assert Checkpoint(tmp_path / "a.ckpt", 1, 0.1).second_moments(model) is None
    assert not Checkpoint(tmp_path / "a.ckpt", 1, 0.1).keeps_second_moments(model)


def test_damaged_moments_are_named(tmp_path: Path) -> None:
    model = Tied()
    optimizer = adam(model.parameters())
    train(model, optimizer)
    CheckpointRecorder(tmp_path, every=1, optimizer_state=True).step(model, optimizer)
    path = tmp_path / "step-000000001.optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors is damaged"):
        load_checkpoints(tmp_path)[0].second_moments(model)
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors is damaged"):
        load_checkpoints(tmp_path)[0].keeps_second_moments(model)
