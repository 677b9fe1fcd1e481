"""Readers of losses that are written without torch.nn.functional.

The log-probability of each label, read by gather, take_along_dim or [rows, labels]; squares and absolute values, which
are taken for errors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gradtrace.labels import laws
from gradtrace.labels.laws import Categorical, Law
from gradtrace.labels.loss_calls import Arguments, LossCall, LossPart, Reader, is_normalized


def _gather(arguments: Arguments) -> LossCall | None:
    """One class for each row of log-probabilities."""
    logp, dim, index = arguments["input"], arguments["dim"], arguments["index"]
    dim = dim % logp.dim()
    if index.dim() != logp.dim() or index.shape[dim] != 1:
        return None
    for other in range(logp.dim()):  # rows without an index are not read
        logp = logp if other == dim else logp.narrow(other, 0, index.shape[other])
    return _label_call("gather", logp, dim, index, lambda values: values)


def _take_along_dim(arguments: Arguments) -> LossCall | None:
    logp, dim, index = arguments["input"], arguments["dim"], arguments["indices"]
    if dim is None or index.dim() != logp.dim() or index.shape[dim] != 1:
        return None
    shape = [1 if other == dim % logp.dim() else size for other, size in enumerate(logp.shape)]
    return _label_call("take_along_dim", logp, dim % logp.dim(), index.expand(shape), lambda values: values)


def _getitem(arguments: Arguments) -> LossCall | None:
    """[rows, labels], each an integer tensor."""
    logp, index = arguments["input"], arguments["index"]
    complete = isinstance(index, tuple) and len(index) == logp.dim() > 1
    if not complete or not all(isinstance(axis, Tensor) and axis.dtype == torch.int64 for axis in index):
        return None
    *rows, labels = torch.broadcast_tensors(*index)
    return _label_call("[rows, labels]", logp[tuple(rows)], -1, labels.unsqueeze(-1), lambda values: values.squeeze(-1))


def _label_call(
    name: str, logp: Tensor, dim: int, labels: Tensor, reduce: Callable[[Tensor], Tensor]
) -> LossCall | None:
    """The call that reads the log-probabilities of `labels`, which have length 1 in `dim`."""
    dim = dim % logp.dim()
    if not is_normalized(logp, dim):
        return None
    with torch.no_grad():
        elements = logp.gather(dim, labels)
    part = LossPart(logp, Categorical(dim, True), torch.ones_like(elements), labels.flatten())
    return LossCall(f"log-probabilities, {name}", [part], elements, reduce)


def _square(arguments: Arguments) -> LossCall | None:
    errors, exponent = arguments["input"], arguments.get("exponent", 2)
    if isinstance(exponent, Tensor) or exponent != 2:
        return None
    return _errors_call("squares", errors, errors.detach().square(), laws.GAUSSIAN)


def _absolute(arguments: Arguments) -> LossCall | None:
    errors = arguments["input"]
    return _errors_call("absolute values", errors, errors.detach().abs(), laws.LAPLACE)


def _errors_call(name: str, errors: Tensor, elements: Tensor, law: Law) -> LossCall | None:
    if errors.is_leaf:  # a parameter, as in a penalty on the weights
        return None
    return LossCall(name, [LossPart(errors, law, torch.ones_like(elements))], elements, lambda values: values)


NamedReader = tuple[Reader, Sequence[str]]  # with the names of the positional arguments, which built-ins do not tell

INDEXING_READERS: dict[Any, NamedReader] = {
    torch.gather: (_gather, ("input", "dim", "index")),
    Tensor.gather: (_gather, ("input", "dim", "index")),
    torch.take_along_dim: (_take_along_dim, ("input", "indices", "dim")),
    Tensor.take_along_dim: (_take_along_dim, ("input", "indices", "dim")),
    Tensor.__getitem__: (_getitem, ("input", "index")),
}
ERROR_READERS: dict[Any, NamedReader] = {
    torch.square: (_square, ("input",)),
    Tensor.square: (_square, ("input",)),
    torch.pow: (_square, ("input", "exponent")),
    Tensor.pow: (_square, ("input", "exponent")),
    Tensor.__pow__: (_square, ("input", "exponent")),
    torch.abs: (_absolute, ("input",)),
    Tensor.abs: (_absolute, ("input",)),
}
