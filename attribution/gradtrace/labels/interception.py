"""Intercepting the calls of loss functions that a task's loss makes while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gradtrace.data.batches import Measure
from gradtrace.labels.call_readers import LossCall, read_call
from gradtrace.task import Batch


class CallInterceptor(TorchFunctionMode):
    """While open, every call of a loss function returns `result(call, compute)`; `compute` makes the original call.

    handwritten: squares and absolute values count as such calls, except within the forward passes of the model's
        modules
    """

    def __init__(
        self, model: nn.Module, handwritten: bool, result: Callable[[LossCall, Callable[[], Tensor]], Tensor]
    ) -> None:
        super().__init__()
        self._model, self._handwritten, self._result, self._forward_depth = model, handwritten, result, 0
        self._hooks = ExitStack()

    def __enter__(self) -> CallInterceptor:
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
                return self._result(call, partial(func, *args, **kwargs))
        return func(*args, **kwargs)


class RecordedLoss:
    """A task's loss that keeps the calls of its first evaluation; later ones may be of single examples of the batch.

    calls: with the outputs detached; None before the first evaluation
    """

    def __init__(self, loss: Measure, handwritten: bool) -> None:
        self._loss, self._handwritten = loss, handwritten
        self.calls: list[LossCall] | None = None

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        if self.calls is not None:
            return self._loss(model, batch)
        calls: list[LossCall] = []

        def record(call: LossCall, compute: Callable[[], Tensor]) -> Tensor:
            calls.append(replace(call, parts=[replace(part, outputs=part.outputs.detach()) for part in call.parts]))
            return compute()

        with CallInterceptor(model, self._handwritten, record):
            losses = self._loss(model, batch)
        self.calls = calls
        return losses


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
