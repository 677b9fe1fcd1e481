"""Which parameter is differentiated how: decided once for a model, and checked against plain autograd."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from gradtrace.errors import LossError, TaskError, UnsupportedLayerError
from gradtrace.gradients import Measure, backpropagate
from gradtrace.guards import rounding
from gradtrace.layers import Layer, layer_type_of
from gradtrace.reference import vmapped_gradients
from gradtrace.task import Batch


class StrayLayer(Layer):
    """A parameter outside every supported module: its per-example gradient comes from vmap(grad)."""

    rotates = False

    def __init__(self, module: nn.Module, name: str) -> None:
        super().__init__(module, [name], (1, 1, module.get_parameter(name).numel()))

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def has_bias(self) -> bool:
        return False

    def input_factors(self, x: Tensor, basis: Tensor | None) -> Tensor:
        raise NotImplementedError  # a stray parameter has no factors, only its whole gradient

    def output_factors(self, d: Tensor, basis: Tensor | None) -> Tensor:
        raise NotImplementedError

    def weight_gradient(self, weight: Tensor) -> Tensor:
        return weight.reshape(weight.shape[0], *self.module.get_parameter(self.names[0]).shape)


@dataclass(frozen=True)
class LayerPlan:
    """The layers of one model instance. `tapped` maps each module to its layer (shared modules to the same one)."""

    layers: list[Layer]
    tapped: Mapping[nn.Module, Layer]
    strays: list[StrayLayer]

    def stray_gradients(self, model: nn.Module, measure: Measure, batch: Batch) -> dict[Layer, Tensor]:
        """Per-example gradients [batch, 1, 1, size] of the stray parameters, by vmap(grad)."""
        if not self.strays:
            return {}
        found = vmapped_gradients(model, measure, batch, [stray.names[0] for stray in self.strays])
        return {stray: found[stray.names[0]].flatten(1).float()[:, None, None] for stray in self.strays}


def plan_layers(model: nn.Module, stray_names: Sequence[str], trainable: Sequence[str]) -> LayerPlan:
    """Assign the trainable parameters to layers; those in `stray_names`, and those without a layer type, to vmap."""
    owners: dict[tuple[str, ...], list[nn.Module]] = defaultdict(list)
    strays = set(stray_names)
    names_of = {id(p): n for n, p in model.named_parameters()}  # a shared parameter has one name: its first
    for module in model.modules():
        own = dict(module.named_parameters(recurse=False))
        names = tuple(names_of[id(p)] for p in own.values())
        supported = layer_type_of(module) is not None and list(own) in (["weight"], ["weight", "bias"])
        if supported and set(names) <= set(trainable) - strays:
            owners[names].append(module)
        else:
            strays |= set(names)
    strays |= _differently_shared(owners)
    tapped: dict[nn.Module, Layer] = {}
    for names, modules in owners.items():
        layer_type = layer_type_of(modules[0])
        if layer_type is not None and not set(names) & strays:
            tapped |= dict.fromkeys(modules, layer_type(modules[0], names))
    kept_strays = [StrayLayer(model, name) for name in trainable if name in strays]
    return LayerPlan([*dict.fromkeys(tapped.values()), *kept_strays], tapped, kept_strays)


def _differently_shared(owners: Mapping[tuple[str, ...], list[nn.Module]]) -> set[str]:
    """Parameters that modules share in different roles (a tied embedding, say), with their companions: gradients
    of different roles have different coordinates, so they cannot be summed layer by layer."""
    roles: dict[str, set[tuple[object, ...]]] = defaultdict(set)
    for names, modules in owners.items():
        for module in modules:
            for name in names:
                roles[name].add((names, layer_type_of(module), module.extra_repr()))
    return {
        name for found in roles.values() if len(found) > 1 for names, *_ in found for name in cast("tuple[str]", names)
    }


def checked_plan(model: nn.Module, measure: Measure, batch: Batch, trainable: Sequence[str]) -> LayerPlan:
    """Plan the layers; whatever differs from autograd on the examples of `batch` (two are enough) is left to vmap.

    The difference catches weights that are used outside of their module's forward.

    Raises:
        UnsupportedLayerError: vmap cannot differentiate a stray parameter, or differs from autograd as well.
    """
    expected = _autograd_gradients(model, measure, batch, trainable)
    wrong: list[str] = []
    for _ in range(2):
        plan = plan_layers(model, wrong, trainable)
        differing = _differing(_plan_gradients(plan, model, measure, batch, len(expected[trainable[0]])), expected)
        if not differing:
            return plan
        wrong += differing
    raise UnsupportedLayerError(
        f"the per-example gradients of {', '.join(sorted(set(wrong)))} differ from autograd's: the model changes "
        "between calls (randomness in forward?) or mixes the examples of a batch"
    )


def _autograd_gradients(model: nn.Module, measure: Measure, batch: Batch, names: Sequence[str]) -> dict[str, Tensor]:
    """Example by example, by plain autograd on the same batch. Each [batch, *shape]."""
    parameters = [model.get_parameter(name) for name in names]
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        with torch.enable_grad():
            losses = measure(model, batch)
            if not losses.requires_grad:
                raise LossError("the loss does not depend on the model's parameters: was it detached?")
            rows = [
                torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
                for loss in losses
            ]
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
    return {name: torch.stack(values) for name, values in zip(names, zip(*rows, strict=True), strict=True)}


def _plan_gradients(plan: LayerPlan, model: nn.Module, measure: Measure, batch: Batch, count: int) -> dict[str, Tensor]:
    """Per-example gradients of `count` examples by parameter name, the way the plan computes them."""
    sums: dict[Layer, Tensor] = {}

    def add(layer: Layer, x: Tensor, d: Tensor) -> None:
        if d.shape[0] != count:  # examples do not come first (folded into positions, say): left out, so it will differ
            return
        gradient = layer.gradient(x, d)
        sums[layer] = sums[layer] + gradient if layer in sums else gradient

    backpropagate(model, measure, batch, plan.tapped, add)
    sums.update(_checked_strays(plan, model, measure, batch))
    return {name: value for layer, total in sums.items() for name, value in layer.parameter_gradients(total).items()}


def _checked_strays(plan: LayerPlan, model: nn.Module, measure: Measure, batch: Batch) -> dict[Layer, Tensor]:
    try:
        return plan.stray_gradients(model, measure, batch)
    except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
        owners = {name.rpartition(".")[0] or "the model" for layer in plan.strays for name in layer.names}
        types = {o: type(model.get_submodule(o)).__name__ if o != "the model" else type(model).__name__ for o in owners}
        listed = ", ".join(f"{owner} ({kind})" for owner, kind in sorted(types.items()))
        raise UnsupportedLayerError(
            f"no per-example gradients for {listed}: it is no supported layer type and torch.func.vmap fails on it "
            f"({error}). Freeze its parameters (requires_grad_(False) in Task.model) to leave them out of the index"
        ) from error


def _differing(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """Names whose gradients differ by more than rounding explains; a parameter that nothing reached counts as zero."""
    floor = 1e-6 * max(float(value.float().norm()) for value in expected.values())
    differing = []
    for name, wanted in expected.items():
        got = found[name].reshape(wanted.shape) if name in found else torch.zeros_like(wanted)
        if float((got - wanted).float().norm()) > rounding(wanted.dtype) * float(wanted.float().norm()) + floor:
            differing.append(name)
    return differing


def trainable_names(model: nn.Module) -> list[str]:
    """Names of the parameters that require a gradient.

    Raises:
        TaskError: there are none.
    """
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not names:
        raise TaskError("no parameter of the model requires a gradient: nothing can be attributed")
    return names
