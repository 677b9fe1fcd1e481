"""From a batch to rows: the per-example gradients of one checkpoint in the coordinates of a basis."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from gradtrace.basis import Basis
from gradtrace.checkpoints import Checkpoint, load_into
from gradtrace.errors import LossError
from gradtrace.gradients import Measure, backpropagate
from gradtrace.guards import check_finite, check_loss_function, check_losses
from gradtrace.layers import Layer
from gradtrace.outputs import Outputs, model_outputs, predictions_of
from gradtrace.plan import LayerPlan, checked_plan, trainable_names
from gradtrace.replay import replayed_forward
from gradtrace.representations import Uses, find_representation, recorded_inputs
from gradtrace.task import Batch, Example, Label, Task


class Encoded(NamedTuple):
    """Of a batch: rows [batch, dimensions], losses [batch], predictions [batch], representations [batch, features]."""

    rows: Tensor
    losses: Tensor
    predictions: Tensor | None
    representations: Tensor | None


class GradientModel:
    """A model with one checkpoint's weights, its layer plan, and the task around it. In eval mode, always.

    The task's own model instance is copied, never changed.
    """

    def __init__(self, task: Task, checkpoint: Checkpoint, device: torch.device, probe: Sequence[Example]) -> None:
        self.task, self.checkpoint, self.device = task, checkpoint, device
        self.model = copy.deepcopy(task.model())
        load_into(self.model, checkpoint)
        self.trainable = trainable_names(self.model)
        self.model.eval().requires_grad_(False).to(device)
        if any(isinstance(module, nn.Conv2d) for module in self.model.modules()):
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        try:
            check_loss_function(task, self.model, probe, self.batch)
        except LossError as error:
            raise LossError(f"checkpoint {checkpoint.name}, first training rows: {error}") from error
        self.plan: LayerPlan = checked_plan(self.model, task.loss, self.batch(probe), self.trainable)
        self.representation = find_representation(task, self.model, self.batch(probe))
        self.outputs: Outputs = model_outputs(self, probe)

    def batch(self, examples: Sequence[Example]) -> Batch:
        """What `encode` and its like take."""
        return self.collated(examples)

    def collated(self, examples: Sequence[Example]) -> Batch:
        """What the task's functions take, on the device."""
        return tree_map(lambda x: x.to(self.device) if isinstance(x, Tensor) else x, self.task.collate(list(examples)))

    def encode(self, basis: Basis, batch: Batch, measure: Measure | None = None) -> tuple[Tensor, Tensor]:
        """Rows [batch, dimensions] and losses [batch], both float32.

        Raises:
            LossError: a loss or a gradient is NaN or infinite, or the loss is not one number per example.
        """
        parts: dict[str, Tensor] = {}
        losses = self.backpropagate(batch, partial(basis.add_use, parts), measure)
        basis.add_whole(parts, self.plan.stray_gradients(self.model, measure or self.task.loss, batch))
        rows = basis.assemble(parts, len(losses))
        check_finite(rows, "gradient")
        return rows, losses

    def encode_and_predict(self, basis: Basis, batch: Batch, represent: bool = False) -> Encoded:
        """As `encode`, with the task's predictions and, if wanted, representations, mostly from the same pass."""
        with ExitStack() as passes:
            uses = passes.enter_context(recorded_inputs(self._represented_layers())) if represent else []
            if self.task.has_predict:
                passes.enter_context(replayed_forward(self.model))
            recording = self.outputs.recording()
            rows, losses = self.encode(basis, batch, recording)
            known = None if recording is None else predictions_of(recording.calls)
            if known is None or len(known) != len(rows):
                known = self.predict(batch) if self.predicts else None
        return Encoded(rows, losses, known, self._representations(uses, batch) if represent else None)

    def represent(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Last hidden representations [batch, features] and losses [batch], both float32, without gradients.

        Raises:
            LossError: one of them is NaN or infinite.
        """
        with recorded_inputs(self._represented_layers()) as uses:
            losses = self.losses(batch)
        return self._representations(uses, batch), losses

    def _represented_layers(self) -> list[nn.Module]:
        found = self.representation
        return [] if found is None or found.layer is None else [found.layer]

    def _representations(self, uses: Uses, batch: Batch) -> Tensor:
        """uses: of the represented layer; the first is that of the forward pass."""
        with torch.no_grad():
            found = (uses[0][1] if uses else self.task.representation(self.model, batch)).float()
        check_finite(found, "representation")
        return found

    @property
    def predicts(self) -> bool:
        """Whether predictions are known: from the task's predict, or the outputs that its loss takes."""
        return self.task.has_predict or self.outputs.from_loss

    def predict(self, batch: Batch) -> Tensor:
        """int64 [batch] predicted classes, or float [batch] predicted values. Call it only where it `predicts`.

        Raises:
            TaskError: task.predict returns something else than one prediction an example.
        """
        if not self.task.has_predict:
            return self.outputs.predicted(self.model, self.trainable, batch)
        with torch.no_grad():
            return self.outputs.predictions(self.task.predict(self.model, batch))

    def label(self, example: Example) -> Label | None:
        """The task's label of an example, as whole number where it is a class."""
        return self.outputs.label(self.task.label(example))

    def losses(self, batch: Batch) -> Tensor:
        """Checked losses float32 [batch], without gradients."""
        with torch.no_grad():
            losses = self.task.loss(self.model, batch)
        check_losses(losses, None)
        return losses.float()

    def backpropagate(self, batch: Batch, on_use: Any, measure: Measure | None = None) -> Tensor:
        """Checked losses float32 [batch]; every layer's factors go to `on_use`."""

        def in_single(layer: Layer, x: Tensor, d: Tensor) -> None:  # bases and rows are float32
            on_use(layer, x.float() if x.dtype == torch.float64 else x, d.float() if d.dtype == torch.float64 else d)

        losses = backpropagate(self.model, measure or self.task.loss, batch, self.plan.tapped, in_single)
        check_losses(losses, None)
        return losses.float()
