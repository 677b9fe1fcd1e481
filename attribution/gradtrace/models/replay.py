"""Use a forward pass twice: once for the loss, and again for the prediction."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_Call = tuple[tuple[Any, ...], dict[str, Any], Tensor, int]


@contextmanager
def replayed_forward(model: nn.Module) -> Iterator[None]:
    """While open, the model answers its first call with gradients once more from memory when gradients are off.

    Only its `forward` is replaced meanwhile, so that a task finds everything else of the model as it is.
    """
    forward = model.forward
    first: list[_Call] = []

    def replay(*args: Any, **kwargs: Any) -> Any:
        if first and not torch.is_grad_enabled() and _is_call(first[0], args, kwargs):
            return first[0][2]
        output = forward(*args, **kwargs)
        if not first and torch.is_grad_enabled() and isinstance(output, Tensor):
            first.append((args, kwargs, output.detach(), output._version))
        return output

    model.forward = replay
    try:
        yield
    finally:
        del model.__dict__["forward"]


def _is_call(call: _Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether it had these very arguments, and its output was not changed in place since."""
    old_args, old_kwargs, output, version = call
    same = len(args) == len(old_args) and all(a is b for a, b in zip(args, old_args, strict=True))
    same = same and kwargs.keys() == old_kwargs.keys() and all(kwargs[k] is old_kwargs[k] for k in kwargs)
    return same and output._version == version
