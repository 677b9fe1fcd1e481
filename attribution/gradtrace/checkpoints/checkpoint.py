"""One checkpoint: weights, and the step and learning rate that they were trained with."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from gradtrace.checkpoints.second_moments import SecondMoments, moments_sha256, read_second_moments
from gradtrace.checkpoints.weights import listing, plain_names, read_state, sha256
from gradtrace.errors import CheckpointError
from gradtrace.store.manifest import CheckpointKind


@dataclass(frozen=True, slots=True)
class Optimizer:
    """What the methods need to know of the optimizer; `name` is its class name in lower case ("sgd", "adamw")."""

    name: str
    momentum: float = 0.0
    weight_decay: float = 0.0


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Weights after `step` optimizer steps, the last of them taken with `learning_rate`.

    `learning_rate_sum` is the sum of the rates of all steps up to this one, from the first step of the training on;
    None where it is not known. `path` is a weight file, or a directory of them as Hugging Face's libraries write it.
    """

    path: Path
    step: int
    learning_rate: float
    optimizer: Optimizer | None = None
    batch_size: int | None = None
    kind: CheckpointKind = "weights"
    learning_rate_sum: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path))  # users pass strings

    @property
    def name(self) -> str:
        return self.path.name

    def load(self) -> dict[str, Tensor]:
        """The state dict on the CPU, without nesting and without prefixes of DistributedDataParallel and torch.compile.

        Nothing but tensors and plain containers is unpickled.

        Raises:
            CheckpointError: the file is missing, damaged, would run code, or holds no state dict.
        """
        return read_state(self.path)

    def second_moments(self, model: nn.Module) -> SecondMoments | None:
        """What Adam and its kin knew of the gradients' squares; None where it was not kept or is another optimizer's.

        Args:
            model: the model that was trained; optimizers keep the order of its parameters, not their names.

        Raises:
            CheckpointError: the file is damaged, or it is not certain which moments belong to which parameter.
        """
        return read_second_moments(self.path, model)

    def moments_sha256(self) -> str | None:
        """Hexadecimal SHA-256 of the file that holds the second moments; None where there are none.

        Raises:
            CheckpointError: the file is damaged.
        """
        return moments_sha256(self.path)

    def sha256(self) -> str:
        """Hexadecimal SHA-256 of the weights' file or files."""
        return sha256(self.path)


def load_into(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Copy a checkpoint's weights into a model, all of them or none.

    A weight may be left out of the file where the model ties it to one that is there (safetensors files do so). A
    model that a trainer kept as one of its attributes is found under that name ("model.", "net.").

    Raises:
        CheckpointError: names or shapes differ; the text lists those missing, unexpected and of another shape.
    """
    wanted = {key: value for key, value in model.state_dict().items() if isinstance(value, Tensor)}
    names = plain_names(wanted)
    state = _unwrapped(checkpoint.load(), names)
    tied = {wanted[key].data_ptr() for name, key in names.items() if name in state}
    shared = names.keys() & state.keys()
    differences = {
        "missing": [name for name in names if name not in state and wanted[names[name]].data_ptr() not in tied],
        "unexpected": [name for name in state if name not in names],
        "of another shape": [
            f"{name} (checkpoint {list(state[name].shape)}, model {list(wanted[names[name]].shape)})"
            for name in sorted(shared)
            if state[name].shape != wanted[names[name]].shape
        ],
    }
    if any(differences.values()):
        text = "; ".join(f"{kind}: {listing(names)}" for kind, names in differences.items() if names)
        raise CheckpointError(
            f"{checkpoint.path} does not fit the task's model; give the model that was trained. {text}"
        )
    model.load_state_dict({names[name]: state[name] for name in shared}, strict=False)


def _unwrapped(state: dict[str, Tensor], names: Collection[str]) -> dict[str, Tensor]:
    """The state without a first name that all of it shares and that the model's names do not have."""
    first = next(iter(state)).split(".")[0] + "."
    if state.keys() & names or not all(name.startswith(first) for name in state):
        return state
    shorter = {name.removeprefix(first): value for name, value in state.items()}
    return shorter if shorter.keys() & names else state
