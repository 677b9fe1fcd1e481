"""The examination of a model and its loss, on a sample of rows, that chooses each parameter's path.

The reference is autograd on each row alone. In shuffled batches of several sizes the losses must be the same as alone,
and so must every parameter's gradient on the path that is chosen for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace

import torch
from torch import nn

from gradtrace.data.batches import Measure
from gradtrace.data.guards import check_batched_losses
from gradtrace.data.sample import Sample
from gradtrace.errors import LossError, UnsupportedLayerError
from gradtrace.gradients.layouts import SHARED_LAYOUTS, Layout, Use, fitting_layouts
from gradtrace.gradients.path_comparison import Trial
from gradtrace.gradients.plan import GradientPath, LayerPlan, PathChoice, first_paths, plan_layers
from gradtrace.layers import ModuleInputs

# In messages of PyTorch where the backward pass must follow the whole graph, see `capture`
_PARTIAL_GRAPH = ("not have been used in the graph", "heckpoint", "does not require grad")


def examine(model: nn.Module, measured: Sequence[tuple[Measure, Sample]], names: Sequence[str]) -> PathChoice:
    """Choose the path of each named parameter: the fastest whose gradients agree with autograd's.

    Args:
        model: in eval mode, with parameters that require no gradient.
        measured: the functions to differentiate, the task's loss first, each with a sample of rows.

    Raises:
        LossError: losses are not one finite number per example, are random, or depend on the rest of the batch.
        UnsupportedLayerError: no path gives autograd's gradients of a parameter.
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
        # The model may be undefined at other weights than the trained ones: then the choice at these stands.
        with _perturbed(model, names), suppress(Exception):
            return _chosen(choice, [Trial(model, trial.measure, trial.sample, names) for trial in trials])
    return choice


@contextmanager
def _perturbed(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """While open, the model's parameters are slightly changed.

    Gradients that are zero at the actual weights (behind a closed gate, or in an untrained adapter) then show which
    example they belong to.
    """
    originals = {name: model.get_parameter(name).detach().clone() for name in names}
    generator = torch.Generator().manual_seed(0)
    try:
        for name, values in originals.items():
            noise = 0.1 * torch.randn(values.shape, generator=generator).clamp(-3, 3).to(values)
            model.get_parameter(name).data.copy_(torch.where(values == 0, noise, values * (1 + noise)))
        yield
    finally:
        for name, values in originals.items():
            model.get_parameter(name).data.copy_(values)


def _chosen(choice: PathChoice, trials: Sequence[Trial]) -> PathChoice:
    """The fastest paths, from those of `choice` on, whose gradients agree with autograd's in every trial.

    Raises:
        UnsupportedLayerError: no path gives autograd's gradients of a parameter.
    """
    wrong = {"": ""}
    for _ in range(4 * len(GradientPath)):
        revised, wrong = _attempt(choice, trials)
        if wrong:
            wrong = _wrong_in_float64(choice, trials, wrong)
        if revised == choice and not wrong:
            return choice
        choice = _with_slower_paths(trials[0].model, choice, wrong) if wrong else revised
    raise UnsupportedLayerError(f"no path was found for the per-example gradients of {', '.join(sorted(wrong))}")


def _attempt(choice: PathChoice, trials: Sequence[Trial]) -> tuple[PathChoice, dict[str, str]]:
    """Try a choice. Returns the choice to try next; or the same choice, with the parameters whose gradients are not
    autograd's and the reasons."""
    plan = plan_layers(trials[0].model, choice)
    try:
        observed = [trial.observed(plan) for trial in trials]
    except Exception as error:  # caused by the path: the model runs without it
        partial_graph = isinstance(error, RuntimeError) and any(text in str(error) for text in _PARTIAL_GRAPH)
        if partial_graph and not choice.whole_graph:
            return replace(choice, whole_graph=True), {}
        return choice, _suspects(plan, error)
    if not choice.whole_graph and any(map(Trial.misses_layers, trials, [plan] * len(trials), observed)):
        return replace(choice, whole_graph=True), {}
    batches = [batch for of_trial in observed for batch in of_trial]
    layouts = _layouts(plan, batches)
    batched = _batched_arguments([use for uses, _ in batches for use in uses])
    if layouts != dict(choice.layouts) or batched != dict(choice.batched):
        return replace(choice, layouts=layouts, batched=batched), {}
    wrong: dict[str, str] = {}
    for trial, of_trial in zip(trials, observed, strict=True):
        wrong |= trial.differences(plan, [uses for uses, _ in of_trial])
    return choice, wrong


def _suspects(plan: LayerPlan, error: Exception) -> dict[str, str]:
    """Parameters whose path may have caused an exception in the model, each with the exception's text.

    The suspects are the layers of one kind, the first of those below that the plan has; the others are tried again.
    """
    shared = [layer for layer in plan.layers if plan.layout(layer) in SHARED_LAYOUTS]
    by_kind = (plan.parameters, plan.whole_modules, plan.modules)
    for layers in (shared, *([*dict.fromkeys(kind.values())] for kind in by_kind)):
        if layers:
            return {name: f"{type(error).__name__}: {error}" for layer in layers for name in layer.names}
    raise error


def _wrong_in_float64(choice: PathChoice, trials: Sequence[Trial], wrong: dict[str, str]) -> dict[str, str]:
    """The parameters among `wrong` whose gradients differ in float64 as well: other differences are rounding."""
    if trials[0].sample.examples.float64:
        return wrong
    try:
        revised, exact = _attempt(choice, [trial.in_float64() for trial in trials])
    except Exception:  # the model or the loss does not run in float64
        return wrong
    if revised != choice:  # the gradients were not compared
        return wrong
    return {name: reason for name, reason in wrong.items() if name in exact}


def _with_slower_paths(model: nn.Module, choice: PathChoice, wrong: Mapping[str, str]) -> PathChoice:
    """The choice with the next path for every parameter in `wrong`, and for those that share a layer with one."""
    causes, layouts = dict(wrong), dict(choice.layouts)  # no layer on its path may fit a parameter in `wrong`
    for layer in plan_layers(model, choice).layers:
        of_layer = [wrong[name] for name in layer.names if name in wrong]
        if of_layer:
            causes |= dict.fromkeys(layer.names, of_layer[0])
            layouts.pop(layer.name, None)
    slower = {name: _slower_path(name, choice.paths[name], reason) for name, reason in causes.items()}
    return replace(choice, paths={**choice.paths, **slower}, reasons={**choice.reasons, **causes}, layouts=layouts)


def _slower_path(name: str, path: GradientPath, reason: str) -> GradientPath:
    paths = list(GradientPath)
    if path is paths[-1]:
        raise UnsupportedLayerError(
            f"the gradients of {name} differ from autograd's even one example at a time ({reason}): the model changes "
            "between calls. Is something random in its forward, or does it keep a state?"
        )
    return paths[paths.index(path) + 1]


def _batched_arguments(uses: Iterable[Use]) -> dict[str, tuple[bool, ...]]:
    """By layer name, which arguments of a module were as long as the batch in batches of all sizes."""
    batched: dict[str, tuple[bool, ...]] = {}
    for use in uses:
        if isinstance(use.inputs, ModuleInputs):
            in_use = tuple(use.inputs.batched)
            in_earlier = batched.get(use.layer.name, in_use)
            same = len(in_use) == len(in_earlier)
            batched[use.layer.name] = tuple(map(bool.__and__, in_use, in_earlier)) if same else ()
    return batched


def _layouts(plan: LayerPlan, batches: Iterable[tuple[Sequence[Use], int]]) -> dict[str, Layout]:
    """By layer name, each layout that is not FIRST. A layer that was never used is SCATTERED, which is always right.

    batches: (the uses in a batch, the size of the batch)
    """
    fitting: dict[str, list[Layout]] = {}  # that fit all uses so far, simplest first
    used_alone: set[str] = set()
    known_shared = {layer.name: plan.layout(layer) for layer in plan.layers if plan.layout(layer) in SHARED_LAYOUTS}
    newly_shared: set[str] = set()
    batch_of_one: dict[str, bool] = {}  # whether the first dimension is always 1
    for uses, batch in batches:
        for use in uses:
            name = use.layer.name
            if batch == 1:
                used_alone.add(name)
            if batch == 1 or name in known_shared:
                continue
            batch_of_one[name] = batch_of_one.get(name, True) and use.leading[:1] == (1,)
            owners = use.owners(batch)
            if bool(owners.mixed.any()):
                newly_shared.add(name)
                continue
            layouts = fitting_layouts(owners, use.leading, batch)
            fitting[name] = [layout for layout in fitting.get(name, layouts) if layout in layouts]
    names = {layer.name for layer in plan.used_layers} - (used_alone - fitting.keys())
    chosen = {name: [*fitting.get(name, []), Layout.SCATTERED][0] for name in names}
    chosen |= {name: Layout.SHARED_FIRST if batch_of_one[name] else Layout.SHARED for name in newly_shared}
    chosen |= known_shared
    return {name: layout for name, layout in chosen.items() if layout is not Layout.FIRST}
