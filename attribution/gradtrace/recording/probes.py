"""TracIn by step: what every step of a training does to the losses of some examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gradtrace.data.batches import collate
from gradtrace.data.guards import check_losses
from gradtrace.gradients.capture import backpropagate
from gradtrace.gradients.plan import LayerPlan
from gradtrace.models.full_gradients import FullGradients
from gradtrace.recording.contributions import Contributions
from gradtrace.task import Example, Task


class Probes:
    """Examples whose losses are followed, on a copy in eval mode that shares the trained weights' memory.

    scores: float64 [probes, rows]
    losses: float64 [2, probes], before the first step, and at the latest
    """

    def __init__(self, task: Task, examples: Sequence[Example], rows: int) -> None:
        self._task, self._examples = task, examples
        self.scores = torch.zeros(len(examples), rows, dtype=torch.float64)
        self.losses = torch.zeros(2, len(examples), dtype=torch.float64)
        self._stale = True  # losses[1] is not of the present weights

    def __len__(self) -> int:
        return len(self._examples)

    def begin(self, model: nn.Module, double: nn.Module, of_double: LayerPlan, plan: LayerPlan, resumed: bool) -> None:
        """`double`: an equal model, for the probes alone, with its plan; `plan` is the trained model's."""
        if not self._examples:
            return
        self._model, self._double, self._plan = model, double, of_double
        self._layers = {layer.name: layer for layer in plan.layers}
        device = next(model.parameters()).device
        self._batch = collate(self._task, self._examples, device)
        if not resumed:
            self.losses[0] = self._present_losses()

    def approximate(self, rows: Tensor, contributions: Contributions, rate: float) -> None:
        """First order: rate x <gradient of the probe's loss, the row's part>, before the step (Pruthi et al. 2020,
        Section 3.2)."""
        if self._examples:
            products = self._gradients().inner_products(contributions.full()).values()
            self._stale = True
            self.scores.index_add_(1, rows, rate * torch.stack(list(products)).sum(0).double().cpu())

    def look(self) -> None:
        """Before a step that will be measured."""
        if self._examples and self._stale:
            self.losses[1] = self._present_losses()
            self._stale = False

    def measure(self, row: int) -> None:
        """TracInIdeal: all that the step, which was on this row alone, did to the loss (Section 3.1)."""
        if self._examples:
            before = self.losses[1].clone()
            self.losses[1] = self._present_losses()
            self.scores[:, row] += before - self.losses[1]

    def _share_weights(self) -> None:
        """Optimizers change weights in place; whoever replaces them is followed as well."""
        own, trained = ([*model.parameters(), *model.buffers()] for model in (self._double, self._model))
        for tensor, other in zip(own, trained, strict=True):
            tensor.data = other.data

    @torch.no_grad()
    def _present_losses(self) -> Tensor:
        self._share_weights()
        losses = self._task.loss(self._double, self._batch.collated)
        check_losses(losses, len(self._examples))
        return losses.double().cpu()

    def _gradients(self) -> FullGradients:
        """Of the probes' losses, under the trained model's layers."""
        self._share_weights()
        found = Contributions(len(self._examples), None, keep=True)
        losses = backpropagate(self._double, self._task.loss, self._batch, self._plan, found.add)
        check_losses(losses, len(self._examples))
        full = found.full()
        uses = {self._layers[layer.name]: factors for layer, factors in full.uses.items()}
        whole = {self._layers[layer.name]: gradient for layer, gradient in full.strays.items()}
        return FullGradients(uses, whole, losses)

    def tensors(self) -> dict[str, Tensor]:
        return {"scores": self.scores, "losses": self.losses}

    def state(self) -> dict[str, Tensor]:
        return self.tensors()

    def restore(self, state: Mapping[str, Any]) -> None:
        """Be as when `state` was taken."""
        self.scores.copy_(state["scores"])
        self.losses.copy_(state["losses"])
