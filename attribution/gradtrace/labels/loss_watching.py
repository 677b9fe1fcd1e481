"""Watching which loss functions a task's loss calls while it runs, and returning something else from these calls."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cache, partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gradtrace.data.batches import Measure
from gradtrace.labels.handwritten_losses import ERROR_READERS, INDEXING_READERS
from gradtrace.labels.loss_calls import Arguments, LossCall
from gradtrace.labels.loss_functions import FUNCTION_READERS
from gradtrace.task import Batch

AnyWatcher = TypeVar("AnyWatcher", bound="LossWatcher")


def read_call(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], handwritten: bool) -> LossCall | None:
    """The call, if it is one of a loss function on outputs that require a gradient and its law is known; else None.

    handwritten: take squares and absolute values for losses as well
    """
    if function in FUNCTION_READERS:
        reader = FUNCTION_READERS[function]
        bound = _signature(function).bind(*args, **kwargs)
        bound.apply_defaults()
        arguments: Arguments = bound.arguments
    elif function in INDEXING_READERS or (handwritten and function in ERROR_READERS):
        reader, names = INDEXING_READERS.get(function) or ERROR_READERS[function]
        arguments = {"dim": None, **dict(zip(names, args, strict=False)), **kwargs}
    else:
        return None
    tensors = [arguments[name] for name in ("input", "target", "var") if isinstance(arguments.get(name), Tensor)]
    if not any(tensor.requires_grad and tensor.is_floating_point() for tensor in tensors):
        return None
    return reader(arguments)


@cache
def _signature(function: Any) -> inspect.Signature:
    return inspect.signature(function)


class LossWatcher(TorchFunctionMode):
    """While open, every call of a loss function returns `result` of the call.

    handwritten: squares and absolute values count as such calls, except within the forward passes of the model's
        modules
    """

    def __init__(self, model: nn.Module, handwritten: bool) -> None:
        super().__init__()
        self._model, self._handwritten, self._forward_depth = model, handwritten, 0
        self._hooks = ExitStack()

    def __enter__(self: AnyWatcher) -> AnyWatcher:
        if self._handwritten:
            for module in self._model.modules():
                self._hooks.callback(module.register_forward_pre_hook(partial(self._change_depth, 1)).remove)
                leave = module.register_forward_hook(partial(self._change_depth, -1), always_call=True)
                self._hooks.callback(leave.remove)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._hooks.close()

    def _change_depth(self, change: int, *hook_arguments: Any) -> None:
        self._forward_depth += change

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.is_grad_enabled():
            call = read_call(func, args, kwargs, self._handwritten and not self._forward_depth)
            if call is not None:
                return self.result(call, partial(func, *args, **kwargs))
        return func(*args, **kwargs)

    @abstractmethod
    def result(self, call: LossCall, compute: Callable[[], Tensor]) -> Tensor:
        """What the call returns. compute: makes the call"""


class CallRecorder(LossWatcher):
    """Keeps the calls and returns their usual results."""

    def __init__(self, model: nn.Module, handwritten: bool) -> None:
        super().__init__(model, handwritten)
        self.calls: list[LossCall] = []

    def result(self, call: LossCall, compute: Callable[[], Tensor]) -> Tensor:
        self.calls.append(replace(call, parts=[replace(part, outputs=part.outputs.detach()) for part in call.parts]))
        return compute()


class RecordedLoss:
    """A task's loss that keeps the calls of its first evaluation: later ones may be of single examples of the batch."""

    def __init__(self, loss: Measure, handwritten: bool) -> None:
        self._loss, self._handwritten = loss, handwritten
        self.calls: list[LossCall] | None = None

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        if self.calls is not None:
            return self._loss(model, batch)
        with CallRecorder(model, self._handwritten) as recorder:
            losses = self._loss(model, batch)
        self.calls = recorder.calls
        return losses


class ScaledElements(LossWatcher):
    """Multiplies the elements' losses by a factor and detaches them from the model.

    leaves: the multiplied elements of each call, in order; they require a gradient
    """

    def __init__(self, model: nn.Module, handwritten: bool, factor: float) -> None:
        super().__init__(model, handwritten)
        self._factor = factor
        self.calls: list[LossCall] = []
        self.leaves: list[Tensor] = []

    def result(self, call: LossCall, compute: Callable[[], Tensor]) -> Tensor:
        self.calls.append(call)
        self.leaves.append((call.elements * self._factor).requires_grad_())
        return call.reduce(self.leaves[-1])


@contextmanager
def differentiable(model: nn.Module, names: Sequence[str]) -> Iterator[list[Tensor]]:
    """While open, these parameters require a gradient, so that the model's outputs do. Yields the parameters."""
    parameters = [model.get_parameter(name) for name in names]
    try:
        with torch.enable_grad():
            yield [parameter.requires_grad_(True) for parameter in parameters]
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
