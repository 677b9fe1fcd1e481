"""The fast path: a forward pass and a backward pass to the activations give each layer's inputs and output gradients.

Parameters never require a gradient, so that no weight gradient is formed, neither per example nor summed.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gradtrace.data.batches import ExampleBatch, Measure, values_of
from gradtrace.gradients.function_calls import ParameterCalls
from gradtrace.gradients.layouts import SHARED_LAYOUTS, Inputs, Layout, Use, changed_inputs, colors, fits
from gradtrace.gradients.plan import LayerPlan
from gradtrace.layers import Layer, ModuleInputs

# Called with (layer, its input, the gradient at its output) for each use of the layer. Both are [batch, ...].
OnUse = Callable[[Layer, Any, Tensor], None]


class _GraphStart(torch.autograd.Function):
    """Make a tensor that requires no gradient the start of a graph. In place, so that an in-place ReLU may follow."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, token: Tensor) -> Tensor:
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        return None, grads[0].new_zeros(0)


def _root(device: torch.device) -> Tensor:
    """An empty tensor, the root of the graph where a layer's output requires no gradient."""
    return torch.zeros(0, device=device, requires_grad=True)


class Capture:
    """Collects the uses of a plan's layers during a forward pass, and the gradients at their outputs during backward.

    phase: in phase "forward" gradients are ignored: the measure itself may compute some.
    """

    def __init__(self, plan: LayerPlan, batch: ExampleBatch, on_use: Callable[[Use], None] | None = None) -> None:
        """on_use: called as soon as a use has its gradient, which is then discarded; None: uses keep it."""
        self.plan, self.token = plan, _root(batch.device)
        self.uses: list[Use] = []
        self.phase: Literal["forward", "colors", "gradients"] = "forward"
        self._batch, self._uniform, self._on_use = len(batch), batch.uniform, on_use
        # Uses of checkpointed segments, which the backward pass with colors ran a second time, by layer.
        self._rerun_uses: dict[Layer, deque[Use]] = defaultdict(deque)
        self._in_callback = False  # on_use may run modules to differentiate them: these are not uses

    def is_watching(self) -> bool:
        return torch.is_grad_enabled() and not self._in_callback

    @property
    def needs_colors(self) -> bool:
        # A checkpointed segment may have scattered uses that the forward pass does not show.
        scattered = self.plan.choice.whole_graph and Layout.SCATTERED in self.plan.choice.layouts.values()
        return self._batch > 1 and (scattered or any(not use.fits for use in self.uses))

    def begin_gradients(self) -> None:
        """Start the last phase, after the forward pass and the backward pass with colors."""
        counts = Counter(use.layer for use in self.uses)
        for use in self.uses:
            use.repeated = counts[use.layer] > 1
        self.phase = "gradients"

    def add(self, uses: Sequence[tuple[Layer, Inputs]], output: Tensor) -> Tensor:
        """Add uses of layers (a weight and a bias, say) with the same output. Returns the output for the model to use.

        uses: (layer, its inputs)
        """
        if not output.numel():  # an expert that no example was sent to
            return output
        leading = uses[0][0].leading_dimensions(output)
        layouts = {self.plan.layout(layer) for layer, _ in uses}
        if layouts <= {*SHARED_LAYOUTS} and self._batch > 1:
            repeat = partial(_repeated, batch=self._batch, has_batch=Layout.SHARED_FIRST in layouts)
            uses = [(layer, changed_inputs(inputs, repeat, self._batch)) for layer, inputs in uses]
            output = repeat(output).clone() + self.token.sum()
            leading = uses[0][0].leading_dimensions(output)
        elif not output.requires_grad:
            output = _GraphStart.apply(output, self.token)  # type: ignore[no-untyped-call]
        for layer, inputs in uses:
            layout = self.plan.layout(layer)
            layout = Layout.FIRST if layout in SHARED_LAYOUTS else layout
            inputs = inputs if isinstance(inputs, ModuleInputs) else changed_inputs(inputs, Tensor.detach, self._batch)
            use = Use(layer, inputs, layout, leading, fits(layout, leading, self._batch, self._uniform))
            if self.phase == "colors":
                self._rerun_uses[layer].append(use)
            elif self._rerun_uses[layer]:
                use.colored = self._rerun_uses[layer].popleft().colored
            self.uses.append(use)
            # The hook belongs to this version of the tensor: a later in-place operation does not change its gradient.
            output.register_hook(partial(self._receive, use))
        return output

    @torch.no_grad()
    def _receive(self, use: Use, d: Tensor) -> None:
        if self.phase == "colors":
            use.colored = d
        if self.phase != "gradients":
            return
        use.gradient = d
        if self._on_use is None:
            return
        self._in_callback = True
        try:
            self._on_use(use)
        finally:
            self._in_callback = False
            use.gradient = use.colored = None


def _repeated(values: Tensor, batch: int, has_batch: bool) -> Tensor:
    """Values that all examples share, repeated for each: [batch, ...]. has_batch: they have a batch dimension of 1."""
    return (values if has_batch else values.unsqueeze(0)).expand(batch, *values.shape[int(has_batch) :])


def first_argument(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The input of a call of a module that takes one."""
    return args[0] if args else next(iter(kwargs.values()))


@contextmanager
def hooked(modules: Iterable[nn.Module], hook: Callable[..., Any]) -> Iterator[None]:
    """While open, `hook` takes (module, args, kwargs, output) of each call of the modules, and returns the output."""
    with ExitStack() as handles:
        for module in modules:
            handles.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        yield


@contextmanager
def _module_hooks(capture: Capture) -> Iterator[None]:
    """While open, `capture` receives the uses of its plan's modules."""
    plan = capture.plan

    def layer_hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        if not capture.is_watching() or not isinstance(output, Tensor):  # a subclass may return something else
            return output
        return capture.add([(plan.modules[module], first_argument(args, kwargs))], output)

    def module_hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if not capture.is_watching():
            return output
        layer = plan.whole_modules[module]

        def add(inputs: ModuleInputs, tensor: Tensor) -> Tensor:
            return capture.add([(layer, inputs)], tensor)

        return ModuleInputs.map_outputs(args, kwargs, output, add, plan.choice.batched.get(layer.name))

    with hooked(plan.modules, layer_hook), hooked(plan.whole_modules, module_hook):
        yield


@contextmanager
def training_hooks(layers: Mapping[nn.Module, Layer], on_use: OnUse) -> Iterator[None]:
    """While open, the backward pass of a training step calls `on_use` for every use of every module in `layers`, with
    inputs and gradients in the module's own layout."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return output
        x = first_argument(args, kwargs).detach()
        if not output.requires_grad:
            output = _GraphStart.apply(output, _root(output.device))  # type: ignore[no-untyped-call]
        output.register_hook(lambda d: on_use(layers[module], x, d))
        return output

    with hooked(layers, hook):
        yield


def backpropagate(
    model: nn.Module, measure: Measure, batch: ExampleBatch, plan: LayerPlan, on_use: OnUse, merge: bool = True
) -> Tensor:
    """Run `measure` forward and backward, calling `on_use` with (layer, inputs, output gradients), both [batch, ...].

    Returns the losses [batch], detached.

    merge: uses of one layer may come as one with the positions of all; else each comes with its own
    """
    if not plan.used_layers:  # the gradients of all parameters come from the whole model, not from layers
        return values_of(measure, model, batch.collated)

    repeated: dict[Layer, list[tuple[Any, Tensor]]] = defaultdict(list)

    def receive(use: Use) -> None:
        sides = use.examples_first(len(batch))
        if merge and use.repeated:  # such as a recurrent layer's steps: merged, they take one product instead of many
            repeated[use.layer].append(sides)
        else:
            on_use(use.layer, *sides)

    losses = _run(model, measure, batch, Capture(plan, batch, receive))
    with torch.no_grad():
        for layer, uses in repeated.items():
            for x, d in layer.merged(uses):
                on_use(layer, x, d)
    return losses


def observed_uses(model: nn.Module, measure: Measure, batch: ExampleBatch, plan: LayerPlan) -> list[Use]:
    """Every use of the plan's layers that the loss depends on, with its `gradient` and, for two examples or more, its
    `colored` gradient."""
    if not plan.used_layers:
        return []
    capture = Capture(plan, batch)
    _run(model, measure, batch, capture, color=True)
    return [use for use in capture.uses if use.gradient is not None]


def _run(model: nn.Module, measure: Measure, batch: ExampleBatch, capture: Capture, color: bool = False) -> Tensor:
    """Capture uses of layers. Returns losses [batch], detached. color: run a backward pass with colors in any case"""
    plan, whole_graph = capture.plan, capture.plan.choice.whole_graph
    with ExitStack() as forward, ExitStack() as both_passes:
        both_passes.enter_context(torch.enable_grad())
        both_passes.enter_context(_module_hooks(capture))
        # The backward pass runs checkpointed segments again, and calls in them are uses as well.
        calls = both_passes if whole_graph else forward
        if plan.parameters:
            calls.enter_context(ParameterCalls(plan.parameters, capture.is_watching, capture.add))
        losses = measure(model, batch.collated)
        if not losses.requires_grad:  # the losses depend on no layer
            return losses
        forward.close()
        if capture.needs_colors or (color and len(batch) > 1):
            capture.phase = "colors"
            degree = getattr(measure, "degree", 1.0)  # gradients scale with this power of an example's weight
            weights = colors(len(batch), losses.device) ** (1 / degree)
            _differentiate((losses * weights.to(losses.dtype)).sum(), capture.token, whole_graph, keep=True)
        capture.begin_gradients()
        _differentiate(losses.sum(), capture.token, whole_graph)
    return losses.detach()


def _differentiate(loss: Tensor, token: Tensor, whole_graph: bool, keep: bool = False) -> None:
    """Run the backward pass. keep: keep the graph for another one

    whole_graph: follow all of the graph, not only what leads to layers' outputs. Needed by checkpointed segments, and
        where the model itself makes tensors require a gradient.
    """
    if whole_graph:
        loss.backward(retain_graph=keep)
    else:  # the loss is a sum: with grad_outputs instead, PyTorch would load SymPy (1.4 s)
        torch.autograd.grad(loss, token, retain_graph=keep)
