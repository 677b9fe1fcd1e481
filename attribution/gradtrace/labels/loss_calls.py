"""Calls of PyTorch's loss functions, read: outputs, law of the labels, losses of the elements, and their reduction.

Read are torch.nn.functional's cross_entropy, nll_loss, binary_cross_entropy, binary_cross_entropy_with_logits,
mse_loss, l1_loss, smooth_l1_loss, huber_loss, poisson_nll_loss, gaussian_nll_loss and kl_div, which the modules call;
picking labels out of log-probabilities (gather, take_along_dim, [rows, labels]); and, if asked for, squares and
absolute values, taken for errors.
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

from gradtrace.labels import laws as output_laws
from gradtrace.labels.laws import Categorical, Law

_NORMALIZED = 1e-2  # largest |log sum exp| of what counts as log-probabilities, also in half precision


@dataclass(frozen=True, eq=False, slots=True)
class LossPart:
    """Outputs of one law in a call.

    outputs: with their graph.
    mass: how much each element's Fisher information counts, in the elements' shape.
    targets: class or value of each element as the call was given it, [elements]; None where it is neither.
    """

    outputs: Tensor
    law: Law
    mass: Tensor
    targets: Tensor | None = None


@dataclass(frozen=True, eq=False, slots=True)
class LossCall:
    """A call of a loss function, as its elements' losses and what becomes of them.

    function: its name.
    elements: losses of the elements without their graph, in the outputs' shape but for the classes, of which there is
        one (or, of kl_div, all).
    returned: from elements to what the call returns; linear.
    """

    function: str
    parts: Sequence[LossPart]
    elements: Tensor
    returned: Callable[[Tensor], Tensor]

    @property
    def distributions(self) -> int:
        """For how many labels it has a law."""
        law = self.parts[0].law
        return self.elements.sum(law.dim).numel() if isinstance(law, Categorical) else self.elements.numel()


Arguments = Mapping[str, Any]


def _plain(function: Callable[..., Tensor], arguments: Arguments) -> Tensor:
    """Without reduction and without graph."""
    unreduced = {**arguments, "reduction": "none"}
    for name in ("size_average", "reduce"):
        if name in unreduced:
            unreduced[name] = None
    with torch.no_grad():
        return function(**unreduced)


def _reduction(arguments: Arguments) -> str:
    if arguments.get("size_average") is not None or arguments.get("reduce") is not None:
        return str(nn._reduction.legacy_get_string(arguments["size_average"], arguments["reduce"], emit_warning=False))
    return str(arguments["reduction"])


def _reducing(arguments: Arguments, denominator: Tensor | float) -> Callable[[Tensor], Tensor]:
    """denominator: what a mean divides the sum by."""
    kind = _reduction(arguments)
    if kind == "none":
        return lambda elements: elements
    return lambda elements: elements.sum() / (1.0 if kind == "sum" else denominator)


def _cross_entropy(arguments: Arguments) -> LossCall | None:
    logits, target = arguments["input"], arguments["target"]
    if target.requires_grad:
        return None
    dim = 0 if logits.dim() == 1 else 1
    weight, smoothing = arguments["weight"], arguments["label_smoothing"]
    elements = _plain(F.cross_entropy, arguments)
    if target.is_floating_point():
        smoothed = target * (1 - smoothing) + smoothing / logits.shape[dim]
        mass = (smoothed if weight is None else smoothed * _along(weight, dim, logits)).sum(dim)
        denominator: Tensor | float = elements.numel()
        targets = None
    else:
        counted, of_label = _label_weights(arguments, logits)
        overall = 1.0 if weight is None else float(weight.mean())
        mass = of_label * (1 - smoothing) + counted * (overall * smoothing)
        denominator, targets = of_label.sum(), target.flatten()
    return _classes_call("cross_entropy", arguments, elements, mass, denominator, targets, Categorical(dim, False))


def _nll_loss(arguments: Arguments) -> LossCall | None:
    logp = arguments["input"]
    dim = 0 if logp.dim() == 1 else 1
    if not _is_normalized(logp, dim):
        return None
    _, mass = _label_weights(arguments, logp)
    elements, targets = _plain(F.nll_loss, arguments), arguments["target"].flatten()
    return _classes_call("nll_loss", arguments, elements, mass, mass.sum(), targets, Categorical(dim, True))


def _label_weights(arguments: Arguments, outputs: Tensor) -> tuple[Tensor, Tensor]:
    """Whether each element counts, as a number, and the class weight of its label."""
    target, weight = arguments["target"], arguments["weight"]
    counted = target != arguments["ignore_index"]
    if weight is None:
        return counted.to(outputs.dtype), counted.to(outputs.dtype)
    labels = torch.where(counted, target, 0)
    return counted.to(outputs.dtype), weight.index_select(0, labels.flatten()).reshape(labels.shape) * counted


def _classes_call(
    name: str,
    arguments: Arguments,
    elements: Tensor,
    mass: Tensor,
    denominator: Tensor | float,
    targets: Tensor | None,
    law: Categorical,
) -> LossCall:
    reduce = _reducing(arguments, denominator)
    part = LossPart(arguments["input"], law, mass.unsqueeze(law.dim), targets)
    return LossCall(name, [part], elements.unsqueeze(law.dim), lambda values: reduce(values.squeeze(law.dim)))


def _kl_div(arguments: Arguments) -> LossCall | None:
    logp, target = torch.broadcast_tensors(arguments["input"], arguments["target"])
    dims = [dim for dim in dict.fromkeys((logp.dim() - 1, min(1, logp.dim() - 1))) if _is_normalized(logp, dim)]
    if not dims or arguments["target"].requires_grad:
        return None
    elements = _plain(F.kl_div, arguments)
    batchmean = _reduction(arguments) == "batchmean"
    reduce = _reducing(arguments, len(arguments["input"]) if batchmean else elements.numel())
    mass = target.exp() if arguments["log_target"] else target
    return LossCall("kl_div", [LossPart(logp, Categorical(dims[0], True), mass)], elements, reduce)


def _binary(function: Callable[..., Tensor], law: Law) -> Callable[[Arguments], LossCall | None]:
    def read(arguments: Arguments) -> LossCall | None:
        outputs, target, weight = arguments["input"], arguments["target"], arguments["weight"]
        if target.requires_grad:
            return None
        elements = _plain(function, arguments)
        mass = torch.ones_like(elements) if weight is None else weight.expand_as(elements)
        if arguments.get("pos_weight") is not None:
            mass = mass * (1 + (arguments["pos_weight"] - 1) * target)
        part = LossPart(outputs, law, mass, target.flatten())
        return LossCall(function.__name__, [part], elements, _reducing(arguments, elements.numel()))

    return read


def _error(
    function: Callable[..., Tensor], law: Callable[[Arguments], Law], by_weight: bool = True
) -> Callable[[Arguments], LossCall | None]:
    """Losses of the difference between input and target. by_weight: a mean divides by the sum of the weights."""

    def read(arguments: Arguments) -> LossCall:
        given, target = torch.broadcast_tensors(arguments["input"], arguments["target"])
        if not given.requires_grad:
            given, target = target, given
        both = target.requires_grad  # then it is the difference that is the output, and a label of it is zero
        elements, weight = _plain(function, arguments), arguments.get("weight")
        mass = torch.ones_like(elements) if weight is None else weight.expand_as(elements)
        denominator = elements.numel() if weight is None or not by_weight else weight.sum()
        part = LossPart(given - target if both else given, law(arguments), mass, None if both else target.flatten())
        return LossCall(function.__name__, [part], elements, _reducing(arguments, denominator))

    return read


def _poisson_nll_loss(arguments: Arguments) -> LossCall | None:
    outputs, target = torch.broadcast_tensors(arguments["input"], arguments["target"])
    law = output_laws.POISSON_LOG_RATE if arguments["log_input"] else output_laws.poisson_rate(arguments["eps"])
    if target.requires_grad:
        return None
    elements = _plain(F.poisson_nll_loss, arguments)
    part = LossPart(outputs, law, torch.ones_like(elements), target.flatten())
    return LossCall("poisson_nll_loss", [part], elements, _reducing(arguments, elements.numel()))


def _gaussian_nll_loss(arguments: Arguments) -> LossCall | None:
    mean, target, variance = arguments["input"], arguments["target"], arguments["var"]
    elements = _plain(F.gaussian_nll_loss, arguments)
    if target.requires_grad:
        return None
    if not isinstance(variance, Tensor):
        variance = torch.full_like(mean, variance)
    if variance.shape != mean.shape and variance.shape == mean.shape[:-1]:
        variance = variance.unsqueeze(-1)
    mean, target, variance = torch.broadcast_tensors(mean, target, variance)
    ones, smallest = torch.ones_like(elements), arguments["eps"]
    law = output_laws.gaussian_mean(variance.detach().clamp_min(smallest))
    parts = [LossPart(mean, law, ones, target.flatten())] if mean.requires_grad else []
    if variance.requires_grad:
        parts.append(LossPart(variance, output_laws.gaussian_variance(smallest), ones))
    return LossCall("gaussian_nll_loss", parts, elements, _reducing(arguments, elements.numel())) if parts else None


def _gather(arguments: Arguments) -> LossCall | None:
    """One class for each row of log-probabilities."""
    logp, dim, index = arguments["input"], arguments["dim"], arguments["index"]
    dim = dim % logp.dim()
    if index.dim() != logp.dim() or index.shape[dim] != 1:
        return None
    for other in range(logp.dim()):  # rows without an index are not read
        logp = logp if other == dim else logp.narrow(other, 0, index.shape[other])
    return _picked("gather", logp, dim, index, lambda values: values)


def _take_along_dim(arguments: Arguments) -> LossCall | None:
    logp, dim, index = arguments["input"], arguments["dim"], arguments["indices"]
    if dim is None or index.dim() != logp.dim() or index.shape[dim] != 1:
        return None
    shape = [1 if other == dim % logp.dim() else size for other, size in enumerate(logp.shape)]
    return _picked("take_along_dim", logp, dim % logp.dim(), index.expand(shape), lambda values: values)


def _getitem(arguments: Arguments) -> LossCall | None:
    """[rows, labels], each an integer tensor."""
    logp, index = arguments["input"], arguments["index"]
    indexes = isinstance(index, tuple) and len(index) == logp.dim() > 1
    if not indexes or not all(isinstance(own, Tensor) and own.dtype == torch.int64 for own in index):
        return None
    *rows, labels = torch.broadcast_tensors(*index)
    return _picked("[rows, labels]", logp[tuple(rows)], -1, labels.unsqueeze(-1), lambda values: values.squeeze(-1))


def _picked(name: str, logp: Tensor, dim: int, labels: Tensor, returned: Callable[[Tensor], Tensor]) -> LossCall | None:
    dim = dim % logp.dim()
    if not _is_normalized(logp, dim):
        return None
    with torch.no_grad():
        elements = logp.gather(dim, labels)
    part = LossPart(logp, Categorical(dim, True), torch.ones_like(elements), labels.flatten())
    return LossCall(f"log-probabilities, {name}", [part], elements, returned)


def _square(arguments: Arguments) -> LossCall | None:
    errors, exponent = arguments["input"], arguments.get("exponent", 2)
    if isinstance(exponent, Tensor) or exponent != 2:
        return None
    return _errors_call("squares", errors, errors.detach().square(), output_laws.GAUSSIAN)


def _absolute(arguments: Arguments) -> LossCall | None:
    errors = arguments["input"]
    return _errors_call("absolute values", errors, errors.detach().abs(), output_laws.LAPLACE)


def _errors_call(name: str, errors: Tensor, elements: Tensor, law: Law) -> LossCall | None:
    if errors.is_leaf:  # a parameter
        return None
    return LossCall(name, [LossPart(errors, law, torch.ones_like(elements))], elements, lambda values: values)


def _is_normalized(values: Tensor, dim: int) -> bool:
    if not values.is_floating_point() or values.shape[dim] < 2:
        return False
    from_end = dim % values.dim() - values.dim()  # vmap puts its own dimension first
    with torch.no_grad():
        plain = torch.func.debug_unwrap(values, recurse=True).detach().float()
        return bool((plain.logsumexp(from_end).abs() <= _NORMALIZED).all())


def _along(weights: Tensor, dim: int, outputs: Tensor) -> Tensor:
    return weights.reshape([-1 if other == dim else 1 for other in range(outputs.dim())])


_FUNCTIONS: dict[Any, Callable[[Arguments], LossCall | None]] = {
    F.cross_entropy: _cross_entropy,
    F.nll_loss: _nll_loss,
    F.kl_div: _kl_div,
    F.binary_cross_entropy: _binary(F.binary_cross_entropy, output_laws.BERNOULLI_PROBABILITY),
    F.binary_cross_entropy_with_logits: _binary(F.binary_cross_entropy_with_logits, output_laws.BERNOULLI),
    F.mse_loss: _error(F.mse_loss, lambda arguments: output_laws.GAUSSIAN),
    F.l1_loss: _error(F.l1_loss, lambda arguments: output_laws.LAPLACE),
    F.smooth_l1_loss: _error(F.smooth_l1_loss, lambda arguments: output_laws.smooth_l1(arguments["beta"])),
    F.huber_loss: _error(F.huber_loss, lambda arguments: output_laws.huber(arguments["delta"]), by_weight=False),
    F.poisson_nll_loss: _poisson_nll_loss,
    F.gaussian_nll_loss: _gaussian_nll_loss,
}
_PICKING: dict[Any, tuple[Callable[[Arguments], LossCall | None], Sequence[str]]] = {
    torch.gather: (_gather, ("input", "dim", "index")),
    Tensor.gather: (_gather, ("input", "dim", "index")),
    torch.take_along_dim: (_take_along_dim, ("input", "indices", "dim")),
    Tensor.take_along_dim: (_take_along_dim, ("input", "indices", "dim")),
    Tensor.__getitem__: (_getitem, ("input", "index")),
}
_HANDWRITTEN: dict[Any, tuple[Callable[[Arguments], LossCall | None], Sequence[str]]] = {
    torch.square: (_square, ("input",)),
    Tensor.square: (_square, ("input",)),
    torch.pow: (_square, ("input", "exponent")),
    Tensor.pow: (_square, ("input", "exponent")),
    Tensor.__pow__: (_square, ("input", "exponent")),
    torch.abs: (_absolute, ("input",)),
    Tensor.abs: (_absolute, ("input",)),
}


@cache
def _signature(function: Any) -> inspect.Signature:
    return inspect.signature(function)


def read_call(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any], handwritten: bool) -> LossCall | None:
    """The call as one of a loss function on outputs that require a gradient; None where it is no such call.

    handwritten: read squares and absolute values as well.
    """
    if function in _FUNCTIONS:
        reader = _FUNCTIONS[function]
        bound = _signature(function).bind(*args, **kwargs)
        bound.apply_defaults()
        arguments: Arguments = bound.arguments
    elif function in _PICKING or (handwritten and function in _HANDWRITTEN):
        reader, names = _PICKING.get(function) or _HANDWRITTEN[function]
        arguments = {"dim": None, **dict(zip(names, args, strict=False)), **kwargs}
    else:
        return None
    given = [arguments[name] for name in ("input", "target", "var") if isinstance(arguments.get(name), Tensor)]
    if not any(tensor.requires_grad and tensor.is_floating_point() for tensor in given):
        return None
    return reader(arguments)
