"""A use of a layer in a forward pass, with what it was given and the gradient at its output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gradtrace.errors import SharedPositionsError, UnsupportedLayerError
from gradtrace.gradients.layouts import Grouping, Layout, Owners, examples_first, owners
from gradtrace.layers import CallInputs, Layer, ModuleInputs

Inputs = Tensor | CallInputs | ModuleInputs


@dataclass(eq=False, slots=True)
class Use:
    """One use of a layer in a forward pass.

    leading: the dimensions of the output before those of a single instance
    fits: the output's dimensions are those of `layout`
    repeated: the layer has other uses in the same forward pass
    gradient, colored: at the output, from the losses and from the losses times colors (see `layouts`); None until the
        backward pass reaches the output
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
        """The example that each position belongs to, in a batch of at least two examples."""
        assert self.gradient is not None
        assert self.colored is not None
        return owners(self._flat(self.gradient), self._flat(self.colored), batch)

    def examples_first(self, batch: int) -> tuple[Any, Tensor]:
        """The two sides of the layer's gradient, as from `Layer.factors`. Both [batch, ...].

        Raises:
            UnsupportedLayerError: the examples are not in the first dimension, and the layer needs them there.
            SharedPositionsError: a position belongs to several examples.
        """
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
        reorder = self._reordering(batch)
        return self.layer.factors(_by_example(inputs, reorder, batch), reorder(d))

    def _reordering(self, batch: int) -> Callable[[Tensor], Tensor]:
        """From values in the layer's layout to [batch, instances, ...]."""
        if batch == 1:
            return partial(torch.unsqueeze, dim=0)
        if self.fits:
            return partial(examples_first, layout=self.layout, batch=batch)
        position_owners = self.owners(batch)
        if bool(position_owners.mixed.any()):
            raise SharedPositionsError(
                f"examples of a batch share positions of layer {self.layer.name} (equal ones computed once?), "
                "which the sample of rows did not show: choose batch_size=1"
            )
        grouping = Grouping(position_owners, batch)
        return lambda values: grouping(self._flat(values))

    def _flat(self, values: Tensor) -> Tensor:
        """The leading dimensions flattened into one: [positions, ...]."""
        return values.reshape(-1, *values.shape[len(self.leading) :])


def _by_example(inputs: Inputs, reorder: Callable[[Tensor], Tensor], batch: int) -> Inputs:
    """Inputs with several instances for each example: [batch, instances, ...]."""
    if isinstance(inputs, ModuleInputs):
        return replace(inputs.changed(reorder, batch), grouped=True)
    return changed_inputs(inputs, reorder, batch)


def changed_inputs(inputs: Inputs, change: Callable[[Tensor], Tensor], batch: int) -> Inputs:
    """Inputs whose tensors of the batch are replaced by `change` of them, which have `batch` entries."""
    if isinstance(inputs, ModuleInputs):
        return inputs.changed(change, batch)
    return inputs.changed(change) if isinstance(inputs, CallInputs) else change(inputs)
