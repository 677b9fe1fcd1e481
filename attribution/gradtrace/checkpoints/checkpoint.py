"""A checkpoint of a training: weights, with the step and the learning rate; and loading them into a model."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from gradtrace.checkpoints import adapters, second_moments
from gradtrace.checkpoints.weights import listing, plain_names, read_state, sha256
from gradtrace.errors import CheckpointError
from gradtrace.store.manifest import CheckpointKind, Optimizer


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Weights after `step` optimizer steps, the last of which had the rate `learning_rate`.

    `learning_rate_sum` is the sum of the rates of steps 1 to `step`, None if unknown. `path` is a weight file, or a
    directory of weight files as Hugging Face's libraries write it.
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
        """The state dict on the CPU, not nested, and without the prefixes of DistributedDataParallel and torch.compile.

        Only tensors and plain containers are unpickled.

        Raises:
            CheckpointError: the file is missing, damaged, would run code, or holds no state dict.
        """
        return read_state(self.path)

    def second_moments(self, model: nn.Module) -> second_moments.SecondMoments | None:
        """The second moments of Adam or one of its variants; None if they were not kept.

        Args:
            model: the model that was trained; optimizers save the order of its parameters, not their names.

        Raises:
            CheckpointError: the file is damaged, or it is not certain which moments belong to which parameter.
        """
        return second_moments.read_second_moments(self.path, model)

    def keeps_second_moments(self, model: nn.Module) -> bool:
        """Whether `second_moments` gives any, told without reading them. Raises as it does."""
        return second_moments.keeps_second_moments(self.path, model)

    def moments_sha256(self) -> str | None:
        """Hexadecimal SHA-256 of the file that holds the second moments; None if they were not kept.

        Raises:
            CheckpointError: the file is damaged.
        """
        return second_moments.moments_sha256(self.path)

    def sha256(self) -> str:
        """Hexadecimal SHA-256 of the weights' file or files."""
        return sha256(self.path)


def load_into(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Copy a checkpoint's weights into a model, all of them or none.

    A checkpoint of PEFT has an adapter's weights alone, for a model with such an adapter. Any other may lack a weight
    that the model ties to another one (as safetensors files do). All names in it may have a common prefix ("model.",
    "net."), from a trainer that holds the model as an attribute.

    Raises:
        CheckpointError: names or shapes differ; the text lists those missing, unexpected and of another shape.
    """
    if adapters.is_adapter(checkpoint.path):
        adapters.load_adapter(model, checkpoint.path)
        return
    current = {key: value for key, value in model.state_dict().items() if isinstance(value, Tensor)}
    names = plain_names(current)
    state = _without_prefix(checkpoint.load(), names)
    tied = {current[key].data_ptr() for name, key in names.items() if name in state}
    shared = names.keys() & state.keys()
    differences = {
        "missing": [name for name in names if name not in state and current[names[name]].data_ptr() not in tied],
        "unexpected": [name for name in state if name not in names],
        "of another shape": [
            f"{name} (checkpoint {list(state[name].shape)}, model {list(current[names[name]].shape)})"
            for name in sorted(shared)
            if state[name].shape != current[names[name]].shape
        ],
    }
    if any(differences.values()):
        text = "; ".join(f"{kind}: {listing(names)}" for kind, names in differences.items() if names)
        raise CheckpointError(
            f"{checkpoint.path} does not fit the task's model; give the model that was trained. {text}"
        )
    model.load_state_dict({names[name]: state[name] for name in shared}, strict=False)


def _without_prefix(state: dict[str, Tensor], names: Collection[str]) -> dict[str, Tensor]:
    """The state dict without a prefix that all its names have and that the model's `names` do not."""
    prefix = next(iter(state)).split(".")[0] + "."
    if state.keys() & names or not all(name.startswith(prefix) for name in state):
        return state
    shorter = {name.removeprefix(prefix): value for name, value in state.items()}
    return shorter if shorter.keys() & names else state
