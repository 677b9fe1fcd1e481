"""Readers of calls of torch.nn.functional's losses, which the loss modules call as well: what each says of the labels.

They read cross_entropy, nll_loss, kl_div, binary_cross_entropy, binary_cross_entropy_with_logits, mse_loss, l1_loss,
smooth_l1_loss, huber_loss, poisson_nll_loss and gaussian_nll_loss.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradtrace.labels import laws
from gradtrace.labels.laws import Categorical, Law
from gradtrace.labels.loss_calls import Arguments, LossCall, LossPart, Reader, is_normalized


def _elements(function: Callable[..., Tensor], arguments: Arguments) -> Tensor:
    """The losses without reduction and without graph."""
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


def _reduce(arguments: Arguments, denominator: Tensor | float) -> Callable[[Tensor], Tensor]:
    """The call's reduction as a function of its elements. denominator: by which a mean divides the sum."""
    kind = _reduction(arguments)
    if kind == "none":
        return lambda elements: elements
    return lambda elements: elements.sum() / (1.0 if kind == "sum" else denominator)


def _cross_entropy(arguments: Arguments) -> LossCall | None:
    logits, target = arguments["input"], arguments["target"]
    if target.requires_grad:
        return None
    dim = 0 if logits.dim() == 1 else 1
    class_weights, smoothing = arguments["weight"], arguments["label_smoothing"]
    elements = _elements(F.cross_entropy, arguments)
    if target.is_floating_point():
        smoothed = target * (1 - smoothing) + smoothing / logits.shape[dim]
        mass = (smoothed if class_weights is None else smoothed * _along(class_weights, dim, logits)).sum(dim)
        denominator: Tensor | float = elements.numel()
        targets = None
    else:
        counts, label_weights = _label_weights(arguments, logits)
        mean_weight = 1.0 if class_weights is None else float(class_weights.mean())
        mass = label_weights * (1 - smoothing) + counts * (mean_weight * smoothing)
        denominator, targets = label_weights.sum(), target.flatten()
    return _classes_call("cross_entropy", arguments, elements, mass, denominator, targets, Categorical(dim, False))


def _nll_loss(arguments: Arguments) -> LossCall | None:
    logp = arguments["input"]
    dim = 0 if logp.dim() == 1 else 1
    if not is_normalized(logp, dim):
        return None
    _, mass = _label_weights(arguments, logp)
    elements, targets = _elements(F.nll_loss, arguments), arguments["target"].flatten()
    return _classes_call("nll_loss", arguments, elements, mass, mass.sum(), targets, Categorical(dim, True))


def _label_weights(arguments: Arguments, outputs: Tensor) -> tuple[Tensor, Tensor]:
    """For each element: 1, or 0 if its label is ignore_index; and the class weight of its label, or 0."""
    target, class_weights = arguments["target"], arguments["weight"]
    counts = target != arguments["ignore_index"]
    if class_weights is None:
        return counts.to(outputs.dtype), counts.to(outputs.dtype)
    labels = torch.where(counts, target, 0)
    return counts.to(outputs.dtype), class_weights.index_select(0, labels.flatten()).reshape(labels.shape) * counts


def _classes_call(
    name: str,
    arguments: Arguments,
    elements: Tensor,
    mass: Tensor,
    denominator: Tensor | float,
    targets: Tensor | None,
    law: Categorical,
) -> LossCall:
    reduce = _reduce(arguments, denominator)
    part = LossPart(arguments["input"], law, mass.unsqueeze(law.dim), targets)
    return LossCall(name, [part], elements.unsqueeze(law.dim), lambda values: reduce(values.squeeze(law.dim)))


def _kl_div(arguments: Arguments) -> LossCall | None:
    logp, target = torch.broadcast_tensors(arguments["input"], arguments["target"])
    dims = [dim for dim in dict.fromkeys((logp.dim() - 1, min(1, logp.dim() - 1))) if is_normalized(logp, dim)]
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
    law = laws.POISSON_LOG_RATE if arguments["log_input"] else laws.poisson_rate(arguments["eps"])
    if target.requires_grad:
        return None
    elements = _elements(F.poisson_nll_loss, arguments)
    part = LossPart(outputs, law, torch.ones_like(elements), target.flatten())
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
    ones, eps = torch.ones_like(elements), arguments["eps"]
    mean_law = laws.gaussian_mean(variance.detach().clamp_min(eps))
    parts = [LossPart(mean, mean_law, ones, target.flatten())] if mean.requires_grad else []
    if variance.requires_grad:
        parts.append(LossPart(variance, laws.gaussian_variance(eps), ones))
    return LossCall("gaussian_nll_loss", parts, elements, _reduce(arguments, elements.numel())) if parts else None


def _along(weights: Tensor, dim: int, outputs: Tensor) -> Tensor:
    """`weights` [classes], shaped to broadcast along dimension `dim` of `outputs`."""
    return weights.reshape([-1 if other == dim else 1 for other in range(outputs.dim())])


FUNCTION_READERS: dict[Any, Reader] = {
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
