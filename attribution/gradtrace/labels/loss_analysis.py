"""Analysis of a task's loss: which calls of loss functions it is a weighted sum of, and the laws of their labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gradtrace.data.batches import Measure
from gradtrace.labels.call_readers import LossCall
from gradtrace.labels.interception import CallInterceptor, differentiable
from gradtrace.labels.laws import Categorical, Law
from gradtrace.labels.sampled_gradients import LossOutputs
from gradtrace.task import Batch

_ROUNDING = 2e-3  # deviation from linearity, relative to the largest loss, that counts as rounding
_NO_FUNCTION = "it is made from none of the loss functions of torch.nn.functional"


class _NoLawError(Exception):
    """The loss is not a weighted sum of losses whose law is known. The text gives the reason."""


class _Evaluation(NamedTuple):
    """An evaluation of the loss, with the elements of its calls detached from the model.

    calls: the calls of loss functions
    leaves: the elements' losses of each call, on which `losses` depend
    losses: [batch], with a graph to the leaves and to the parameters that they depend on by other terms
    """

    calls: Sequence[LossCall]
    leaves: Sequence[Tensor]
    losses: Tensor


@dataclass(frozen=True, eq=False)
class LossSample:
    """A loss, and a few examples to evaluate it on.

    names: of the trained parameters
    batch: all the examples, collated
    alone: collates the first example alone
    """

    loss: Measure
    model: nn.Module
    names: Sequence[str]
    batch: Batch
    alone: Callable[[], Batch]

    def evaluated(self, handwritten: bool, factor: float = 1.0, batch: Batch = None) -> _Evaluation:
        """Evaluate with the elements' losses multiplied by `factor`. batch: None: all the examples"""
        calls: list[LossCall] = []
        leaves: list[Tensor] = []

        def scaled(call: LossCall, compute: Callable[[], Tensor]) -> Tensor:
            calls.append(call)
            leaves.append((call.elements * factor).requires_grad_())
            return call.reduce(leaves[-1])

        with CallInterceptor(self.model, handwritten, scaled):
            losses = self.loss(self.model, self.batch if batch is None else batch)
        return _Evaluation(calls, leaves, losses)


def analyse_loss(sample: LossSample) -> LossOutputs | str:
    """The outputs that the loss takes and their laws; or the reason why they are not known.

    Squares and absolute values are taken for errors only if the loss calls no loss function, or has terms that come
    from no such call.
    """
    by_function = _outputs_or_reason(sample, False)
    if isinstance(by_function, LossOutputs) and (by_function.law is not None or not by_function.has_other_terms):
        return by_function
    by_hand = _outputs_or_reason(sample, True)
    return by_hand if isinstance(by_hand, LossOutputs) or by_function == _NO_FUNCTION else by_function


def _outputs_or_reason(sample: LossSample, handwritten: bool) -> LossOutputs | str:
    try:
        return _outputs(sample, handwritten)
    except _NoLawError as error:
        return str(error)
    except Exception as error:  # the user's code may fail on scaled losses
        return f"it fails while it is analysed, {type(error).__name__}: {error}"


def _outputs(sample: LossSample, handwritten: bool) -> LossOutputs:
    with differentiable(sample.model, sample.names) as parameters:
        unscaled = sample.evaluated(handwritten)
        used = _weighted_calls(unscaled)
        if not used:
            raise _NoLawError(_NO_FUNCTION)
        doubled = sample.evaluated(handwritten, 2.0)
        _check_linear(unscaled.losses, doubled.losses, sample.evaluated(handwritten, 0.5).losses)
        has_other_terms = _has_other_terms(unscaled, doubled, parameters)
        in_batch = len(unscaled.calls)
        for_one = in_batch if in_batch == 1 else len(sample.evaluated(handwritten, batch=sample.alone()).calls)
    example_by_example = in_batch == for_one * len(unscaled.losses) > for_one
    in_order = example_by_example or in_batch == for_one
    law = _single_law(used, in_batch, len(unscaled.losses)) if in_order else None
    return LossOutputs(
        loss=sample.loss,
        handwritten=handwritten,
        calls=for_one if example_by_example else in_batch,
        example_by_example=example_by_example,
        has_other_terms=has_other_terms,
        functions=list(dict.fromkeys(_description(call) for call, _, _ in used)),
        law=law,
        classes=unscaled.calls[0].classes if law else None,
        targets=_targets([call for call, _, _ in used]) if law else None,
    )


def _check_linear(unscaled: Tensor, doubled: Tensor, halved: Tensor) -> None:
    """Raises _NoLawError if losses [batch] are not affine in those of the elements, which are scaled by 1, 2, 1/2."""
    with torch.no_grad():
        deviation = (doubled - unscaled) - 2 * (unscaled - halved)
        largest = float(torch.stack([unscaled.abs().max(), doubled.abs().max()]).max())
        if not float(deviation.abs().max()) <= _ROUNDING * largest:  # or NaN
            raise _NoLawError("it is not a weighted sum of what the loss functions return (a focal loss, say, is not)")


def _has_other_terms(unscaled: _Evaluation, doubled: _Evaluation, parameters: Sequence[Tensor]) -> bool:
    """Whether the losses depend on the model by terms that come from no call of a loss function.

    The gradient of such terms must not change with the elements' scale: a product of the two implies no law.
    """
    gradient = _gradient(unscaled.losses, parameters)
    if gradient is None:
        return False
    of_doubled = _gradient(doubled.losses, parameters)
    if of_doubled is None or float((of_doubled - gradient).norm()) > _ROUNDING * float(gradient.norm()):
        raise _NoLawError("it weighs what the loss functions return by what depends on the model (a focal loss, say)")
    return True


def _gradient(losses: Tensor, parameters: Sequence[Tensor]) -> Tensor | None:
    """The gradient of the losses' sum, flattened; None if it is zero."""
    if not losses.requires_grad:
        return None
    gradients = torch.autograd.grad(losses.sum(), parameters, retain_graph=True, allow_unused=True)
    if not any(gradient is not None and bool(gradient.any()) for gradient in gradients):
        return None
    pairs = zip(gradients, parameters, strict=True)
    return torch.cat([(torch.zeros_like(values) if g is None else g).flatten().float() for g, values in pairs])


def _weighted_calls(evaluation: _Evaluation) -> list[tuple[LossCall, Tensor, Tensor]]:
    """The calls that the losses depend on, with the gradients of sum_i losses_i and of sum_i (1 + i) losses_i."""
    leaves, losses = evaluation.leaves, evaluation.losses
    if not (leaves and losses.requires_grad):
        return []
    factors = torch.arange(1, len(losses) + 1, device=losses.device).to(losses.dtype)
    sums = (losses.sum(), (factors * losses).sum())
    equal, numbered = (torch.autograd.grad(total, leaves, retain_graph=True, allow_unused=True) for total in sums)
    weighted = zip(evaluation.calls, equal, numbered, strict=True)
    return [(call, e, n) for call, e, n in weighted if e is not None and n is not None]


def _single_law(used: Sequence[tuple[LossCall, Tensor, Tensor]], calls: int, examples: int) -> Law | None:
    """The law of every example's label, if each example has exactly one and the calls keep the batch's order.

    used: as `_weighted_calls` returns them.  calls: their number with unused ones
    """
    if len(used) < calls or sum(call.labels for call, _, _ in used) != examples:
        return None
    if len({_description(call) for call, _, _ in used}) > 1 or any(len(call.parts) > 1 for call, _, _ in used):
        return None
    equal = torch.cat([_by_label(call, weights) for call, weights, _ in used])
    numbered = torch.cat([_by_label(call, weights) for call, _, weights in used])
    factors = torch.arange(1, len(equal) + 1, device=equal.device)
    return used[0][0].law if torch.allclose(numbered, factors * equal, rtol=1e-3) else None


def _by_label(call: LossCall, weights: Tensor) -> Tensor:
    """Weights of the elements, summed over the elements of each label (kl_div has several). [labels]"""
    if isinstance(call.law, Categorical) and weights.numel() > call.labels:
        weights = weights.sum(call.law.dim)
    return weights.flatten()


def _description(call: LossCall) -> str:
    over = "" if call.classes is None else f" over {call.classes} classes"
    return f"{call.law.name}{over} ({call.function})"


def _targets(calls: Sequence[LossCall]) -> Tensor | None:
    """Class or value of each label, float64 [labels] on the CPU; None if a call does not tell them."""
    targets = [call.parts[0].targets for call in calls]
    known = [values.detach().double().cpu() for values in targets if values is not None]
    return torch.cat(known) if len(known) == len(targets) else None
