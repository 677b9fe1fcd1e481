"""Calls of functions that use a parameter: their inputs and outputs are the factors of its gradient.

`F.linear(x, embedding.weight)`, attention's projections, recurrent layers and tied weights have no module whose input
and output are these factors.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from gradtrace.gradients.recurrent import REPLACEMENTS
from gradtrace.layers import CallInputs, Layer
from gradtrace.layers.parameters import TableLayer

Collect = Callable[[Sequence[tuple[Layer, CallInputs]], Tensor], Tensor]


class ParameterCalls(TorchFunctionMode):
    """While active, calls that use one of these parameters as a matrix, a table or a bias are passed to `collect`.

    parameters: layers by the id of their parameter
    is_watching, collect: see `capture.Capture`
    """

    def __init__(self, parameters: Mapping[int, Layer], is_watching: Callable[[], bool], collect: Collect) -> None:
        super().__init__()
        self._parameters, self._is_watching, self._collect = parameters, is_watching, collect

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        handler = _HANDLERS.get(func)
        if handler is None or not self._is_watching():
            return func(*args, **(kwargs or {}))
        return handler(self, func, *args, **(kwargs or {}))

    def layer_of(self, tensor: Tensor | None) -> tuple[Layer, int] | None:
        """The layer of a parameter or of a slice of its rows, with the number of the first row; None for others."""
        if tensor is None:
            return None
        layer = self._parameters.get(id(tensor))
        if layer is not None:
            return layer, 0
        base = tensor._base
        layer = None if base is None else self._parameters.get(id(base))
        if layer is None or base is None or tensor.stride() != base.stride() or tensor.shape[1:] != base.shape[1:]:
            return None  # not a view, or transposed, or a slice of columns
        row, remainder = divmod(int(tensor.storage_offset() - base.storage_offset()), base.stride(0))
        return None if remainder else (layer, row)

    def collect(self, used: Sequence[tuple[Tensor | None, Tensor | None, int | None]], output: Tensor) -> Tensor:
        """Pass on the uses of `parameters`. Returns the output that the model is to use.

        used: (tensor used as a parameter, the call's input or None, the token without gradient or None)
        """
        uses = []
        for parameter, inputs, padding in used:
            layer_and_row = self.layer_of(parameter)
            if layer_and_row is not None and parameter is not None:
                layer, row = layer_and_row
                uses.append((layer, CallInputs(inputs, (row, row + len(parameter)), padding)))
        return self._collect(uses, output) if uses else output


def _linear(mode: ParameterCalls, func: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:  # noqa: A002
    return mode.collect([(weight, input, None), (bias, None, None)], func(input, weight, bias))


def _embedding(mode: ParameterCalls, func: Any, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: A002
    output: Tensor = func(input, weight, *args, **kwargs)
    layer_and_row = mode.layer_of(weight)
    if layer_and_row is None or not isinstance(layer_and_row[0], TableLayer):
        return output
    return mode.collect([(weight, input, kwargs.get("padding_idx", args[0] if args else None))], output)


_NO_OVERRIDES = {name: lambda *args: False for name in vars(F) if name.startswith("has_torch_function")}


def _without_dispatch(function: Any) -> Callable[..., Any]:
    """A copy of a function of torch.nn.functional that does not dispatch to active modes.

    The mode handles the function by running it, and the function would hand the call to the mode again.
    """
    copy = types.FunctionType(
        function.__code__, {**function.__globals__, **_NO_OVERRIDES}, function.__name__, function.__defaults__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _unrolled(function: Callable[..., Any]) -> Callable[..., Any]:
    """A handler that runs `function` instead of a call with one of the mode's parameters, with the mode active for the
    calls that it makes."""

    def handler(mode: ParameterCalls, func: Any, *args: Any, **kwargs: Any) -> Any:
        tensors = (leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        if not any(map(mode.layer_of, tensors)):
            return func(*args, **kwargs)
        with mode:
            return function(*args, **kwargs)

    return handler


_HANDLERS: dict[Any, Callable[..., Any]] = {
    F.linear: _linear,
    F.embedding: _embedding,
    F.multi_head_attention_forward: _unrolled(_without_dispatch(F.multi_head_attention_forward)),
    **{function: _unrolled(replacement) for function, replacement in REPLACEMENTS.items()},
}
