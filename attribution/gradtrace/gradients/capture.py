"""The fast path: one forward and one backward to the activations give every layer's (input, output gradient).

Parameters never require a gradient, so no weight gradient is ever formed, neither per example nor summed.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gradtrace.data.batches import ExampleBatch, Measure, values_of
from gradtrace.errors import SharedPositionsError, UnsupportedLayerError
from gradtrace.gradients.function_calls import ParameterCalls
from gradtrace.gradients.layouts import SHARED_LAYOUTS, Grouping, Layout, Owners, colors, examples_first, fits, owners
from gradtrace.gradients.plan import LayerPlan
from gradtrace.layers import CallInputs, Layer, ModuleInputs

Inputs = Tensor | CallInputs | ModuleInputs
# (layer, its input, the gradient at its output), once for each use; both are [batch, ...]
OnUse = Callable[[Layer, Any, Tensor], None]


class _Anchor(torch.autograd.Function):
    """Make a tensor that needs no gradient the start of a graph, in place, so that a later in-place ReLU may follow."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, token: Tensor) -> Tensor:
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        return None, grads[0].new_zeros(0)


@dataclass(eq=False, slots=True)
class Use:
    """One use of a layer in a forward pass.

    leading: the dimensions of the output before those of a single instance.
    repeated: whether the layer had other uses in the forward pass.
    gradient, colored: at the output, without and with colors; None until the backward pass gets there.
    """

    layer: Layer
    inputs: Inputs
    layout: Layout
    leading: tuple[int, ...]
    fits: bool
    repeated: bool = False
    gradient: Tensor | None = None
    colored: Tensor | None = None

    def owners(self, batch: int) -> Owners:
        """Whose each position is, from the gradients of a batch of at least two examples."""
        assert self.gradient is not None
        assert self.colored is not None
        return owners(self._flat(self.gradient), self._flat(self.colored), batch)

    def examples_first(self, batch: int) -> tuple[Any, Tensor]:
        """The sides of the layer's gradient, see `Layer.factors`, [batch, ...] both."""
        assert self.gradient is not None
        inputs, d = self.inputs, self.gradient
        if (self.layout is Layout.FIRST and self.fits) or (batch == 1 and self.leading[:1] == (1,)):
            return self.layer.factors(inputs, d)
        if not self.layer.takes_instances:
            raise UnsupportedLayerError(
                f"layer {self.layer.name} is given inputs {list(self.gradient.shape)} in a batch of {batch}, whose "
                "examples are not in the first dimension, as they were in the sample of rows that the model was "
                "examined on: freeze it, or let it see whole batches"
            )
        change: Callable[[Tensor], Tensor]
        if batch == 1:
            change = lambda values: values.unsqueeze(0)  # noqa: E731
        elif self.fits:
            change = lambda values: examples_first(values, self.layout, batch)  # noqa: E731
        else:
            found = self.owners(batch)
            if bool(found.mixed.any()):
                raise SharedPositionsError(
                    f"examples of a batch share positions of layer {self.layer.name} (equal ones computed once?), "
                    "which the sample of rows did not show: choose batch_size=1"
                )
            grouping = Grouping(found, batch)
            change = lambda values: grouping(self._flat(values))  # noqa: E731
        return self.layer.factors(_by_example(inputs, change, batch), change(d))

    def _flat(self, values: Tensor) -> Tensor:
        """One dimension for all leading ones."""
        return values.reshape(-1, *values.shape[len(self.leading) :])


def _by_example(inputs: Inputs, change: Callable[[Tensor], Tensor], batch: int) -> Inputs:
    """Of each example several instances: [batch, instances, ...]."""
    if isinstance(inputs, ModuleInputs):
        return replace(inputs.changed(change, batch), grouped=True)
    return _changed(inputs, change, batch)


def _changed(inputs: Inputs, change: Callable[[Tensor], Tensor], batch: int) -> Inputs:
    if isinstance(inputs, ModuleInputs):
        return inputs.changed(change, batch)
    return inputs.changed(change) if isinstance(inputs, CallInputs) else change(inputs)


class Capture:
    """Collects the uses of a plan's layers while a measure runs, and the gradients at their outputs afterwards.

    phase: gradients that a measure takes itself, in its forward pass, are none of those that are looked for.
    """

    def __init__(
        self, plan: LayerPlan, batch: ExampleBatch, token: Tensor, on_use: Callable[[Use], None] | None
    ) -> None:
        """on_use: called as soon as a use has its gradient; None: uses keep it."""
        self._uniform = batch.uniform
        self.uses: list[Use] = []
        self.phase: Literal["forward", "colors", "gradients"] = "forward"
        self._plan, self._batch, self._token, self._on_use = plan, len(batch), token, on_use
        # Uses that the backward pass with colors came to by running a checkpointed segment again, by layer.
        self._run_again: dict[Layer, deque[Use]] = defaultdict(deque)
        self._busy = False  # modules that are run again to differentiate them are no uses

    @property
    def watching(self) -> bool:
        return torch.is_grad_enabled() and not self._busy

    @property
    def needs_colors(self) -> bool:
        scattered = self._plan.whole_graph and Layout.SCATTERED in self._plan.layouts.values()  # may be run again only
        return self._batch > 1 and (scattered or any(not use.fits for use in self.uses))

    def begin_gradients(self) -> None:
        """After the forward pass, and the backward pass with colors."""
        counts = Counter(use.layer for use in self.uses)
        for use in self.uses:
            use.repeated = counts[use.layer] > 1
        self.phase = "gradients"

    def add(self, uses: Sequence[tuple[Layer, Inputs]], output: Tensor) -> Tensor:
        """Note what layers were given whose output this is; returns the output with which the model must go on."""
        if not output.numel():  # an expert that no example was sent to
            return output
        leading = uses[0][0].leading_dimensions(output)
        layouts = {self._plan.layout(layer) for layer, _ in uses}
        if layouts <= {*SHARED_LAYOUTS} and self._batch > 1:
            copied = partial(_copied, batch=self._batch, has_batch=Layout.SHARED_FIRST in layouts)
            uses = [(layer, _changed(inputs, copied, self._batch)) for layer, inputs in uses]
            output = copied(output).clone() + self._token.sum()
            leading = uses[0][0].leading_dimensions(output)
        elif not output.requires_grad:
            output = _Anchor.apply(output, self._token)  # type: ignore[no-untyped-call]
        for layer, inputs in uses:
            layout = self._plan.layout(layer)
            layout = Layout.FIRST if layout in SHARED_LAYOUTS else layout
            inputs = inputs if isinstance(inputs, ModuleInputs) else _changed(inputs, Tensor.detach, self._batch)
            use = Use(layer, inputs, layout, leading, self._fits(layout, leading))
            if self.phase == "colors":
                self._run_again[layer].append(use)
            elif self._run_again[layer]:
                use.colored = self._run_again[layer].popleft().colored
            self.uses.append(use)
            # Registered on the tensor as it is now: a later in-place operation does not change what the hook receives.
            output.register_hook(partial(self._receive, use))
        return output

    def _fits(self, layout: Layout, leading: tuple[int, ...]) -> bool:
        """Folded examples of different sizes may be ragged: then their places are not known from their number."""
        folded = layout in (Layout.FOLDED, Layout.INTERLEAVED)
        return fits(layout, leading, self._batch) and (self._uniform or not folded)

    @torch.no_grad()
    def _receive(self, use: Use, d: Tensor) -> None:
        if self.phase == "colors":
            use.colored = d
        if self.phase != "gradients":
            return
        use.gradient = d
        if self._on_use is None:
            return
        self._busy = True
        try:
            self._on_use(use)
        finally:
            self._busy = False
            use.gradient = use.colored = None


def _copied(values: Tensor, batch: int, has_batch: bool) -> Tensor:
    """What all examples share, once for each: [batch, ...]."""
    return (values if has_batch else values.unsqueeze(0)).expand(batch, *values.shape[int(has_batch) :])


@contextmanager
def _hooked(plan: LayerPlan, capture: Capture) -> Iterator[None]:
    """While open, the uses of the plan's modules are noted."""

    def layer_hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        if not capture.watching or not isinstance(
            output, Tensor
        ):  # evaluated in between, or not what the class returns
            return output
        return capture.add([(plan.modules[module], args[0] if args else next(iter(kwargs.values())))], output)

    def module_hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if not capture.watching:
            return output
        layer = plan.whole_modules[module]
        known = plan.batched.get(layer.name)
        note = lambda inputs, tensor: capture.add([(layer, inputs)], tensor)  # noqa: E731
        return ModuleInputs.noted(args, kwargs, output, note, known)

    with ExitStack() as hooks:
        for module in plan.modules:
            hooks.callback(module.register_forward_hook(layer_hook, with_kwargs=True).remove)
        for module in plan.whole_modules:
            hooks.callback(module.register_forward_hook(module_hook, with_kwargs=True).remove)
        yield


@contextmanager
def tapped(layers: Mapping[nn.Module, Layer], on_use: OnUse, token: Tensor) -> Iterator[None]:
    """While open, `on_use` is called in the backward pass of a training step for every use of every module in
    `layers`, with inputs and gradients as they are."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return output
        x = (args[0] if args else next(iter(kwargs.values()))).detach()
        if not output.requires_grad:
            output = _Anchor.apply(output, token)  # type: ignore[no-untyped-call]
        output.register_hook(lambda d: on_use(layers[module], x, d))
        return output

    with ExitStack() as hooks:
        for module in layers:
            hooks.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        yield


def backpropagate(model: nn.Module, measure: Measure, batch: ExampleBatch, plan: LayerPlan, on_use: OnUse) -> Tensor:
    """Run `measure` forward and back, feeding `on_use` with (layer, inputs, output gradients), both [batch, ...].

    Returns the losses [batch], detached.
    """
    if not plan.captures:  # every parameter is differentiated outside of its layer
        return values_of(measure, model, batch.collated)

    collected: dict[Layer, list[tuple[Any, Tensor]]] = defaultdict(list)

    def receive(use: Use) -> None:
        sides = use.examples_first(len(batch))
        if use.repeated:  # the steps of a recurrent layer, say: together they take one product instead of many
            collected[use.layer].append(sides)
        else:
            on_use(use.layer, *sides)

    losses = _run(model, measure, batch, plan, receive, False)[0]
    with torch.no_grad():
        for layer, uses in collected.items():
            for x, d in layer.merged(uses):
                on_use(layer, x, d)
    return losses


def observed_uses(model: nn.Module, measure: Measure, batch: ExampleBatch, plan: LayerPlan) -> list[Use]:
    """Every use of the plan's layers that the loss depends on, with its gradients without and with colors."""
    if not plan.captures:
        return []
    return [use for use in _run(model, measure, batch, plan, None, True)[1] if use.gradient is not None]


def _run(
    model: nn.Module,
    measure: Measure,
    batch: ExampleBatch,
    plan: LayerPlan,
    on_use: Callable[[Use], None] | None,
    color: bool,
) -> tuple[Tensor, list[Use]]:
    token = torch.zeros(0, device=batch.device, requires_grad=True)
    capture = Capture(plan, batch, token, on_use)
    with ExitStack() as forward, ExitStack() as everything:
        everything.enter_context(torch.enable_grad())
        everything.enter_context(_hooked(plan, capture))
        # A checkpointed forward pass is run again in the backward pass, where calls are to be noted as well.
        calls = everything if plan.whole_graph else forward
        if plan.parameters:
            calls.enter_context(ParameterCalls(plan.parameters, capture))
        losses = measure(model, batch.collated)
        if not losses.requires_grad:  # these examples depend on none of the layers
            return losses, []
        forward.close()
        if capture.needs_colors or (color and len(batch) > 1):
            capture.phase = "colors"
            degree = getattr(measure, "degree", 1.0)  # gradients scale with this power of an example's weight
            weights = colors(len(batch), losses.device) ** (1 / degree)
            _differentiate((losses * weights.to(losses.dtype)).sum(), token, plan.whole_graph, keep=True)
        capture.begin_gradients()
        _differentiate(losses.sum(), token, plan.whole_graph)
    return losses.detach(), capture.uses


def _differentiate(loss: Tensor, token: Tensor, whole_graph: bool, keep: bool = False) -> None:
    """whole_graph: also what does not come from a layer's output, but from tensors that the model lets require a
    gradient; and checkpointed segments, which allow no other way."""
    if whole_graph:
        loss.backward(retain_graph=keep)
    else:  # of a sum: grad_outputs would make PyTorch load SymPy (1.4 s)
        torch.autograd.grad(loss, token, retain_graph=keep)
