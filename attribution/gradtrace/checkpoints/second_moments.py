"""The second moments of every weight's gradient that Adam and its variants keep: reading and writing them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from gradtrace.checkpoints.weights import plain_names, read_file, sha256
from gradtrace.errors import CheckpointError

_IN_DIRECTORIES = ("optimizer.pt", "optimizer.bin")  # Hugging Face Trainer, accelerate


@dataclass(frozen=True, slots=True)
class SecondMoments:
    """v^ = v / (1 - beta2^t) of Adam (Kingma and Ba 2015, algorithm 1), whose step divides by sqrt(v^) + eps.

    by_name: float32 by parameter name, in the parameter's shape; absent for parameters that never had a gradient
    """

    by_name: dict[str, Tensor]
    beta2: float
    eps: float

    def save(self, path: Path) -> None:
        """Write them as a safetensors file, which `read_second_moments` reads."""
        save_file(self.by_name, path, {"beta2": repr(self.beta2), "eps": repr(self.eps)})


def moments_path(weights: Path) -> Path:
    """The file of second moments that the recorder writes beside a weight file."""
    return weights.with_suffix(".optimizer.safetensors")


def recorded_moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> SecondMoments:
    """The second moments of an optimizer in memory.

    Raises:
        CheckpointError: the optimizer has none.
    """
    names = {id(parameter): name for name, parameter in _parameters(model)}
    by_group = [[names.get(id(parameter), "") for parameter in group["params"]] for group in optimizer.param_groups]
    entries = _entries(optimizer.state_dict(), by_group)
    if not entries:
        raise CheckpointError(
            f"{type(optimizer).__name__} keeps no second moments (exp_avg_sq); record without optimizer_state"
        )
    return _corrected(entries)


def read_second_moments(path: Path, model: nn.Module) -> SecondMoments | None:
    """As `Checkpoint.second_moments`, from the recorder's file, a framework's directory, or Lightning's file."""
    file = _moments_file(path)
    if file is None:
        return None
    if file == moments_path(path):
        with _opened_record(file) as (record, beta2, eps):
            return SecondMoments({name: record.get_tensor(name) for name in record.keys()}, beta2, eps)  # noqa: SIM118  (no dict)
    entries = _saved_entries(file, model)
    return _corrected(entries) if entries else None


def keeps_second_moments(path: Path, model: nn.Module) -> bool:
    """As `Checkpoint.keeps_second_moments`."""
    file = _moments_file(path)
    if file is not None and file == moments_path(path):
        with _opened_record(file):
            return True
    return file is not None and bool(_saved_entries(file, model))


def moments_sha256(path: Path) -> str | None:
    """As `Checkpoint.moments_sha256`."""
    file = _moments_file(path)
    if file is None or (file != moments_path(path) and not _has_moments(file)):
        return None
    return sha256(file)


def _moments_file(path: Path) -> Path | None:
    """The file that may hold second moments: an optimizer's state dict, or the recorder's file. None if missing."""
    if path.suffix == ".ckpt":
        return path
    candidates = [path / name for name in _IN_DIRECTORIES] if path.is_dir() else [moments_path(path)]
    return next((file for file in candidates if file.is_file()), None)


def _optimizer_state(file: Path) -> Any:
    """An optimizer's state dict, its tensors memory-mapped; None for a Lightning file without one."""
    content = read_file(file, lazily=True)
    return next(iter(content.get("optimizer_states") or []), None) if file.suffix == ".ckpt" else content


def _has_moments(file: Path) -> bool:
    try:
        state = _optimizer_state(file)
        return bool(state) and any("exp_avg_sq" in entry for entry in state["state"].values())
    except (KeyError, TypeError, AttributeError):  # not a state dict of PyTorch's optimizers
        return False


@contextmanager
def _opened_record(path: Path) -> Iterator[tuple[Any, float, float]]:
    """The recorder's file open, and the beta2 and eps in it."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            yield file, float(metadata["beta2"]), float(metadata["eps"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); restore it, or delete it to do without") from None


# By parameter name: the optimizer's state of the parameter, and its group's settings.
_Entries = dict[str, tuple[Mapping[str, Any], Mapping[str, Any]]]


def _saved_entries(path: Path, model: nn.Module) -> _Entries:
    """The entries with second moments in an optimizer's file."""
    state = _optimizer_state(path)
    try:
        return _entries(state, _names_by_group(path, state, model)) if state else {}
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is not the state dict of a PyTorch optimizer ({error!r}); save it again"
        ) from None


def _entries(state: Mapping[str, Any], names_by_group: Sequence[Sequence[str]]) -> _Entries:
    """The entries with second moments in an optimizer's state dict."""
    entries = {
        name: (state["state"][number], group)
        for group, names in zip(state["param_groups"], names_by_group, strict=True)
        for number, name in zip(group["params"], names, strict=True)
        if "exp_avg_sq" in state["state"].get(number, {})
    }
    if len({_settings(group) for _, group in entries.values()}) > 1:
        raise CheckpointError("the optimizer's parameter groups differ in beta2 or eps; train them with the same ones")
    return entries


def _settings(group: Mapping[str, Any]) -> tuple[float, float]:
    """beta2 and eps."""
    return float(group["betas"][1]), float(group["eps"])


def _corrected(entries: _Entries) -> SecondMoments:
    """v / (1 - beta2^t) of each parameter."""
    beta2, eps = _settings(next(iter(entries.values()))[1])
    by_name = {
        name: state.get("max_exp_avg_sq", state["exp_avg_sq"]).float().cpu() / (1 - beta2 ** float(state["step"]))
        for name, (state, _) in entries.items()
    }
    return SecondMoments(by_name, beta2, eps)


def _names_by_group(path: Path, state: Mapping[str, Any], model: nn.Module) -> list[list[str]]:
    """The parameters' names in each group of a saved optimizer.

    Saved groups number their parameters instead of naming them, in the order of `model.parameters()`. Each parameter of
    the model is the next one of some group; which group must follow from its shape.

    Raises:
        CheckpointError: the next parameters of several groups have the shape, or those of none.
    """
    groups = state["param_groups"]
    if all("param_names" in group for group in groups):
        return [list(plain_names(group["param_names"])) for group in groups]
    shapes = {number: entry["exp_avg_sq"].shape for number, entry in state["state"].items() if "exp_avg_sq" in entry}
    shapes_left = [deque(shapes.get(number) for number in group["params"]) for group in groups]
    names: list[list[str]] = [[] for _ in groups]
    parameters = _parameters(model)
    trained = [(name, parameter) for name, parameter in parameters if parameter.requires_grad]
    only_trained = len(trained) == sum(map(len, shapes_left))  # what the optimizer has, else all parameters
    for name, parameter in trained if only_trained else parameters:
        fitting = [number for number, left in enumerate(shapes_left) if left and left[0] in (None, parameter.shape)]
        if len(fitting) != 1:
            raise CheckpointError(
                f"{path}: the second moments of {name} {list(parameter.shape)} may be in {len(fitting)} of the "
                "optimizer's groups; give the model that was trained, or record with "
                "CheckpointRecorder(optimizer_state=True), which keeps the names"
            )
        shapes_left[fitting[0]].popleft()
        names[fitting[0]].append(name)
    if any(shapes_left):
        raise CheckpointError(
            f"{path}: the optimizer has other parameters than the model; give the one that was trained"
        )
    return names


def _parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The model's parameters by names without wrapper prefixes; a shared parameter once."""
    parameters = dict(model.named_parameters())
    return [(name, parameters[key]) for name, key in plain_names(parameters).items()]
