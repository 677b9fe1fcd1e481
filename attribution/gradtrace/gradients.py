"""The fast path: one forward and one backward to the activations give every layer's (input, output gradient).

Parameters never require a gradient, so no weight gradient is ever formed, neither per example nor summed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gradtrace.errors import LossError
from gradtrace.layers import Layer
from gradtrace.task import Batch

Measure = Callable[[nn.Module, Batch], Tensor]  # task.loss or task.measurement: [batch]
OnUse = Callable[[Layer, Tensor, Tensor], None]  # (layer, its input, the gradient at its output), once for each use


def measure_at(measure: Measure, positions: Tensor) -> Measure:
    """What measures some examples of a batch apart from the others, at positions int64 [n] of it: of a measure that is
    not the same function of all of them, as `SeededLoss`, the part that is theirs."""
    return measure.at(positions) if hasattr(measure, "at") else measure


class _Anchor(torch.autograd.Function):
    """Make a tensor that needs no gradient the start of a graph, in place, so that a later in-place ReLU may follow."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, token: Tensor) -> Tensor:
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        return None, grads[0].new_zeros(0)


@contextmanager
def tapped(layers: Mapping[nn.Module, Layer], on_use: OnUse, token: Tensor) -> Iterator[None]:
    """While open, `on_use` is called in the backward pass for every use of every module in `layers`."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        if not torch.is_grad_enabled():  # evaluated in between, or to be computed again in the backward pass
            return output
        x = (args[0] if args else next(iter(kwargs.values()))).detach()
        if not output.requires_grad:
            output = _Anchor.apply(output, token)  # type: ignore[no-untyped-call]
        # Registered on the tensor as it is now: a later in-place operation does not change what the hook receives.
        output.register_hook(lambda d: on_use(layers[module], x, d))
        return output

    with ExitStack() as hooks:
        for module in layers:
            handle = module.register_forward_hook(hook, with_kwargs=True)
            hooks.callback(handle.remove)
        yield


def backpropagate(
    model: nn.Module, measure: Measure, batch: Batch, layers: Mapping[nn.Module, Layer], on_use: OnUse
) -> Tensor:
    """Run `measure` forward and back, feeding `on_use`. Returns the losses [batch], detached.

    Raises:
        LossError: the loss does not depend on any of the layers.
    """
    if not layers:  # every parameter is left to vmap
        with torch.no_grad():
            return measure(model, batch)
    token = torch.zeros(0, device=next(model.parameters()).device, requires_grad=True)
    with torch.enable_grad(), tapped(layers, on_use, token):
        losses = measure(model, batch)
        if not losses.requires_grad:
            raise LossError(
                "the loss does not depend on any layer of the model: was it computed under torch.no_grad(), "
                "detached, or from another model than the one passed in?"
            )
        torch.autograd.grad(losses.sum(), token)  # of a sum: grad_outputs would make PyTorch load SymPy (1.4 s)
    return losses.detach()
