"""Which parameter is differentiated how, on which path."""

from __future__ import annotations

import fnmatch
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from gradtrace.errors import TaskError, UnsupportedLayerError
from gradtrace.gradients.layouts import Layout
from gradtrace.layers import Layer, ModuleLayer, ParameterLayer, layer_type_of, parameter_layer, real_values


class GradientPath(str, Enum):
    """The ways to a parameter's per-example gradients, the fastest first. Each is tried where those before it differ
    from autograd."""

    FACTORS = "factors"  # input and output gradient of a module of a known type
    CALLS = "calls"  # input and output gradient of calls of functions with the parameter: attention, recurrence, tying
    MODULE = "module"  # torch.func.vmap of one module alone
    VMAP = "vmap"  # torch.func.vmap of the whole model
    ALONE = "one by one"  # autograd of the whole model, one example at a time

    @property
    def next(self) -> GradientPath | None:
        paths = list(GradientPath)
        return None if self is paths[-1] else paths[paths.index(self) + 1]


class StrayLayer(ParameterLayer):
    """A parameter whose per-example gradient comes from the whole model, not from a layer's factors."""

    rotates = False

    def __init__(self, module: nn.Module, name: str) -> None:
        super().__init__(module, [name], (1, 1, real_values(module.get_parameter(name).detach()).numel()))

    def input_factors(self, x: Tensor, basis: Tensor | None) -> Tensor:
        raise NotImplementedError("a stray parameter has no factors, only its whole gradient")

    def output_factors(self, d: Tensor, basis: Tensor | None) -> Tensor:
        raise NotImplementedError("a stray parameter has no factors, only its whole gradient")

    def weight_gradient(self, weight: Tensor) -> Tensor:
        return weight.reshape(weight.shape[0], *real_values(self.module.get_parameter(self.names[0]).detach()).shape)


@dataclass(frozen=True)
class PathChoice:
    """What was found to be right for a model, whatever its weights.

    paths: by parameter name.
    layouts: by layer name; Layout.FIRST where a layer is not named.
    batched: by layer name of modules that are differentiated on their own, which arguments have one entry an example.
    whole_graph: whether gradients must be followed beyond the layers, see `gradients`.
    reasons: by parameter name, why it is not on a faster path.
    """

    paths: Mapping[str, GradientPath]
    layouts: Mapping[str, Layout] = field(default_factory=dict)
    whole_graph: bool = False
    batched: Mapping[str, tuple[bool, ...]] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class LayerPlan:
    """The layers of one model instance.

    modules: modules whose factors are noted, each with its layer (shared modules with the same one).
    parameters: layers of parameters that are used by calls, by the id of the parameter.
    whole_modules: modules that are differentiated on their own.
    strays: parameters of the paths VMAP and ALONE.
    """

    layers: list[Layer]
    modules: Mapping[nn.Module, Layer]
    parameters: Mapping[int, Layer]
    whole_modules: Mapping[nn.Module, Layer]
    strays: Mapping[GradientPath, list[StrayLayer]]
    layouts: Mapping[str, Layout]
    batched: Mapping[str, tuple[bool, ...]]
    whole_graph: bool

    @property
    def captures(self) -> bool:
        """Whether any layer is on a path that notes uses."""
        return bool(self.modules or self.parameters or self.whole_modules)

    @property
    def stray_layers(self) -> list[StrayLayer]:
        return [layer for layers in self.strays.values() for layer in layers]

    def with_strays(self, path: GradientPath) -> LayerPlan:
        """With the stray parameters of one path alone."""
        return replace(self, strays={other: layers if other is path else [] for other, layers in self.strays.items()})

    def layout(self, layer: Layer) -> Layout:
        return self.layouts.get(layer.name, Layout.FIRST)


def first_paths(model: nn.Module, trainable: Sequence[str]) -> dict[str, GradientPath]:
    """The fastest path that each parameter's modules allow."""
    paths = dict.fromkeys(trainable, GradientPath.CALLS)
    for names in _factored(model, set(trainable)):
        paths |= dict.fromkeys(names, GradientPath.FACTORS)
    return paths


def plan_layers(model: nn.Module, choice: PathChoice) -> LayerPlan:
    """Assign the parameters of a model to layers, as chosen for its architecture."""
    names_on: dict[GradientPath, list[str]] = defaultdict(list)
    for name, path in choice.paths.items():
        names_on[path].append(name)
    modules = {
        module: layer
        for names, (layer, owners) in _factored(model, set(names_on[GradientPath.FACTORS])).items()
        for module in owners
    }
    tables = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for parameter in module.parameters(recurse=False)
    }
    parameters: dict[int, Layer] = {}
    for name in names_on[GradientPath.CALLS]:
        layer = parameter_layer(model, name, id(model.get_parameter(name)) in tables)
        if layer is not None:
            parameters[id(model.get_parameter(name))] = layer
    whole = _whole_modules(model, set(names_on[GradientPath.MODULE]))
    strays = {
        path: [StrayLayer(model, name) for name in names_on[path]] for path in (GradientPath.VMAP, GradientPath.ALONE)
    }
    layers = [*dict.fromkeys(modules.values()), *parameters.values(), *whole.values(), *strays[GradientPath.VMAP]]
    layers += strays[GradientPath.ALONE]
    return LayerPlan(
        _in_order(layers, choice.paths),
        modules,
        parameters,
        whole,
        strays,
        choice.layouts,
        choice.batched,
        choice.whole_graph,
    )


def _in_order(layers: Sequence[Layer], paths: Mapping[str, GradientPath]) -> list[Layer]:
    """As their first parameters stand in the model."""
    places = {name: place for place, name in enumerate(paths)}
    return sorted(layers, key=lambda layer: places[layer.names[0]])


def _factored(model: nn.Module, names: set[str]) -> dict[tuple[str, ...], tuple[Layer, list[nn.Module]]]:
    """Layers of modules of known types with only these parameters; parameters that modules share in different roles
    (a tied embedding, say) are left out: gradients of different roles have different factors."""
    owners: dict[tuple[str, ...], list[nn.Module]] = defaultdict(list)
    users: dict[str, set[object]] = defaultdict(set)
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}  # a shared one has its first name
    for module in model.modules():
        own = dict(module.named_parameters(recurse=False))
        full = tuple(name_of[id(parameter)] for parameter in own.values())
        chosen = tuple(name for name in full if name in names)  # a bias may not count; the weight must
        known = layer_type_of(module) is not None and list(own) in (["weight"], ["weight", "bias"])
        if known and chosen[:1] == full[:1]:
            owners[chosen].append(module)
        role = (full, layer_type_of(module), module.extra_repr() if full else "")
        for name in full:
            users[name].add(role)
    layers: dict[tuple[str, ...], tuple[Layer, list[nn.Module]]] = {}
    for full, modules in owners.items():
        layer_type = layer_type_of(modules[0])
        if layer_type is not None and all(len(users[name]) == 1 for name in full):
            layers[full] = (layer_type(modules[0], full), modules)
    return layers


def _whole_modules(model: nn.Module, names: set[str]) -> dict[nn.Module, Layer]:
    """Modules with the chosen parameters that are theirs alone."""
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    owned = [
        (module, {local: name_of[id(parameter)] for local, parameter in _own_parameters(module)})
        for module in model.modules()
        if not isinstance(module, ParametrizationList)
    ]
    counts = Counter(name for _, own in owned for name in own.values())
    layers: dict[nn.Module, Layer] = {}
    for module, own in owned:
        chosen = {local: name for local, name in own.items() if name in names and counts[name] == 1}
        if chosen:
            layers[module] = ModuleLayer(module, list(chosen.values()), list(chosen))
    return layers


def _own_parameters(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Also those that its parameters are computed from (torch.nn.utils.parametrize: weight_norm, spectral_norm ...)."""
    own = list(module.named_parameters(recurse=False))
    if is_parametrized(module):
        computed = module.parametrizations.named_parameters(prefix="parametrizations")  # type: ignore[union-attr]
        own += list(computed)
    return own


def trainable_names(model: nn.Module, patterns: Sequence[str] | None = None) -> list[str]:
    """Names of the parameters that require a gradient, and that the patterns choose.

    patterns: see `Task.layers`.

    Raises:
        TaskError: there are none, or a pattern fits no parameter.
        UnsupportedLayerError: the model, or a part of it, is TorchScript.
    """
    scripted = [name or "the model" for name, module in model.named_modules() if _is_script(module)]
    if scripted:
        raise UnsupportedLayerError(
            f"{scripted[0]} is TorchScript (torch.jit.script or torch.jit.trace), whose layers cannot be watched: "
            "return the Python module from Task.model; the weights of checkpoints fit both"
        )
    compiled = [name for name, module in model.named_modules() if hasattr(module, "_orig_mod")]
    if compiled:
        raise UnsupportedLayerError(
            f"{compiled[0]} is compiled (torch.compile), so that its layers cannot be watched: return the eager module "
            "from Task.model; the weights of checkpoints fit both"
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


def _is_script(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.jit")
