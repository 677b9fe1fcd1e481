"""The plan of a model's gradients: which parameters are attributed, the path of each, and the layers on each path."""

from __future__ import annotations

import fnmatch
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from gradtrace.errors import TaskError, UnsupportedLayerError
from gradtrace.gradients.layouts import Layout
from gradtrace.layers import Layer, ModuleLayer, ParameterLayer, layer_type_of, parameter_layer, real_values


class GradientPath(str, Enum):
    """How a parameter's per-example gradients are computed, fastest first. A path is tried if those before it differ
    from autograd."""

    FACTORS = "factors"  # from input and output gradient of a module of a known type
    CALLS = "calls"  # from input and output gradient of function calls: attention, recurrence, tied weights
    MODULE = "vmap of the module"  # by torch.func.vmap over one module
    VMAP = "vmap of the model"  # by torch.func.vmap over the whole model
    ALONE = "one by one"  # by autograd of the whole model, one example at a time


class StrayLayer(ParameterLayer):
    """A stray parameter: its per-example gradient comes from the whole model, not from a layer's factors."""

    rotates = False

    def __init__(self, module: nn.Module, name: str) -> None:
        super().__init__(module, [name], (1, 1, real_values(module.get_parameter(name).detach()).numel()))


@dataclass(frozen=True)
class PathChoice:
    """The paths that give autograd's gradients for a model, at any weights.

    paths: by parameter name
    layouts: by layer name; Layout.FIRST for layers that are not named
    whole_graph: the backward pass must follow the whole graph, see `capture`
    batched: by name of a layer on path MODULE, which arguments of the module have one entry for each example
    reasons: by parameter name, why it is not on a faster path
    """

    paths: Mapping[str, GradientPath]
    layouts: Mapping[str, Layout] = field(default_factory=dict)
    whole_graph: bool = False
    batched: Mapping[str, tuple[bool, ...]] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)


Strays = Mapping[GradientPath, Sequence[StrayLayer]]


@dataclass(frozen=True)
class LayerPlan:
    """The layers of one model instance.

    layers: all of them, in the order of the model's parameters
    modules: on path FACTORS, the layer of each module; modules that share their parameters share a layer
    parameters: on path CALLS, the layer of each parameter, by the parameter's id
    whole_modules: on path MODULE, the layer of each module
    strays: on paths VMAP and ALONE
    """

    layers: list[Layer]
    modules: Mapping[nn.Module, Layer]
    parameters: Mapping[int, Layer]
    whole_modules: Mapping[nn.Module, Layer]
    strays: Strays
    choice: PathChoice

    @property
    def used_layers(self) -> set[Layer]:
        """The layers whose gradients come from their uses."""
        return {*self.modules.values(), *self.parameters.values(), *self.whole_modules.values()}

    def layout(self, layer: Layer) -> Layout:
        return self.choice.layouts.get(layer.name, Layout.FIRST)


def trainable_names(model: nn.Module, patterns: Sequence[str] | None = None) -> list[str]:
    """Names of the parameters that require a gradient and that the patterns choose.

    patterns: see `Task.layers`; None: all

    Raises:
        TaskError: there is no such parameter, or a pattern fits no parameter.
        UnsupportedLayerError: the model or one of its modules is TorchScript or compiled.
    """
    for name, module in model.named_modules():
        scripted = type(module).__module__.startswith("torch.jit")
        if scripted or hasattr(module, "_orig_mod"):
            kind = "TorchScript (torch.jit.script or torch.jit.trace)" if scripted else "compiled (torch.compile)"
            raise UnsupportedLayerError(
                f"{name or 'the model'} is {kind}, so that its layers cannot be watched: return the eager Python "
                "module from Task.model; the weights of checkpoints fit both"
            )
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not names:
        raise TaskError("no parameter of the model requires a gradient: nothing can be attributed")
    return names if patterns is None else _chosen_names(names, patterns)


def _chosen_names(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    if isinstance(patterns, str) or not patterns:
        raise TaskError(f'layers must be a list of patterns such as ["encoder.*", "!*.bias"], not {patterns!r}')
    for pattern in patterns:
        if not fnmatch.filter(names, pattern.removeprefix("!")):
            raise TaskError(
                f"layers: {pattern!r} fits no parameter that requires a gradient; they are {', '.join(names[:8])}"
                + " ..." * (len(names) > 8)
            )
    included = [pattern for pattern in patterns if not pattern.startswith("!")] or ["*"]
    excluded = [pattern.removeprefix("!") for pattern in patterns if pattern.startswith("!")]
    chosen = [name for name in names if _fits(name, included) and not _fits(name, excluded)]
    if not chosen:
        raise TaskError(f"layers: the patterns {list(patterns)} leave no parameter")
    return chosen


def _fits(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def first_paths(model: nn.Module, trainable: Sequence[str]) -> dict[str, GradientPath]:
    """The fastest path that each parameter's modules allow, by parameter name."""
    paths = dict.fromkeys(trainable, GradientPath.CALLS)
    for layer in _factored_layers(model, set(trainable)).values():
        paths |= dict.fromkeys(layer.names, GradientPath.FACTORS)
    return paths


def plan_layers(model: nn.Module, choice: PathChoice) -> LayerPlan:
    """Assign the model's parameters to layers, by the paths that were chosen for its architecture."""
    names_on: dict[GradientPath, list[str]] = defaultdict(list)
    for name, path in choice.paths.items():
        names_on[path].append(name)
    modules = _factored_layers(model, set(names_on[GradientPath.FACTORS]))
    parameters = _called_layers(model, names_on[GradientPath.CALLS])
    whole = _module_layers(model, set(names_on[GradientPath.MODULE]))
    vmapped, alone = (
        [StrayLayer(model, name) for name in names_on[path]] for path in (GradientPath.VMAP, GradientPath.ALONE)
    )
    layers = [*dict.fromkeys(modules.values()), *parameters.values(), *whole.values(), *vmapped, *alone]
    places = {name: place for place, name in enumerate(choice.paths)}  # in the model
    layers.sort(key=lambda layer: places[layer.names[0]])
    strays = {GradientPath.VMAP: vmapped, GradientPath.ALONE: alone}
    return LayerPlan(layers, modules, parameters, whole, strays, choice)


def _factored_layers(model: nn.Module, names: set[str]) -> dict[nn.Module, Layer]:
    """On path FACTORS: the layer of each module; modules that have the same parameters share a layer.

    names: the parameters to assign. Parameters that modules use in different roles (a tied embedding) are left out,
        since the gradient has different factors in each role.
    """
    modules_of: dict[tuple[str, ...], list[nn.Module]] = defaultdict(list)
    roles: dict[str, set[object]] = defaultdict(set)
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}  # of shared ones, the first name
    for module in model.modules():
        local = dict(module.named_parameters(recurse=False))
        full = tuple(name_of[id(parameter)] for parameter in local.values())
        assigned = tuple(name for name in full if name in names)
        known = layer_type_of(module) is not None and list(local) in (["weight"], ["weight", "bias"])
        if known and assigned[:1] == full[:1]:  # the bias may be missing, the weight may not
            modules_of[assigned].append(module)
        role = (full, layer_type_of(module), module.extra_repr() if full else "")
        for name in full:
            roles[name].add(role)
    layers: dict[nn.Module, Layer] = {}
    for assigned, modules in modules_of.items():
        layer_type = layer_type_of(modules[0])
        if layer_type is not None and all(len(roles[name]) == 1 for name in assigned):
            layers |= dict.fromkeys(modules, layer_type(modules[0], assigned))
    return layers


def _called_layers(model: nn.Module, names: Sequence[str]) -> dict[int, Layer]:
    """On path CALLS: the layer of each parameter of a suitable shape, by the parameter's id."""
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    layers: dict[int, Layer] = {}
    for name in names:
        parameter = model.get_parameter(name)
        layer = parameter_layer(model, name, id(parameter) in tables)
        if layer is not None:
            layers[id(parameter)] = layer
    return layers


def _module_layers(model: nn.Module, names: set[str]) -> dict[nn.Module, Layer]:
    """On path MODULE: modules with the named parameters that no other module has."""
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    names_in = [
        (module, {local: name_of[id(parameter)] for local, parameter in _direct_parameters(module)})
        for module in model.modules()
        if not isinstance(module, ParametrizationList)
    ]
    counts = Counter(name for _, full_names in names_in for name in full_names.values())
    layers: dict[nn.Module, Layer] = {}
    for module, full_names in names_in:
        assigned = {local: name for local, name in full_names.items() if name in names and counts[name] == 1}
        if assigned:
            layers[module] = ModuleLayer(module, list(assigned.values()), list(assigned))
    return layers


def _direct_parameters(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The module's parameters without those of submodules; including those that its parameters are computed from
    (torch.nn.utils.parametrize: weight_norm, spectral_norm ...)."""
    parameters = list(module.named_parameters(recurse=False))
    if is_parametrized(module):
        parameters += module.parametrizations.named_parameters(prefix="parametrizations")  # type: ignore[union-attr]
    return parameters
