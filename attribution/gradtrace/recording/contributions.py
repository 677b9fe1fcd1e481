"""Each row's contribution to the gradient of a training step, from hooks in the step's own passes; and probes, whose
losses they lower: TracIn by step (Pruthi et al. 2020)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from gradtrace.basis import Basis
from gradtrace.data.batches import collate
from gradtrace.data.guards import check_losses, rounding
from gradtrace.errors import RecordingError
from gradtrace.gradients.capture import backpropagate
from gradtrace.gradients.plan import LayerPlan
from gradtrace.layers import Layer, Uses
from gradtrace.models.full_gradients import FullGradients
from gradtrace.task import Example, Task


class Contributions:
    """The contributions of a batch's rows to a step's gradient, of which they are the summands: c_i in g = sum_i c_i.

    If the loss is a mean over the batch, the factor 1 / batch is in them.
    """

    def __init__(self, batch: int, basis: Basis | None, keep: bool) -> None:
        """batch: number of rows.  basis: for `coordinates`.  keep: the layers' factors, for `full` and `check_sum`"""
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
        sums = {layer: whole.sum(0) for layer, whole in self._whole.items()}  # each [groups, out, in]
        for layer, uses in self._uses.items():
            by_slice = (layer.gradient(x[rows], d[rows]).sum(0) for x, d in uses for rows in layer.slices(x))
            sums[layer] = reduce(torch.add, by_slice)
        for layer, total in sums.items():
            for name, contributed in layer.parameter_gradients(total[None]).items():
                gradient = model.get_parameter(name).grad
                if gradient is None or not _close(contributed[0], gradient):
                    raise RecordingError(
                        f"the rows' parts of the gradient of {name} do not add up to the gradient that the optimizer "
                        "takes: recording allows no clipping, no loss scaling, no accumulation over several batches, "
                        "and no penalty in the loss (weight_decay of the optimizer is followed)"
                    )


def _close(contributed: Tensor, gradient: Tensor) -> bool:
    contributed, gradient = contributed.reshape(gradient.shape).float(), gradient.float()
    tolerance = 10 * rounding(gradient.dtype) * float(gradient.norm()) + 1e-6
    return float((contributed - gradient).norm()) <= tolerance


class Probes:
    """Examples whose losses are followed, by a shadow model: a copy in eval mode that shares the trained tensors.

    scores: float64 [probes, rows], the sum over steps of how much each row lowered the probe's loss
    losses: float64 [2, probes], before the first step, and when they were last computed
    """

    def __init__(self, task: Task, examples: Sequence[Example], rows: int) -> None:
        self._task, self._examples = task, examples
        self.scores = torch.zeros(len(examples), rows, dtype=torch.float64)
        self.losses = torch.zeros(2, len(examples), dtype=torch.float64)
        self._stale = True  # losses[1] is not of the current weights

    def __len__(self) -> int:
        return len(self._examples)

    def begin(
        self, model: nn.Module, shadow_model: nn.Module, shadow_plan: LayerPlan, plan: LayerPlan, resumed: bool
    ) -> None:
        """Prepare for the first step of `model`, with layers `plan`.

        shadow_model, shadow_plan: an equal model, used for the probes only.  resumed: `losses` were restored
        """
        if not self._examples:
            return
        self._model, self._shadow_model, self._shadow_plan = model, shadow_model, shadow_plan
        self._layers = {layer.name: layer for layer in plan.layers}
        device = next(model.parameters()).device
        self._batch = collate(self._task, self._examples, device)
        if not resumed:
            self.losses[0] = self._current_losses()

    def approximate(self, rows: Tensor, contributions: Contributions, rate: float) -> None:
        """Add rate x <gradient of the probe's loss, the row's contribution>, both before the step, to the scores of a
        batch (first-order approximation, Section 3.2)."""
        if self._examples:
            products = self._gradients().inner_products(contributions.full()).values()
            self._stale = True
            self.scores.index_add_(1, rows, rate * torch.stack(list(products)).sum(0).double().cpu())

    def update_losses(self) -> None:
        """Compute `losses[1]` at the current weights, as is needed before `measure`."""
        if self._examples and self._stale:
            self.losses[1] = self._current_losses()
            self._stale = False

    def measure(self, row: int) -> None:
        """Add the fall of each probe's loss to the score of the single row of the last step (TracInIdeal, Section
        3.1)."""
        if self._examples:
            before = self.losses[1].clone()
            self.losses[1] = self._current_losses()
            self.scores[:, row] += before - self.losses[1]

    def _share_weights(self) -> None:
        """Let the shadow model use the trained model's tensors. Repeated, since a training may replace tensors."""
        shadow, trained = ([*model.parameters(), *model.buffers()] for model in (self._shadow_model, self._model))
        for tensor, trained_tensor in zip(shadow, trained, strict=True):
            tensor.data = trained_tensor.data

    @torch.no_grad()
    def _current_losses(self) -> Tensor:
        """float64 [probes] on the CPU."""
        self._share_weights()
        losses = self._task.loss(self._shadow_model, self._batch.collated)
        check_losses(losses, len(self._examples))
        return losses.double().cpu()

    def _gradients(self) -> FullGradients:
        """The gradients of the probes' losses, by layers of the trained model."""
        self._share_weights()
        contributions = Contributions(len(self._examples), None, keep=True)
        losses = backpropagate(self._shadow_model, self._task.loss, self._batch, self._shadow_plan, contributions.add)
        check_losses(losses, len(self._examples))
        full = contributions.full()
        uses = {self._layers[layer.name]: factors for layer, factors in full.uses.items()}
        whole = {self._layers[layer.name]: gradient for layer, gradient in full.strays.items()}
        return FullGradients(uses, whole, losses)

    def tensors(self) -> dict[str, Tensor]:
        return {"scores": self.scores, "losses": self.losses}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Return to a state that `tensors` gave."""
        self.scores.copy_(state["scores"])
        self.losses.copy_(state["losses"])
