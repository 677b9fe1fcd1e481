"""A trial of gradient paths: the gradients that they give for a sample of rows, compared with autograd's."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from gradtrace.data.batches import ExampleBatch, Measure
from gradtrace.data.guards import rounding
from gradtrace.data.sample import Sample
from gradtrace.errors import LossError
from gradtrace.gradients.capture import observed_uses
from gradtrace.gradients.layouts import Layout, Use
from gradtrace.gradients.plan import GradientPath, LayerPlan
from gradtrace.gradients.reference import autograd_gradients, stray_gradients
from gradtrace.layers import Layer, real_values

# Differences that count as rounding, besides `rounding` relative to the gradient itself:
_SHARE_OF_LARGEST = 1e-5  # of the parameter's largest gradient in the sample
_SHARE_OF_OTHERS = 1e-6  # of the largest gradient of any parameter
_COMPARED = 1 << 29  # elements of gradients that are compared in one attempt, besides those of the smallest batch
_CACHED = 1 << 27  # elements of reference gradients that are kept for the next attempt


class Trial:
    """A measure on a sample of rows: each row's gradients by autograd, which those of the paths must equal."""

    def __init__(self, model: nn.Module, measure: Measure, sample: Sample, names: Sequence[str]) -> None:
        """Raises LossError if the loss depends on none of the named parameters."""
        self.model, self.measure, self.sample, self.names = model, measure, sample, names
        self._references: dict[int, Mapping[str, Tensor | None]] = {}  # by position in the sample
        self._norms: dict[str, list[float]] = {name: [] for name in names}
        self._dependencies: set[str] = set()  # parameters on which a loss depends
        self._size = sum(model.get_parameter(name).numel() for name in names)
        for position in range(len(sample.rows)):
            gradients = self.reference(position)
            for name, gradient in gradients.items():
                self._norms[name].append(0.0 if gradient is None else _norm(gradient))
                if gradient is not None:
                    self._dependencies.add(name)
            if self._size * (position + 1) <= _CACHED:
                self._references[position] = gradients
        if not self._dependencies:
            raise LossError(
                "the loss does not depend on any layer of the model: was it computed under torch.no_grad(), detached, "
                "or from another model than the one passed in?"
            )
        largest = {name: max(filter(math.isfinite, norms), default=0.0) for name, norms in self._norms.items()}
        of_others = _SHARE_OF_OTHERS * max(largest.values())
        self._tolerances = {name: _SHARE_OF_LARGEST * norm + of_others for name, norm in largest.items()}

    def has_zero_gradients(self) -> bool:
        """Whether the losses depend on a parameter whose gradient is zero for every row."""
        return not all(any(self._norms[name]) for name in self._dependencies)

    def reference(self, position: int) -> Mapping[str, Tensor | None]:
        """Autograd's gradients of one row alone, by parameter name; None if its loss does not depend on the parameter.

        position: of the row in the sample
        """
        if position in self._references:
            return self._references[position]
        example = self.sample.examples.alone(position)
        return autograd_gradients(self.model, self.measure, example, self.names)[1]

    def in_float64(self) -> Trial:
        model = copy.deepcopy(self.model).double()
        return Trial(model, self.measure, self.sample.in_float64(), self.names)

    def observed(self, plan: LayerPlan) -> list[tuple[list[Use], int]]:
        """The uses of the plan's layers in each batch of the sample, and the size of the batch."""
        return [
            (observed_uses(self.model, self.measure, self.sample.batch(positions), plan), len(positions))
            for positions in self.sample.batches
        ]

    def misses_layers(self, plan: LayerPlan, observed: Sequence[tuple[Sequence[Use], int]]) -> bool:
        """Whether the backward pass did not reach a layer on which the losses depend. observed: see `observed`"""
        reached = {use.layer for uses, _ in observed for use in uses}
        return any(any(map(any, (self._norms[n] for n in layer.names))) for layer in plan.used_layers - reached)

    def differences(self, plan: LayerPlan, uses_by_batch: Sequence[Sequence[Use]]) -> dict[str, str]:
        """Parameters whose gradients on the plan's paths are not autograd's, each with the reason."""
        wrong_rows: dict[str, list[int]] = {}
        reasons: dict[str, str] = {}
        computed: set[str] = set()
        compared = 0
        by_size = sorted(zip(self.sample.batches, uses_by_batch, strict=True), key=lambda pair: len(pair[0]))
        for positions, uses in by_size:
            compared += len(positions) * self._size
            if compared > _COMPARED and len(positions) > min(map(len, self.sample.batches)):
                break  # for a large model the smallest batch suffices
            by_example = _gradients(self, self.sample.batch(positions), plan, uses, reasons)
            for position, actual in zip(positions, by_example, strict=True):
                expected = self.reference(position)
                computed |= actual.keys()
                for name in self.names:
                    if not self._agrees(name, actual.get(name), expected[name]):
                        wrong_rows.setdefault(name, []).append(self.sample.rows[position])
        for name, rows in wrong_rows.items():
            listed = ", ".join(map(str, sorted(set(rows))[:5]))
            differs = f"differs from autograd on training rows {listed}"
            reasons.setdefault(name, differs if name in computed else "used by no layer or call of a known kind")
        return reasons

    def _agrees(self, name: str, actual: Tensor | None, expected: Tensor | None) -> bool:
        size = 0.0 if expected is None else _norm(expected)
        if not math.isfinite(size):
            return True  # the build refuses such a row, by its number
        if actual is None or expected is None:
            difference = size if actual is None else _norm(actual)
        else:
            exact = real_values(expected)
            difference = _norm(actual.reshape(exact.shape).to(exact.dtype) - exact)
        dtype = self.model.get_parameter(name).dtype
        return difference <= rounding(dtype) * size + self._tolerances[name]


def _gradients(
    trial: Trial, batch: ExampleBatch, plan: LayerPlan, uses: Sequence[Use], reasons: dict[str, str]
) -> Iterator[dict[str, Tensor]]:
    """The gradients of one example of the batch after another on the plan's paths, by parameter name.

    reasons: by parameter name, why its gradients cannot be computed; filled in
    """
    sides: dict[Layer, list[tuple[Any, Tensor]]] = {}
    for use in uses:
        if use.layer.takes_instances or (use.layout is Layout.FIRST and use.fits):
            sides.setdefault(use.layer, []).append(use.examples_first(len(batch)))
        else:
            reasons |= dict.fromkeys(use.layer.names, "examples are not in the first dimension of its input")
    sides = {layer: layer.merged(of_layer) for layer, of_layer in sides.items()}
    slices: dict[str, list[Tensor]] = {}  # of the gradients of stray parameters
    for path, strays in plan.strays.items():
        try:
            for layer, gradient in stray_gradients(trial.model, trial.measure, batch, {path: strays}):
                slices.setdefault(layer.names[0], []).append(gradient)
        except Exception as error:
            if path is GradientPath.ALONE:
                raise
            reasons |= {stray.names[0]: f"torch.func.vmap fails: {error}" for stray in strays}
    for place in range(len(batch)):
        example, gradients = slice(place, place + 1), dict[str, Tensor]()
        for layer, of_layer in sides.items():
            try:
                total = reduce(torch.add, (layer.gradient(x[example], d[example]) for x, d in of_layer))
                for name, gradient in layer.parameter_gradients(total).items():
                    gradients[name] = gradients[name] + gradient if name in gradients else gradient
            except Exception as error:
                reasons |= dict.fromkeys(layer.names, f"torch.func.vmap of its module fails: {error}")
        yield gradients | {name: torch.cat(of_stray)[example] for name, of_stray in slices.items()}


def _norm(values: Tensor) -> float:
    return float(real_values(values).float().norm())
