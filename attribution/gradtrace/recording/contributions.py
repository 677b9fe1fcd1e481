"""Contributions: each row's part of the gradient of a training step, from hooks in the step's own passes."""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor, nn

from gradtrace.basis import Basis
from gradtrace.data.guards import rounding
from gradtrace.errors import RecordingError
from gradtrace.layers import Layer, Uses
from gradtrace.models.full_gradients import FullGradients


class Contributions:
    """The contributions of a batch's rows to a step's gradient, of which they are the summands: c_i in g = sum_i c_i.

    If the loss is a mean over the batch, the factor 1 / batch is in them.
    """

    def __init__(self, batch: int, basis: Basis | None, keep: bool) -> None:
        """
        Args:
            batch: number of rows.
            basis: for `coordinates`.
            keep: keep the layers' factors, for `full` and `check_sum`.
        """
        self._batch, self._basis, self._keep = batch, basis, keep
        self._coordinates: dict[str, Tensor] = {}
        self._uses: dict[Layer, Uses] = {}
        self._whole: dict[Layer, Tensor] = {}

    @torch.no_grad()
    def add(self, layer: Layer, x: Tensor, d: Tensor) -> None:
        """Add a use of a layer, called by `capture.training_hooks` in the backward pass.

        Raises:
            RecordingError: the use does not have one example for each row.
        """
        if len(d) != self._batch:
            raise RecordingError(
                f"layer {layer.name} computed {len(d)} examples, {self._batch} rows were named: pass the number of "
                "each example in the batch, and put other uses of the model outside of recorder.step"
            )
        x, d = (t.float() if t.dtype == torch.float64 else t for t in (x, d))
        if self._basis is not None:
            self._basis.add_use(self._coordinates, layer, x, d)
        if self._keep and layer.rotates:
            self._uses.setdefault(layer, []).append((x, d))
        elif self._keep:  # formed now, since a BatchNorm's gradient depends on its mode
            gradient = layer.gradient(x, d)
            self._whole[layer] = self._whole[layer] + gradient if layer in self._whole else gradient

    def coordinates(self) -> Tensor:
        """The contributions in the basis. float32 [batch, dimensions]."""
        assert self._basis is not None
        return self._basis.assemble(self._coordinates, self._batch)

    def full(self) -> FullGradients:
        """The contributions in full space."""
        return FullGradients(self._uses, self._whole, torch.zeros(self._batch))

    @torch.no_grad()
    def check_sum(self, model: nn.Module) -> None:
        """Check that the contributions add up to the gradient that the optimizer is about to use.

        Raises:
            RecordingError: they do not.
        """
        sums = {layer: _summed(layer, uses) for layer, uses in self._uses.items()}
        sums |= {layer: whole.sum(0, keepdim=True) for layer, whole in self._whole.items()}
        for layer, total in sums.items():
            for name, contributed in layer.parameter_gradients(total).items():
                gradient = model.get_parameter(name).grad
                if gradient is None or not _close(contributed[0], gradient):
                    raise RecordingError(
                        f"the rows' parts of the gradient of {name} do not add up to the gradient that the optimizer "
                        "takes: recording allows no clipping, no loss scaling, no accumulation over several batches, "
                        "and no penalty in the loss (weight_decay of the optimizer is followed)"
                    )


def _summed(layer: Layer, uses: Uses) -> Tensor:
    """The layer's gradient, summed over the batch. [1, groups, out, in]."""
    sums = (layer.gradient(x[rows], d[rows]).sum(0, keepdim=True) for x, d in uses for rows in layer.slices(x))
    return reduce(torch.add, sums)


def _close(contributed: Tensor, gradient: Tensor) -> bool:
    contributed, gradient = contributed.reshape(gradient.shape).float(), gradient.float()
    tolerance = 10 * rounding(gradient.dtype) * float(gradient.norm()) + 1e-6
    return float((contributed - gradient).norm()) <= tolerance
