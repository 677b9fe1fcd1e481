"""Calls of loss functions, and the readers that tell the law of the labels from a call's arguments.

Readers are here for torch.nn.functional's cross_entropy, nll_loss, kl_div, binary_cross_entropy,
binary_cross_entropy_with_logits, mse_loss, l1_loss, smooth_l1_loss, huber_loss, poisson_nll_loss and gaussian_nll_loss,
which the loss modules call as well; and for losses that are written by hand: the log-probability of each label by
gather, take_along_dim or [rows, labels]; squares and absolute values, which are taken for errors.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradtrace.labels import laws
from gradtrace.labels.laws import Categorical, Independent, Law

Arguments = Mapping[str, Any]  # of a call, by parameter name

_NORMALIZED = 1e-2  # largest |log sum exp| of values that count as log-probabilities, also in half precision


@dataclass(frozen=True, eq=False, slots=True)
class LossPart:
    """The outputs in a call whose labels have one law.

    outputs: with their graph
    mass: the factor of each element's Fisher information, in the elements' shape
    targets: class or value of each element in the call, [elements]; None where it is neither
    """

    outputs: Tensor
    law: Law
    mass: Tensor
    targets: Tensor | None = None


@dataclass(frozen=True, eq=False, slots=True)
class LossCall:
    """A call of a loss function, split into its elements' losses and their reduction.

    function: its name
    elements: losses of the elements, without their graph. In the outputs' shape, except that the dimension of classes
        has length 1 (but full length for kl_div)
    reduce: from `elements` to what the call returns; linear
    """

    function: str
    parts: Sequence[LossPart]
    elements: Tensor
    reduce: Callable[[Tensor], Tensor]

    @property
    def law(self) -> Law:
        """The law of the first part, the only one unless a variance is predicted as well."""
        return self.parts[0].law

    @property
    def classes(self) -> int | None:
        """Number of classes of a label; None if the law is not categorical."""
        return self.parts[0].outputs.shape[self.law.dim] if isinstance(self.law, Categorical) else None

    @property
    def labels(self) -> int:
        """How many labels the call has a law for."""
        return self.elements.sum(self.law.dim).numel() if isinstance(self.law, Categorical) else self.elements.numel()


Reader = Callable[[Arguments], LossCall | None]  # None: the call is not one whose law is known


def _is_normalized(values: Tensor, dim: int) -> bool:
    """Whether `values` are log-probabilities over `dim`."""
    if not values.is_floating_point() or values.shape[dim] < 2:
        return False
    from_end = dim % values.dim() - values.dim()  # vmap puts its dimension first
    with torch.no_grad():
        unwrapped = torch.func.debug_unwrap(values, recurse=True).detach().float()
        return bool((unwrapped.logsumexp(from_end).abs() <= _NORMALIZED).all())


def _elements(function: Callable[..., Tensor], arguments: Arguments) -> Tensor:
    """The losses without reduction and without graph."""
    deprecated = {name: None for name in ("size_average", "reduce") if name in arguments}
    unreduced = {**arguments, **deprecated, "reduction": "none"}
    with torch.no_grad():
        return function(**unreduced)


def _reduction(arguments: Arguments) -> str:
    if arguments.get("size_average") is not None or arguments.get("reduce") is not None:
        return str(nn._reduction.legacy_get_string(arguments["size_average"], arguments["reduce"], emit_warning=False))
    return str(arguments["reduction"])


def _unreduced(elements: Tensor) -> Tensor:
    return elements


def _reduce(arguments: Arguments, denominator: Tensor | float) -> Callable[[Tensor], Tensor]:
    """The call's reduction as a function of its elements. denominator: by which a mean divides the sum."""
    kind = _reduction(arguments)
    if kind == "none":
        return _unreduced
    return lambda elements: elements.sum() / (1.0 if kind == "sum" else denominator)


def _cross_entropy(arguments: Arguments) -> LossCall | None:
    logits, target = arguments["input"], arguments["target"]
    if target.requires_grad:
        return None
    dim = 0 if logits.dim() == 1 else 1
    class_weights, smoothing = arguments["weight"], arguments["label_smoothing"]
    if target.is_floating_point():
        smoothed = (target * (1 - smoothing) + smoothing / logits.shape[dim]).movedim(dim, -1)
        mass = (smoothed if class_weights is None else smoothed * class_weights).sum(-1)
        return _classes_call(F.cross_entropy, arguments, Categorical(dim, False), mass, mass.numel(), None)
    counts, label_weights = _label_weights(arguments)
    mean_weight = 1.0 if class_weights is None else float(class_weights.mean())
    mass = label_weights * (1 - smoothing) + counts * (mean_weight * smoothing)
    law = Categorical(dim, False)
    return _classes_call(F.cross_entropy, arguments, law, mass, label_weights.sum(), target.flatten())


def _nll_loss(arguments: Arguments) -> LossCall | None:
    dim = 0 if arguments["input"].dim() == 1 else 1
    if not _is_normalized(arguments["input"], dim):
        return None
    _, mass = _label_weights(arguments)
    law, targets = Categorical(dim, True), arguments["target"].flatten()
    return _classes_call(F.nll_loss, arguments, law, mass, mass.sum(), targets)


def _label_weights(arguments: Arguments) -> tuple[Tensor, Tensor]:
    """For each element: 1, or 0 if its label is ignore_index; and the class weight of its label, or 0."""
    target, class_weights = arguments["target"], arguments["weight"]
    labelled = target != arguments["ignore_index"]
    counts = labelled.to(arguments["input"].dtype)
    if class_weights is None:
        return counts, counts
    labels = torch.where(labelled, target, 0)
    return counts, class_weights.index_select(0, labels.flatten()).reshape(labels.shape) * labelled


def _classes_call(
    function: Callable[..., Tensor],
    arguments: Arguments,
    law: Categorical,
    mass: Tensor,
    denominator: Tensor | float,
    targets: Tensor | None,
) -> LossCall:
    """A call whose elements are one class each. mass: in the elements' shape, without a dimension of classes"""
    part = LossPart(arguments["input"], law, mass.unsqueeze(law.dim), targets)
    elements, reduce = _elements(function, arguments).unsqueeze(law.dim), _reduce(arguments, denominator)
    return LossCall(function.__name__, [part], elements, lambda values: reduce(values.squeeze(law.dim)))


def _kl_div(arguments: Arguments) -> LossCall | None:
    logp, target = torch.broadcast_tensors(arguments["input"], arguments["target"])
    dims = [dim for dim in dict.fromkeys((logp.dim() - 1, min(1, logp.dim() - 1))) if _is_normalized(logp, dim)]
    if not dims or arguments["target"].requires_grad:
        return None
    elements = _elements(F.kl_div, arguments)
    batchmean = _reduction(arguments) == "batchmean"
    reduce = _reduce(arguments, len(arguments["input"]) if batchmean else elements.numel())
    mass = target.exp() if arguments["log_target"] else target
    return LossCall("kl_div", [LossPart(logp, Categorical(dims[0], True), mass)], elements, reduce)


def _binary(function: Callable[..., Tensor], law: Law) -> Reader:
    """Reader of a binary cross-entropy."""

    def read(arguments: Arguments) -> LossCall | None:
        outputs, target, weight = arguments["input"], arguments["target"], arguments["weight"]
        if target.requires_grad:
            return None
        elements = _elements(function, arguments)
        mass = torch.ones_like(elements) if weight is None else weight.expand_as(elements)
        if arguments.get("pos_weight") is not None:
            mass = mass * (1 + (arguments["pos_weight"] - 1) * target)
        part = LossPart(outputs, law, mass, target.flatten())
        return LossCall(function.__name__, [part], elements, _reduce(arguments, elements.numel()))

    return read


def _error(function: Callable[..., Tensor], law: Callable[[Arguments], Law], by_weight: bool = True) -> Reader:
    """Reader of a loss of the difference between input and target. by_weight: a mean divides by the sum of weights."""

    def read(arguments: Arguments) -> LossCall:
        output, target = torch.broadcast_tensors(arguments["input"], arguments["target"])
        if not output.requires_grad:
            output, target = target, output
        both = target.requires_grad  # the output is then their difference, and its label is zero
        elements, weight = _elements(function, arguments), arguments.get("weight")
        mass = torch.ones_like(elements) if weight is None else weight.expand_as(elements)
        denominator = elements.numel() if weight is None or not by_weight else weight.sum()
        part = LossPart(output - target if both else output, law(arguments), mass, None if both else target.flatten())
        return LossCall(function.__name__, [part], elements, _reduce(arguments, denominator))

    return read


def _poisson_nll_loss(arguments: Arguments) -> LossCall | None:
    outputs, target = torch.broadcast_tensors(arguments["input"], arguments["target"])
    eps = arguments["eps"]
    information = torch.exp if arguments["log_input"] else lambda rate: 1 / (rate + eps)
    if target.requires_grad:
        return None
    elements = _elements(F.poisson_nll_loss, arguments)
    part = LossPart(outputs, Independent("Poisson", information), torch.ones_like(elements), target.flatten())
    return LossCall("poisson_nll_loss", [part], elements, _reduce(arguments, elements.numel()))


def _gaussian_nll_loss(arguments: Arguments) -> LossCall | None:
    mean, target, variance = arguments["input"], arguments["target"], arguments["var"]
    elements = _elements(F.gaussian_nll_loss, arguments)
    if target.requires_grad:
        return None
    if not isinstance(variance, Tensor):
        variance = torch.full_like(mean, variance)
    if variance.shape != mean.shape and variance.shape == mean.shape[:-1]:
        variance = variance.unsqueeze(-1)
    mean, target, variance = torch.broadcast_tensors(mean, target, variance)
    ones, eps, name = torch.ones_like(elements), arguments["eps"], "Gaussian with its variance"
    precision = 1 / variance.detach().clamp_min(eps)
    of_mean = Independent(name, lambda f: precision)
    of_variance = Independent(name, lambda v: 0.5 / v.clamp_min(eps).square(), second=True)
    parts = [LossPart(mean, of_mean, ones, target.flatten())] if mean.requires_grad else []
    parts += [LossPart(variance, of_variance, ones)] if variance.requires_grad else []
    return LossCall("gaussian_nll_loss", parts, elements, _reduce(arguments, elements.numel())) if parts else None


def _gather(arguments: Arguments) -> LossCall | None:
    """One class for each row of log-probabilities."""
    logp, dim, index = arguments["input"], arguments["dim"], arguments["index"]
    dim = dim % logp.dim()
    if index.dim() != logp.dim() or index.shape[dim] != 1:
        return None
    for other in range(logp.dim()):  # rows without an index are not read
        logp = logp if other == dim else logp.narrow(other, 0, index.shape[other])
    return _label_call("gather", logp, dim, index, _unreduced)


def _take_along_dim(arguments: Arguments) -> LossCall | None:
    logp, dim, index = arguments["input"], arguments["dim"], arguments["indices"]
    if dim is None or index.dim() != logp.dim() or index.shape[dim] != 1:
        return None
    shape = [1 if other == dim % logp.dim() else size for other, size in enumerate(logp.shape)]
    return _label_call("take_along_dim", logp, dim, index.expand(shape), _unreduced)


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
    if not _is_normalized(logp, dim):
        return None
    with torch.no_grad():
        elements = logp.gather(dim, labels)
    part = LossPart(logp, Categorical(dim, True), torch.ones_like(elements), labels.flatten())
    return LossCall(f"log-probabilities, {name}", [part], elements, reduce)


def _square(arguments: Arguments) -> LossCall | None:
    exponent = arguments.get("exponent", 2)
    if isinstance(exponent, Tensor) or exponent != 2:
        return None
    return _errors_call("squares", arguments["input"], torch.square, laws.GAUSSIAN)


def _absolute(arguments: Arguments) -> LossCall | None:
    return _errors_call("absolute values", arguments["input"], torch.abs, laws.LAPLACE)


def _errors_call(name: str, errors: Tensor, function: Callable[[Tensor], Tensor], law: Law) -> LossCall | None:
    if errors.is_leaf:  # a parameter, as in a penalty on the weights
        return None
    elements = function(errors.detach())
    return LossCall(name, [LossPart(errors, law, torch.ones_like(elements))], elements, _unreduced)


_FUNCTION_READERS: dict[Any, Reader] = {
    F.cross_entropy: _cross_entropy,
    F.nll_loss: _nll_loss,
    F.kl_div: _kl_div,
    F.binary_cross_entropy: _binary(F.binary_cross_entropy, laws.BERNOULLI_PROBABILITY),
    F.binary_cross_entropy_with_logits: _binary(F.binary_cross_entropy_with_logits, laws.BERNOULLI),
    F.mse_loss: _error(F.mse_loss, lambda arguments: laws.GAUSSIAN),
    F.l1_loss: _error(F.l1_loss, lambda arguments: laws.LAPLACE),
    F.smooth_l1_loss: _error(F.smooth_l1_loss, lambda arguments: laws.smooth_l1(arguments["beta"])),
    F.huber_loss: _error(F.huber_loss, lambda arguments: laws.huber(arguments["delta"]), by_weight=False),
    F.poisson_nll_loss: _poisson_nll_loss,
    F.gaussian_nll_loss: _gaussian_nll_loss,
}
# With the names of the positional arguments, which built-in functions do not tell.
_INDEXING_READERS: dict[Any, tuple[Reader, Sequence[str]]] = {
    **dict.fromkeys((torch.gather, Tensor.gather), (_gather, ("input", "dim", "index"))),
    **dict.fromkeys((torch.take_along_dim, Tensor.take_along_dim), (_take_along_dim, ("input", "indices", "dim"))),
    Tensor.__getitem__: (_getitem, ("input", "index")),
}
_ERROR_READERS: dict[Any, tuple[Reader, Sequence[str]]] = {
    **dict.fromkeys((torch.square, Tensor.square), (_square, ("input",))),
    **dict.fromkeys((torch.pow, Tensor.pow, Tensor.__pow__), (_square, ("input", "exponent"))),
    **dict.fromkeys((torch.abs, Tensor.abs), (_absolute, ("input",))),
}


_signature = cache(inspect.signature)


def read_call(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], handwritten: bool) -> LossCall | None:
    """The call, if it is one of a loss function on outputs that require a gradient and its law is known; else None.

    handwritten: take squares and absolute values for losses as well
    """
    if function in _FUNCTION_READERS:
        reader = _FUNCTION_READERS[function]
        bound = _signature(function).bind(*args, **kwargs)
        bound.apply_defaults()
        arguments: Arguments = bound.arguments
    elif function in _INDEXING_READERS or (handwritten and function in _ERROR_READERS):
        reader, names = _INDEXING_READERS.get(function) or _ERROR_READERS[function]
        arguments = {"dim": None, **dict(zip(names, args, strict=False)), **kwargs}
    else:
        return None
    tensors = [arguments[name] for name in ("input", "target", "var") if isinstance(arguments.get(name), Tensor)]
    if not any(tensor.requires_grad and tensor.is_floating_point() for tensor in tensors):
        return None
    return reader(arguments)
