"""What a model and its loss are like, found out on a sample of rows before anything is computed from them.

Each row alone, differentiated by autograd, is the reference: in shuffled batches of several sizes, the losses must be
the same, and every parameter's gradient on the path that is chosen for it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradtrace.data.batches import ExampleBatch, Measure
from gradtrace.data.guards import check_batched_losses, rounding
from gradtrace.data.sample import Sample
from gradtrace.errors import LossError, UnsupportedLayerError
from gradtrace.gradients.capture import Use, observed_uses
from gradtrace.gradients.layouts import SHARED_LAYOUTS, Layout, fitting_layouts, preferred
from gradtrace.gradients.plan import GradientPath, LayerPlan, PathChoice, first_paths, plan_layers
from gradtrace.gradients.reference import autograd_gradients, stray_gradients
from gradtrace.layers import Layer, ModuleInputs, real_values

_ABSOLUTE = 1e-5  # of a parameter's largest gradient in the sample: what rounding adds to small ones
_OF_OTHERS = 1e-6  # of the largest gradient of any parameter
_COMPARED = 1 << 29  # elements of gradients that are compared in one try, but for those of the smallest batch
_CACHED = 1 << 27  # elements of reference gradients that are kept between two tries


def examine(model: nn.Module, measured: Sequence[tuple[Measure, Sample]], names: Sequence[str]) -> PathChoice:
    """Choose a path for each of the named parameters, the fastest that agrees with autograd.

    Args:
        model: in eval mode, with parameters that require no gradient.
        measured: what is differentiated, the task's loss first, each with examples to try it on.

    Raises:
        LossError: losses are not one finite number per example, are random, or depend on the rest of the batch.
        UnsupportedLayerError: gradients of a parameter agree on no path.
    """
    trials = []
    for measure, sample in measured:
        try:
            finite = check_batched_losses(model, measure, sample)
        except LossError as error:
            if measure is measured[0][0]:
                raise
            raise LossError(f"the measurement (or the prediction, for queries without a label): {error}") from error
        trials.append(Trial(model, measure, finite, names))
    choice = _chosen(PathChoice(first_paths(model, names)), trials)
    if any(map(Trial.has_zero_gradients, trials)):
        with _nudged(model, names), suppress(LossError, UnsupportedLayerError):
            return _chosen(choice, [Trial(model, trial.measure, trial.sample, names) for trial in trials])
    return choice


@contextmanager
def _nudged(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """The model with its parameters a little changed, so that gradients that are zero at these weights only (behind a
    gate that is closed, or an adapter that has not been trained) show which example they belong to."""
    kept = {name: model.get_parameter(name).detach().clone() for name in names}
    generator = torch.Generator().manual_seed(0)
    try:
        for name, values in kept.items():
            noise = 0.1 * torch.randn(values.shape, generator=generator).clamp(-3, 3).to(values)
            model.get_parameter(name).data.copy_(torch.where(values == 0, noise, values * (1 + noise)))
        yield
    finally:
        for name, values in kept.items():
            model.get_parameter(name).data.copy_(values)


def _chosen(choice: PathChoice, trials: Sequence[Trial]) -> PathChoice:
    """The fastest paths, from those of `choice` on, that agree with autograd in every trial.

    Raises:
        UnsupportedLayerError: gradients of a parameter agree on no path.
    """
    wrong = {"": ""}
    for _ in range(4 * len(GradientPath)):
        revised, wrong = _attempt(choice, trials)
        if wrong:
            wrong = _wrong_in_double(choice, trials, wrong)
        if revised == choice and not wrong:
            return choice
        choice = _slower(trials[0].model, choice, wrong) if wrong else revised
    raise UnsupportedLayerError(f"no path was found for the per-example gradients of {', '.join(sorted(wrong))}")


def _attempt(choice: PathChoice, trials: Sequence[Trial]) -> tuple[PathChoice, dict[str, str]]:
    """What to choose instead, and if it is the same, which parameters differ from autograd, and how."""
    plan = plan_layers(trials[0].model, choice)
    try:
        seen = [trial.observed(plan) for trial in trials]
    except Exception as error:  # that the model does not raise by itself
        if not choice.whole_graph and isinstance(error, RuntimeError) and _needs_whole_graph(str(error)):
            return replace(choice, whole_graph=True), {}
        return choice, _suspects(plan, error)
    if not choice.whole_graph and any(map(Trial.misses, trials, [plan] * len(trials), seen)):
        return replace(choice, whole_graph=True), {}
    layouts = _layouts(plan, [(uses, size) for of_trial in seen for uses, size in of_trial])
    batched = _batched_arguments([use for of_trial in seen for uses, _ in of_trial for use in uses])
    if layouts != dict(choice.layouts) or batched != dict(choice.batched):
        return replace(choice, layouts=layouts, batched=batched), {}
    wrong: dict[str, str] = {}
    for trial, of_trial in zip(trials, seen, strict=True):
        wrong |= trial.differences(plan, [uses for uses, _ in of_trial])
    return choice, wrong


def _suspects(plan: LayerPlan, error: Exception) -> dict[str, str]:
    """Parameters whose path may have caused an exception in the model."""
    shared = [layer for layer in plan.layers if plan.layout(layer) in SHARED_LAYOUTS]
    noted = (plan.parameters, plan.whole_modules, plan.modules)
    for layers in (shared, *([*dict.fromkeys(layers.values())] for layers in noted)):
        if layers:
            return {name: f"{type(error).__name__}: {error}" for layer in layers for name in layer.names}
    raise error


def _wrong_in_double(choice: PathChoice, trials: Sequence[Trial], wrong: dict[str, str]) -> dict[str, str]:
    """Those that differ in float64 as well: else it is rounding."""
    if trials[0].sample.examples.double:
        return wrong
    try:
        exact = _attempt(choice, [trial.in_double() for trial in trials])[1]
    except Exception:  # the model or the loss is made for its own precision
        return wrong
    return {name: reason for name, reason in wrong.items() if name in exact}


def _slower(model: nn.Module, choice: PathChoice, wrong: Mapping[str, str]) -> PathChoice:
    """The next path for the parameters named, and for those that share a layer with one."""
    paths, reasons, layouts = dict(choice.paths), dict(choice.reasons), dict(choice.layouts)
    for layer in plan_layers(model, choice).layers:
        causes = [wrong[name] for name in layer.names if name in wrong]
        for name in layer.names if causes else ():
            paths[name], reasons[name] = _next(name, paths[name], causes[0]), causes[0]
            layouts.pop(layer.name, None)
    planned = {name for layer in plan_layers(model, choice).layers for name in layer.names}
    for name in wrong.keys() - planned:  # no layer on this path fits the parameter
        paths[name], reasons[name] = _next(name, paths[name], wrong[name]), wrong[name]
    return replace(choice, paths=paths, reasons=reasons, layouts=layouts)


def _next(name: str, path: GradientPath, reason: str) -> GradientPath:
    slower = path.next
    if slower is None:
        raise UnsupportedLayerError(
            f"the gradients of {name} differ from autograd's even one example at a time ({reason}): the model changes "
            "between calls. Is something random in its forward, or does it keep a state?"
        )
    return slower


class Trial:
    """One measure on a sample: its rows' gradients by autograd, to compare with those of a choice of paths."""

    def __init__(self, model: nn.Module, measure: Measure, sample: Sample, names: Sequence[str]) -> None:
        """Raises LossError where the loss depends on no parameter."""
        self.model, self.measure, self.sample, self.names = model, measure, sample, names
        self._kept: dict[int, Mapping[str, Tensor | None]] = {}
        self._norms: dict[str, list[float]] = {name: [] for name in names}
        self._reached: set[str] = set()  # parameters on which a loss depends
        self._size = sum(model.get_parameter(name).numel() for name in names)
        for position in range(len(sample.rows)):
            gradients = self.alone(position)
            for name, gradient in gradients.items():
                self._norms[name].append(0.0 if gradient is None else _norm(gradient))
                if gradient is not None:
                    self._reached.add(name)
            if self._size * (position + 1) <= _CACHED:
                self._kept[position] = gradients
        if not self._reached:
            raise LossError(
                "the loss does not depend on any layer of the model: was it computed under torch.no_grad(), detached, "
                "or from another model than the one passed in?"
            )
        finite = {name: [norm for norm in norms if np.isfinite(norm)] for name, norms in self._norms.items()}
        largest = max((max(norms, default=0.0) for norms in finite.values()), default=0.0)
        self._slack = {
            name: _ABSOLUTE * max(norms, default=0.0) + _OF_OTHERS * largest for name, norms in finite.items()
        }

    def has_zero_gradients(self) -> bool:
        """Whether a parameter has a gradient, but one that is zero for every row."""
        return not all(any(self._norms[name]) for name in self._reached)

    def alone(self, position: int) -> Mapping[str, Tensor | None]:
        """The gradients of one row alone, by parameter name; None where its loss does not depend on the parameter."""
        if position in self._kept:
            return self._kept[position]
        example = self.sample.examples.alone(position)
        return autograd_gradients(self.model, self.measure, example, self.names)[1]

    def in_double(self) -> Trial:
        model = copy.deepcopy(self.model).double()
        return Trial(model, self.measure, self.sample.in_double(), self.names)

    def observed(self, plan: LayerPlan) -> list[tuple[list[Use], int]]:
        """The uses of the plan's layers in each batch of the sample, and the size of the batch."""
        return [
            (observed_uses(self.model, self.measure, self.sample.batch(positions), plan), len(positions))
            for positions in self.sample.batches
        ]

    def misses(self, plan: LayerPlan, seen: Sequence[tuple[Sequence[Use], int]]) -> bool:
        """Whether the backward pass did not come to a layer on which the loss depends."""
        reached = {use.layer for uses, _ in seen for use in uses}
        noted = {*plan.modules.values(), *plan.parameters.values(), *plan.whole_modules.values()}
        return any(any(map(any, (self._norms[n] for n in layer.names))) for layer in noted - reached)

    def differences(self, plan: LayerPlan, seen: Sequence[Sequence[Use]]) -> dict[str, str]:
        """Parameters whose gradients differ, with the rows."""
        rows: dict[str, list[int]] = {}
        wrong: dict[str, str] = {}
        computed: set[str] = set()
        compared = 0
        for positions, uses in sorted(zip(self.sample.batches, seen, strict=True), key=lambda pair: len(pair[0])):
            compared += len(positions) * self._size
            if compared > _COMPARED and len(positions) > min(map(len, self.sample.batches)):
                break  # a large model: the smallest batch tells enough
            gradients = _BatchGradients(self.model, self.measure, self.sample.batch(positions), plan, uses)
            for place, position in enumerate(positions):
                wanted = self.alone(position)
                found, failures = gradients.of(place)
                wrong |= failures
                computed |= found.keys()
                for name in self.names:
                    if not self._agrees(name, found.get(name), wanted[name]):
                        rows.setdefault(name, []).append(self.sample.rows[position])
        for name, numbers in rows.items():
            named = ", ".join(map(str, sorted(set(numbers))[:5]))
            differs = f"differs from autograd on training rows {named}"
            wrong.setdefault(name, differs if name in computed else "used by no layer or call of a known kind")
        return wrong

    def _agrees(self, name: str, found: Tensor | None, wanted: Tensor | None) -> bool:
        size = 0.0 if wanted is None else _norm(wanted)
        if not np.isfinite(size):
            return True  # such a row is refused when its turn comes, with its number
        if found is None or wanted is None:
            difference = size if found is None else _norm(found)
        else:
            exact = real_values(wanted)
            difference = _norm(found.reshape(exact.shape).to(exact.dtype) - exact)
        dtype = self.model.get_parameter(name).dtype
        return difference <= rounding(dtype) * size + self._slack[name]


class _BatchGradients:
    """The gradients of one batch on the paths of a plan, formed for one example and one layer at a time."""

    def __init__(
        self, model: nn.Module, measure: Measure, batch: ExampleBatch, plan: LayerPlan, uses: Sequence[Use]
    ) -> None:
        self._batch, self._failures = batch, dict[str, str]()
        self._sides: dict[Layer, list[tuple[Any, Tensor]]] = {}
        for use in uses:
            if use.layer.takes_instances or (use.layout is Layout.FIRST and use.fits):
                self._sides.setdefault(use.layer, []).append(use.examples_first(len(batch)))
            else:
                self._fail(use.layer, "examples are not in the first dimension of its input")
        self._sides = {layer: layer.merged(sides) for layer, sides in self._sides.items()}
        self._strays: dict[str, list[Tensor]] = {}
        for path, strays in plan.strays.items():
            try:
                for layer, _, gradient in stray_gradients(model, measure, batch, plan.with_strays(path)):
                    self._strays.setdefault(layer.names[0], []).append(gradient)
            except Exception as error:
                if path is GradientPath.ALONE:
                    raise
                for stray in strays:
                    self._fail(stray, f"torch.func.vmap fails: {error}")

    def _fail(self, layer: Layer, reason: str) -> None:
        self._failures |= dict.fromkeys(layer.names, reason)

    def of(self, place: int) -> tuple[dict[str, Tensor], dict[str, str]]:
        """By parameter name, of the example at a place of the batch; and why some could not be computed."""
        part, found = slice(place, place + 1), dict[str, Tensor]()
        for layer, sides in self._sides.items():
            try:
                total = sum(layer.gradient(x[part], d[part]) for x, d in sides)
                assert isinstance(total, Tensor)
                for name, gradient in layer.parameter_gradients(total).items():
                    found[name] = found[name] + gradient if name in found else gradient
            except Exception as error:
                self._fail(layer, f"torch.func.vmap of its module fails: {error}")
        for name, gradients in self._strays.items():
            found[name] = torch.cat(gradients)[part]
        return found, self._failures


def _batched_arguments(uses: Iterable[Use]) -> dict[str, tuple[bool, ...]]:
    """By layer name, the arguments of modules that were as long as the batch in batches of all sizes."""
    batched: dict[str, tuple[bool, ...]] = {}
    for use in uses:
        if isinstance(use.inputs, ModuleInputs):
            now = tuple(use.inputs.batched)
            before = batched.get(use.layer.name, now)
            same = len(now) == len(before)
            batched[use.layer.name] = tuple(map(bool.__and__, now, before)) if same else ()
    return batched


def _norm(values: Tensor) -> float:
    return float(real_values(values).float().norm())


def _needs_whole_graph(message: str) -> bool:
    return "not have been used in the graph" in message or "heckpoint" in message or "does not require grad" in message


def _layouts(plan: LayerPlan, seen: Iterable[tuple[Sequence[Use], int]]) -> dict[str, Layout]:
    """By layer name, where it is not FIRST. What was never seen is looked at in each batch."""
    fitting: dict[str, set[Layout]] = {}
    seen_alone: set[str] = set()
    shared = {layer.name: plan.layout(layer) for layer in plan.layers if plan.layout(layer) in SHARED_LAYOUTS}
    found_shared: set[str] = set()
    in_one: dict[str, bool] = {}
    for uses, batch in seen:
        for use in uses:
            name = use.layer.name
            if batch == 1:
                seen_alone.add(name)
            if batch == 1 or name in shared:
                continue
            in_one[name] = in_one.get(name, True) and use.leading[:1] == (1,)
            found = use.owners(batch)
            if bool(found.mixed.any()):
                found_shared.add(name)
                continue
            layouts = fitting_layouts(found, use.leading, batch)
            fitting[name] = fitting[name] & layouts if name in fitting else layouts
    noted = {*plan.modules.values(), *plan.parameters.values(), *plan.whole_modules.values()}
    names = {layer.name for layer in noted} - (seen_alone - fitting.keys())
    chosen = {name: preferred(fitting.get(name, set())) for name in names}
    chosen |= {name: Layout.SHARED_FIRST if in_one[name] else Layout.SHARED for name in found_shared}
    chosen |= shared
    return {name: layout for name, layout in chosen.items() if layout is not Layout.FIRST}
