"""What is put around a model or a batch: checkpointing, autocast, hooks, compilers, averages, containers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from zoo.case import ZooTask, refused, right, right_or_refused
from zoo.data import Residual, labelled, mlp, pad, texts
from zoo.vision import residual_network

ROWS = labelled(6)


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 6), Residual(mlp(6, 6)), nn.Linear(6, 3)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.b, self.a(x), use_reentrant=self.reentrant))


for reentrant in (True, False):
    right(f"checkpointing_{'reentrant' if reentrant else 'not_reentrant'}")(
        lambda reentrant=reentrant: ZooTask(lambda: Checkpointed(reentrant), ROWS)
    )


class CheckpointedFirst(Checkpointed):
    """Nothing before the checkpointed part requires a gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.b, x, use_reentrant=self.reentrant))


right("checkpointing_from_the_input")(lambda: ZooTask(lambda: CheckpointedFirst(False), ROWS))


class OfInputGradient(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.clone().requires_grad_())


@right()
def input_that_requires_a_gradient() -> ZooTask:
    return ZooTask(OfInputGradient, ROWS)


@right()
def inputs_that_require_a_gradient_in_the_loss() -> ZooTask:
    loss = lambda m, b: F.cross_entropy(m(b[0].detach().requires_grad_()), b[1], reduction="none")  # noqa: E731
    return ZooTask(mlp, ROWS, loss)


def enabling(frozen: bool = False) -> nn.Module:
    """As `enable_input_require_grads` of Hugging Face's models does."""
    model = nn.Sequential(nn.Embedding(30, 6), nn.Flatten(), nn.Linear(30, 3))
    model[0].register_forward_hook(lambda module, args, output: output.requires_grad_(True))
    model[0].requires_grad_(not frozen)
    return model


right("hook_that_makes_outputs_require_a_gradient")(lambda: ZooTask(enabling, texts([5] * 40), collate=pad))
right("hook_that_makes_a_frozen_layers_outputs_require_a_gradient")(
    lambda: ZooTask(lambda: enabling(True), texts([5] * 40), collate=pad)
)


def with_hooks() -> nn.Module:
    """Hooks of the user that change inputs and outputs."""
    model = mlp()
    model[0].register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    model[2].register_forward_hook(lambda module, args, output: output * 0.5 + args[0][:, :3])
    return model


@right()
def hooks_that_change_inputs_and_outputs() -> ZooTask:
    return ZooTask(with_hooks, ROWS)


def low_precision(m: nn.Module, b: Any) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        out = m(b[0])
    return F.cross_entropy(out.float(), b[1], reduction="none")


right("autocast_mlp", lowest_r=0.999, largest_error=0.03)(lambda: ZooTask(lambda: mlp(6, 3, 32), ROWS, low_precision))
right("autocast_resnet", lowest_r=0.999, largest_error=0.03)(
    lambda: ZooTask(residual_network, labelled(3, 8, 8), low_precision)
)


@right(rotates=True)
def float64_model() -> ZooTask:
    rows = [(x.double(), y) for x, y in ROWS]
    return ZooTask(lambda: nn.Sequential(mlp(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)).double(), rows)


@right(lowest_r=0.999, largest_error=0.03)
def bfloat16_model() -> ZooTask:
    loss = lambda m, b: F.cross_entropy(m(b[0]).float(), b[1], reduction="none")  # noqa: E731
    return ZooTask(lambda: mlp(6, 3, 32).bfloat16(), [(x.bfloat16(), y) for x, y in ROWS], loss)


def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyConv1d(4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3))


def lazy_and_called() -> nn.Module:
    model = lazy()
    model(torch.zeros(2, 2, 6))
    return model


right("lazy_modules_after_a_forward_pass")(lambda: ZooTask(lazy_and_called, labelled(2, 6)))
right_or_refused("lazy|uninitiali[sz]ed", "forward|example", name="lazy_modules_without_one")(
    lambda: ZooTask(lazy, labelled(2, 6), trained=lazy_and_called)
)


def averaged_state(model: nn.Module) -> dict[str, Any]:
    return AveragedModel(model).state_dict()


right("checkpoint_of_averaged_weights")(lambda: ZooTask(residual_network, labelled(3, 8, 8), state=averaged_state))
right("model_that_is_an_average")(lambda: ZooTask(lambda: AveragedModel(mlp()), ROWS))
right("checkpoint_of_data_parallel_training")(
    lambda: ZooTask(mlp, ROWS, state=lambda m: {f"module.{name}": value for name, value in m.state_dict().items()})
)
right("checkpoint_of_a_compiled_model")(
    lambda: ZooTask(mlp, ROWS, state=lambda m: {f"_orig_mod.{name}": value for name, value in m.state_dict().items()})
)
right_or_refused("compile", "compile|eager|_orig_mod", name="compiled_model")(
    lambda: ZooTask(lambda: torch.compile(mlp(), backend="eager"), ROWS)  # type: ignore[arg-type, return-value]
)
right("traced_by_fx")(lambda: ZooTask(lambda: torch.fx.symbolic_trace(mlp()), ROWS))
refused("TorchScript|ScriptModule|torch.jit", "nn.Module|eager|Python", name="script_module")(
    lambda: ZooTask(lambda: torch.jit.script(mlp()), ROWS)
)
refused("TorchScript|ScriptModule|torch.jit", "nn.Module|eager|Python", name="traced_module")(
    lambda: ZooTask(lambda: torch.jit.trace(mlp(), torch.zeros(2, 6)), ROWS)
)


class ScriptedPart(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = torch.jit.script(mlp(6, 6)), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


right_or_refused("TorchScript|ScriptModule|torch.jit", "nn.Module|eager|Python", name="part_of_it_scripted")(
    lambda: ZooTask(ScriptedPart, ROWS)
)


class Counting(nn.Module):
    """Counts its calls in a buffer and keeps its last output: state that changes no result."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.last = mlp(), torch.zeros(0)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = self.body(x)
        return self.last


@right()
def model_that_counts_its_calls() -> ZooTask:
    return ZooTask(Counting, ROWS)


class InPlace(nn.Module):
    """Changes its layers' outputs, and parts of them, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        h += x
        h[:, :2] *= 2
        g = self.b(h.relu_())
        g[x[:, 0] > 0] = 0.5
        return self.head(g.mul_(0.5))


@right()
def outputs_changed_in_place() -> ZooTask:
    return ZooTask(InPlace, ROWS)


@dataclass
class Batch:
    x: Tensor
    y: Tensor
    note: str = "kept"


class Named(NamedTuple):
    x: Tensor
    y: Tensor


class Moving:
    """A batch of somebody's own, which is moved by `.to`, as those of tokenizers and of graph libraries."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def to(self, device: torch.device | str) -> Moving:
        return Moving(self.x.to(device), self.y.to(device))

    def __len__(self) -> int:
        return len(self.y)

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.x, self.y))


def by_name(m: nn.Module, b: Any) -> Tensor:
    return F.cross_entropy(m(b.x), b.y, reduction="none")


for name, kind in {"dataclass": Batch, "named_tuple": Named, "object_with_to": Moving}.items():
    right(f"batch_is_a_{name}")(
        lambda kind=kind: ZooTask(
            mlp, ROWS, by_name, lambda ex: kind(torch.stack([x for x, _ in ex]), torch.tensor([y for _, y in ex]))
        )
    )

right("batch_is_a_dictionary_with_words")(
    lambda: ZooTask(
        mlp,
        [{"x": x, "y": y, "id": f"row-{row}", "extra": None} for row, (x, y) in enumerate(ROWS)],
        lambda m, b: F.cross_entropy(m(b["x"]), b["y"], reduction="none"),
        lambda ex: (
            {k: torch.utils.data.default_collate([e[k] for e in ex]) for k in "xy"} | {"id": [e["id"] for e in ex]}
        ),
    )
)
right("batch_is_a_list_of_tensors")(
    lambda: ZooTask(
        mlp, ROWS, lambda m, b: F.cross_entropy(torch.cat([m(x[None]) for x, _ in b]), torch.tensor([y for _, y in b]),
                                                reduction="none"), list,
    )
)  # fmt: skip


@dataclass
class Output:
    logits: Tensor
    hidden: tuple[Tensor, ...]


class Rich(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, *, features: Tensor) -> Output:
        h = self.a(input=features).relu()
        return Output(self.head(h), (h,))


@right()
def model_of_keyword_arguments_that_returns_a_dataclass() -> ZooTask:
    loss = lambda m, b: F.cross_entropy(m(features=b[0]).logits, b[1], reduction="none")  # noqa: E731
    return ZooTask(Rich, ROWS, loss)
