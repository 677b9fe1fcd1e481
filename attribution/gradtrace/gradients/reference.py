"""Per-example gradients by PyTorch's own means: torch.func over a batch, or autograd of one example at a time.

What the fast path is tested against, and what parameters are left to that it is not right for.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import Lock

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map

from gradtrace.data.batches import ExampleBatch, Measure, measure_at
from gradtrace.gradients.plan import GradientPath, LayerPlan
from gradtrace.layers import Layer, real_values
from gradtrace.task import Batch, Example, Task

_ATTENTION_SETTING = Lock()
_SLICE = 1 << 25  # elements of whole gradients that are held at a time


@contextmanager
def attention_by_matrices() -> Iterator[None]:
    """While open, attention is computed by operations that torch.func can transform: flash attention has no batching
    rule. Which kernels may be used is a setting of the process, not of a thread."""
    with _ATTENTION_SETTING, sdpa_kernel(SDPBackend.MATH):
        yield


class Measured(nn.Module):
    """`measure` as a module's forward, so that functional_call can swap the parameters in it."""

    def __init__(self, model: nn.Module, measure: Measure) -> None:
        super().__init__()
        self.model = model
        self.measure = measure

    def forward(self, batch: Batch) -> Tensor:
        return self.measure(self.model, batch)


def vmapped_gradients(
    model: nn.Module, measure: Measure, batch: Batch, names: Sequence[str], start: int = 0
) -> dict[str, Tensor]:
    """Per-example gradients of the named parameters by vmap(grad), of a collated batch. Each [batch, *shape].

    start: the first example's position, where the batch is a part of another
    """
    parameters = {f"model.{name}": model.get_parameter(name).detach() for name in names}
    count = next(len(leaf) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor))
    positions = torch.arange(start, start + count, device=next(iter(parameters.values())).device)

    def one(parameters: dict[str, Tensor], example: Batch, position: Tensor) -> Tensor:
        alone = tree_map(lambda x: x.unsqueeze(0) if isinstance(x, Tensor) else x, example)
        measured = Measured(model, measure_at(measure, position[None]))
        losses: Tensor = functional_call(measured, parameters, (alone,))
        return losses.sum()

    axes = tree_map(lambda leaf: 0 if isinstance(leaf, Tensor) else None, batch)
    with attention_by_matrices():
        gradients = vmap(grad(one), in_dims=(None, axes, 0), randomness="error")(parameters, batch, positions)
    return {name.removeprefix("model."): value for name, value in gradients.items()}


def autograd_gradients(
    model: nn.Module, measure: Measure, example: ExampleBatch, names: Sequence[str]
) -> tuple[Tensor, dict[str, Tensor | None]]:
    """Loss [1] of a batch of one example, and its gradients by plain autograd; None where the loss does not depend on
    a parameter. Parameters require a gradient meanwhile."""
    parameters = [model.get_parameter(name) for name in names]
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        with torch.enable_grad():
            losses = measure(model, example.collated)
            if not isinstance(losses, Tensor) or not losses.requires_grad:
                return losses, dict.fromkeys(names)
            gradients = _differentiated(losses.sum(), parameters)
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
    return losses.detach(), dict(zip(names, gradients, strict=True))


def _differentiated(loss: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor | None]:
    try:
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
        return [g.to_dense() if g is not None and g.is_sparse else g for g in gradients]
    except RuntimeError as error:
        if "heckpoint" not in str(error):
            raise
    loss.backward()  # reentrant checkpoints allow nothing else
    accumulated = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    return accumulated


def stray_gradients(
    model: nn.Module, measure: Measure, batch: ExampleBatch, plan: LayerPlan
) -> Iterator[tuple[Layer, slice, Tensor]]:
    """Gradients of the stray parameters: (layer, examples, float32 [examples, 1, 1, size])."""
    for layer, part, gradient in _stray_gradients(model, measure, batch, plan):
        yield layer, part, real_values(gradient).reshape(len(gradient), 1, 1, -1).float()


def _stray_gradients(
    model: nn.Module, measure: Measure, batch: ExampleBatch, plan: LayerPlan
) -> Iterator[tuple[Layer, slice, Tensor]]:
    vmapped, alone = plan.strays[GradientPath.VMAP], plan.strays[GradientPath.ALONE]
    if vmapped:
        step = max(1, _SLICE // sum(layer.size for layer in vmapped))
        for start in range(0, len(batch), step):
            part = slice(start, min(start + step, len(batch)))
            some = batch if step >= len(batch) else batch.chosen(range(part.start, part.stop))
            gradients = vmapped_gradients(model, measure, some.collated, [layer.names[0] for layer in vmapped], start)
            for layer in vmapped:
                yield layer, part, gradients[layer.names[0]]
    if alone:
        names = [layer.names[0] for layer in alone]
        for position in range(len(batch)):
            own = measure_at(measure, torch.tensor([position], device=batch.device))
            found = autograd_gradients(model, own, batch.alone(position), names)[1]
            for layer in alone:
                gradient = found[layer.names[0]]
                value = torch.zeros(1, layer.size, device=batch.device) if gradient is None else gradient[None]
                yield layer, slice(position, position + 1), value


def gradients_reference(
    task: Task, model: nn.Module, examples: Sequence[Example], measure: Measure | None = None
) -> dict[str, Tensor]:
    """Exact per-example gradients of every trainable parameter.

    Args:
        model: with the weights to differentiate at; left unchanged.
        examples: items of the data set, each with a label.
        measure: default `task.loss`.

    Returns:
        Parameter name -> float64 [len(examples), *parameter.shape].
    """
    exact = copy.deepcopy(model).double().eval()
    names = [name for name, parameter in exact.named_parameters() if parameter.requires_grad]
    return vmapped_gradients(exact, measure or task.loss, in_double(task.collate(list(examples))), names)


def in_double(batch: Batch) -> Batch:
    """The batch with its floating-point tensors in float64."""
    return tree_map(lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, batch)
