"""Per-example gradients by PyTorch alone: torch.func over a batch, or autograd on one example at a time.

The fast path is tested against them, and parameters that it is not right for use them.
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
from gradtrace.gradients.plan import GradientPath, Strays
from gradtrace.layers import Layer, real_values
from gradtrace.task import Batch, Example, Task

_ATTENTION_SETTING = Lock()
_SLICE = 1 << 25  # elements of whole gradients that are held at a time


@contextmanager
def attention_by_matrices() -> Iterator[None]:
    """While open, attention uses operations that torch.func can transform; flash attention has no batching rule.

    Locked, since the setting holds for the process and not for a thread.
    """
    with _ATTENTION_SETTING, sdpa_kernel(SDPBackend.MATH):
        yield


class Measured(nn.Module):
    """`measure` as a module's forward, so that functional_call can swap the parameters in it."""

    def __init__(self, model: nn.Module, measure: Measure) -> None:
        super().__init__()
        self.model, self.measure = model, measure

    def forward(self, batch: Batch) -> Tensor:
        return self.measure(self.model, batch)


def vmapped_gradients(
    model: nn.Module, measure: Measure, batch: Batch, names: Sequence[str], start: int = 0
) -> dict[str, Tensor]:
    """Per-example gradients of the named parameters by vmap(grad), of a collated batch. Each [batch, *shape].

    start: position of the first example, if the batch is a slice of another
    """
    parameters = {f"model.{name}": model.get_parameter(name).detach() for name in names}
    count = next(len(leaf) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor))
    positions = torch.arange(start, start + count, device=next(iter(parameters.values())).device)

    def example_loss(parameters: dict[str, Tensor], example: Batch, position: Tensor) -> Tensor:
        batch_of_one = tree_map(lambda x: x.unsqueeze(0) if isinstance(x, Tensor) else x, example)
        measured = Measured(model, measure_at(measure, position[None]))
        losses: Tensor = functional_call(measured, parameters, (batch_of_one,))
        return losses.sum()

    axes = tree_map(lambda leaf: 0 if isinstance(leaf, Tensor) else None, batch)
    with attention_by_matrices():
        gradients = vmap(grad(example_loss), in_dims=(None, axes, 0), randomness="error")(parameters, batch, positions)
    return {name.removeprefix("model."): value for name, value in gradients.items()}


def autograd_gradients(
    model: nn.Module, measure: Measure, example: ExampleBatch, names: Sequence[str]
) -> tuple[Tensor, dict[str, Tensor | None]]:
    """Loss [1] of a batch of one example, and its gradients by autograd, by parameter name; None if the loss does not
    depend on the parameter. While this runs, the parameters require a gradient."""
    parameters = [model.get_parameter(name) for name in names]
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        with torch.enable_grad():
            losses = measure(model, example.collated)
            if not isinstance(losses, Tensor) or not losses.requires_grad:
                return losses, dict.fromkeys(names)
            gradients = _gradients(losses.sum(), parameters)
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
    return losses.detach(), dict(zip(names, gradients, strict=True))


def _gradients(loss: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor | None]:
    try:
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
        return [g.to_dense() if g is not None and g.is_sparse else g for g in gradients]
    except RuntimeError as error:
        if "heckpoint" not in str(error):
            raise
    loss.backward()  # reentrant checkpoints do not support autograd.grad
    accumulated = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    return accumulated


def stray_gradients(
    model: nn.Module, measure: Measure, batch: ExampleBatch, strays: Strays
) -> Iterator[tuple[Layer, Tensor]]:
    """Gradients of stray parameters: (layer, float32 [examples, 1, 1, size]), of each layer all examples in order."""
    for path, layers in strays.items():
        names = [layer.names[0] for layer in layers]
        vmapped = path is GradientPath.VMAP
        step = max(1, _SLICE // max(1, sum(layer.size for layer in layers))) if vmapped else 1
        for start in range(0, len(batch) if layers else 0, step):
            piece = batch if step >= len(batch) else batch.chosen(range(start, min(start + step, len(batch))))
            if vmapped:
                gradients = vmapped_gradients(model, measure, piece.collated, names, start)
            else:
                of_example = measure_at(measure, torch.tensor([start], device=batch.device))
                zeros = {name: torch.zeros_like(model.get_parameter(name)) for name in names}
                present = autograd_gradients(model, of_example, piece, names)[1]
                gradients = {name: (zeros[name] if value is None else value)[None] for name, value in present.items()}
            for layer in layers:
                gradient = real_values(gradients[layer.names[0]])
                yield layer, gradient.reshape(len(gradient), 1, 1, -1).float()


def gradients_reference(
    task: Task, model: nn.Module, examples: Sequence[Example], measure: Measure | None = None
) -> dict[str, Tensor]:
    """Exact per-example gradients of every trainable parameter.

    Args:
        model: with the weights at which to differentiate; not changed.
        examples: items of the data set, each with a label.
        measure: the function to differentiate; default: `task.loss`.

    Returns:
        Parameter name -> float64 [len(examples), *parameter.shape].
    """
    exact = copy.deepcopy(model).double().eval()
    names = [name for name, parameter in exact.named_parameters() if parameter.requires_grad]
    return vmapped_gradients(exact, measure or task.loss, in_float64(task.collate(list(examples))), names)


def in_float64(batch: Batch) -> Batch:
    """The batch with its floating-point tensors in float64."""
    return tree_map(lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, batch)
