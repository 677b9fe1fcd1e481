"""Each row's part of the gradient of one training step, from the hooks of its own forward and backward pass."""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor, nn

from gradtrace.basis.basis import Basis
from gradtrace.data.guards import rounding
from gradtrace.errors import RecordingError
from gradtrace.layers import Layer, Uses
from gradtrace.models.full_gradients import FullGradients


class Contributions:
    """Fills as the backward pass goes. Parts need no factor for the size of the batch: they are parts of the mean."""

    def __init__(self, batch: int, basis: Basis | None, keep: bool) -> None:
        """keep: hold the layers' factors, for `full`."""
        self._batch, self._basis, self._keep = batch, basis, keep
        self._parts: dict[str, Tensor] = {}
        self._uses: dict[Layer, Uses] = {}
        self._whole: dict[Layer, Tensor] = {}

    @torch.no_grad()
    def add(self, layer: Layer, x: Tensor, d: Tensor) -> None:
        """One use of a layer.

        Raises:
            RecordingError: it is not of one example for each row.
        """
        if len(d) != self._batch:
            raise RecordingError(
                f"layer {layer.name} computed {len(d)} examples, {self._batch} rows were named: pass the number of "
                "each example in the batch, and put other uses of the model outside of recorder.step"
            )
        x, d = (t.float() if t.dtype == torch.float64 else t for t in (x, d))
        if self._basis is not None:
            self._basis.add_use(self._parts, layer, x, d)
        if self._keep and layer.rotates:
            self._uses.setdefault(layer, []).append((x, d))
        elif self._keep:  # in the mode that the layer is in now
            gradient = layer.gradient(x, d)
            self._whole[layer] = self._whole[layer] + gradient if layer in self._whole else gradient

    def coordinates(self) -> Tensor:
        """Of the parts in the basis. float32 [batch, dimensions]."""
        assert self._basis is not None
        return self._basis.assemble(self._parts, self._batch)

    def full(self) -> FullGradients:
        return FullGradients(self._uses, self._whole, torch.zeros(self._batch))

    @torch.no_grad()
    def check_sum(self, model: nn.Module) -> None:
        """See that the parts add up to the gradient that the optimizer is about to use.

        Raises:
            RecordingError: they do not.
        """
        sums = {layer: _summed(layer, uses) for layer, uses in self._uses.items()}
        sums |= {layer: whole.sum(0, keepdim=True) for layer, whole in self._whole.items()}
        for layer, total in sums.items():
            for name, found in layer.parameter_gradients(total).items():
                taken = model.get_parameter(name).grad
                if taken is None or not _same(found[0], taken):
                    raise RecordingError(
                        f"the rows' parts of the gradient of {name} do not add up to the gradient that the optimizer "
                        "takes: recording allows no clipping, no loss scaling, no accumulation over several batches, "
                        "and no penalty in the loss (weight_decay of the optimizer is followed)"
                    )


def _summed(layer: Layer, uses: Uses) -> Tensor:
    """Over the batch. [1, groups, out, in]."""
    parts = (layer.gradient(x[part], d[part]).sum(0, keepdim=True) for x, d in uses for part in layer.slices(x))
    return reduce(torch.add, parts)


def _same(found: Tensor, taken: Tensor) -> bool:
    found, taken = found.reshape(taken.shape).float(), taken.float()
    return float((found - taken).norm()) <= 10 * rounding(taken.dtype) * float(taken.norm()) + 1e-6
