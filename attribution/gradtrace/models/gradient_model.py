"""From a batch to rows: the per-example gradients of one checkpoint in the coordinates of a basis."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gradtrace.basis import Basis
from gradtrace.checkpoints import Checkpoint, load_into
from gradtrace.data.batches import ExampleBatch, Measure, values_of
from gradtrace.data.dataset import fetch
from gradtrace.data.guards import check_any_finite, check_finite, check_losses
from gradtrace.data.sample import SAMPLE_ROWS, sample_of, varied_rows
from gradtrace.errors import LossError, SharedPositionsError
from gradtrace.gradients.capture import OnUse, backpropagate
from gradtrace.gradients.loss_scale import loss_scale, scaled
from gradtrace.gradients.plan import LayerPlan, plan_layers
from gradtrace.gradients.reference import autograd_gradients, stray_gradients
from gradtrace.layers import Layer, real_values
from gradtrace.models.examination import Examination, examined
from gradtrace.models.outputs import Outputs, predictions_of
from gradtrace.models.parts import in_parts, joined_tensors, places_in
from gradtrace.models.representations import TASK_HOOK, Uses, find_representation, recorded_inputs
from gradtrace.models.task_model import TaskModel, copied, private_copy
from gradtrace.task import Example, Label, Task

R = TypeVar("R")  # the rows of a batch

_Call = tuple[tuple[Any, ...], dict[str, Any], Tensor, int]  # args, kwargs, output, version of the output


@dataclass(frozen=True, eq=False)
class Encoded(Generic[R]):
    """Of a batch: rows, as tensors [batch, dimensions], losses [batch], predictions [batch], and representations
    [batch, features]."""

    rows: R
    losses: Tensor
    predictions: Tensor | None
    representations: Tensor | None


class GradientModel(TaskModel):
    """A model with one checkpoint's weights, its layer plan, and the task around it. In eval mode, always.

    The task and its model are copied, never changed: a copy may be used by a thread of its own. Only module globals
    and attributes of the task's class are shared by the copies.

    Attributes:
        examination: of the task, on the probe or on an earlier one.
        trainable: names of the parameters that count.
        plan: their layers.
    """

    def __init__(
        self,
        task: Task,
        checkpoint: Checkpoint,
        device: torch.device,
        probe: Sequence[Example],
        *,
        rows: Sequence[int] | None = None,
        examination: Examination | None = None,
        largest: int = SAMPLE_ROWS,
    ) -> None:
        """
        Args:
            probe: training examples to examine the model on, and `rows` their numbers.
            examination: at another checkpoint of the task, which spares this one's.
            largest: the most examples that go through the model together.

        Raises:
            LossError: the task's loss or measurement is not one finite number per example that is its own.
            UnsupportedLayerError: no per-example gradients can be computed of a parameter.
            CheckpointError: the weights do not fit the model.
        """
        super().__init__(private_copy(task), device, probe)
        self.checkpoint = checkpoint
        load_into(self.model, checkpoint)
        self.model.eval().requires_grad_(False).to(device)
        if any(isinstance(module, nn.Conv2d) for module in self.model.modules()):
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        largest = min(largest, len(self.task.parts(probe)[0]))
        sample = sample_of(self.task, range(len(probe)) if rows is None else rows, probe, device, largest)
        try:
            if examination is None:
                examination = examined(self, sample, probe[:largest])
            check_any_finite(self.model, self.task.loss, sample)
        except LossError as error:
            raise LossError(f"checkpoint {checkpoint.name}: {error}") from error
        self.examination = examination._replace(outputs=examination.outputs.with_loss(self.task.loss))
        self.plan: LayerPlan = plan_layers(self.model, examination.choice)
        collated = [sample.batch(positions).collated for positions in sample.batches]
        self.representation = find_representation(self.task, self.model, collated)

    def clone(self) -> GradientModel:
        """The same model for another thread, without another examination."""
        clone = copy.copy(self)
        clone.task, clone.model = private_copy(self.task), copied(self.model)
        clone.examination = self.examination._replace(outputs=self.outputs.with_loss(clone.task.loss))
        clone.plan = plan_layers(clone.model, self.examination.choice)
        return clone

    @property
    def outputs(self) -> Outputs:
        return self.examination.outputs

    def encode(self, basis: Basis, batch: ExampleBatch, measure: Measure | None = None) -> tuple[Tensor, Tensor]:
        """Rows [batch, dimensions] and losses [batch], both float32.

        Raises:
            LossError: a loss or a gradient is NaN or infinite, or the loss is not one number per example.
        """
        if measure == self.task.measurement and self.task.has_measurement and not self.examination.measurement:
            return self.encode_by_autograd(basis, batch, measure)
        return in_parts(batch, measure or self.task.loss, partial(self._encode_together, basis), joined_tensors)

    def _encode_together(self, basis: Basis, batch: ExampleBatch, measure: Measure) -> tuple[Tensor, Tensor]:
        try:
            return self._encode(basis, batch, measure)
        except SharedPositionsError:
            if len(batch) == 1:
                raise
            alone = [self._encode(basis, batch.alone(n), measure) for n in range(len(batch))]
            return torch.cat([rows for rows, _ in alone]), torch.cat([losses for _, losses in alone])

    def encode_by_autograd(self, basis: Basis, batch: ExampleBatch, measure: Measure) -> tuple[Tensor, Tensor]:
        """The same by plain autograd, one example at a time: whatever the measure, but slowly."""
        names = [name for layer in self.plan.layers for name in layer.names]
        losses, rows = [], []
        for position in range(len(batch)):
            value, gradients = autograd_gradients(self.model, measure, batch.alone(position), names)
            check_losses(value, 1)
            present = {name: real_values(value).float() for name, value in gradients.items() if value is not None}
            coordinates: dict[str, Tensor] = {}
            basis.add_whole(coordinates, {layer: layer.from_parameters(present)[None] for layer in self.plan.layers})
            rows.append(basis.assemble(coordinates, 1))
            losses.append(value.detach().float())
        check_finite(torch.cat(rows), "gradient")
        return torch.cat(rows), torch.cat(losses)

    def _encode(self, basis: Basis, batch: ExampleBatch, measure: Measure) -> tuple[Tensor, Tensor]:
        coordinates: dict[str, Tensor] = {}
        losses = self.backpropagate(batch, partial(basis.add_use, coordinates), measure)
        strays: dict[str, list[Tensor]] = {}
        for layer, gradient in stray_gradients(self.model, measure, batch, self.plan.strays):
            if layer.name in basis.layers:
                strays.setdefault(layer.name, []).append(basis.layers[layer.name].of_gradient(gradient))
        rows = basis.assemble(coordinates | {name: torch.cat(slices) for name, slices in strays.items()}, len(losses))
        check_finite(rows, "gradient")
        return rows, losses

    def encode_and_predict(
        self, encode: Callable[[Measure | None], tuple[R, Tensor]], batch: ExampleBatch, represent: bool = False
    ) -> Encoded[R]:
        """What `encode` makes of a batch's gradients, rows and losses, with the task's predictions and, if wanted,
        representations, mostly from the same pass.

        encode: from the measure that is differentiated; None: the task's loss
        """
        with ExitStack() as passes:
            uses = passes.enter_context(recorded_inputs(self._represented_layers())) if represent else []
            if self.task.has_predict:
                passes.enter_context(_replayed_forward(self.model))
            recording = self.outputs.recording()
            rows, losses = encode(recording)
            known = None if recording is None else predictions_of(recording.calls)
            if known is None or len(known) != len(losses):
                known = self.predict(batch) if self.predicts else None
        return Encoded(rows, losses, known, self._representations(uses, batch) if represent else None)

    def represent(self, batch: ExampleBatch) -> tuple[Tensor, Tensor]:
        """Last hidden representations [batch, features] and losses [batch], both float32, without gradients.

        Raises:
            LossError: one of them is NaN or infinite.
        """
        with recorded_inputs(self._represented_layers()) as uses:
            losses = self.losses(batch)
        return self._representations(uses, batch), losses

    def _represented_layers(self) -> list[nn.Module]:
        if self.representation is None or self.representation.source == TASK_HOOK:
            return []
        return [self.model.get_submodule(self.representation.source)]

    def _representations(self, uses: Uses, batch: ExampleBatch) -> Tensor:
        """uses: of the represented layer; the first is that of the forward pass."""
        values = uses[0][1].float() if uses else self._from_hook(batch)
        check_finite(values, "representation")
        return values

    def _from_hook(self, batch: ExampleBatch) -> Tensor:
        parts = self.task.parts(batch.examples)
        with torch.no_grad():
            by_part = [
                self.task.representation(self.model, (batch if len(parts) == 1 else batch.chosen(part)).collated)
                for part in parts
            ]
        return (by_part[0] if len(parts) == 1 else joined_tensors(by_part, places_in(parts))).float()

    @property
    def predicts(self) -> bool:
        """Whether predictions are known: from the task's predict, or the outputs that its loss takes."""
        return self.task.has_predict or self.outputs.from_loss

    def predict(self, batch: ExampleBatch) -> Tensor:
        """int64 [batch] predicted classes, or float [batch] predicted values. Call it only where it `predicts`.

        Raises:
            TaskError: task.predict returns something else than one prediction an example.
        """
        return self.predict_by(self.model, batch)

    def predict_by(self, model: nn.Module, batch: ExampleBatch) -> Tensor:
        """As `predict`, of another model of the task, such as a retrained one, on whose device the batch is."""
        if not self.task.has_predict:
            return self.outputs.predicted(model, self.trainable, batch.collated)
        with torch.no_grad():
            return self.outputs.predictions(self.task.predict(model, batch.collated))

    def label(self, example: Example) -> Label | None:
        """The task's label of an example, as whole number where it is a class."""
        return self.outputs.label(self.task.label(example))

    def losses(self, batch: ExampleBatch) -> Tensor:
        """Checked losses float32 [batch], without gradients."""
        losses = values_of(self.task.loss, self.model, batch.collated)
        check_losses(losses, None)
        return losses.float()

    def backpropagate(
        self, batch: ExampleBatch, on_use: OnUse, measure: Measure | None = None, merge: bool = True
    ) -> Tensor:
        """Checked losses float32 [batch]; every layer's factors go to `on_use`. merge: see `capture.backpropagate`"""

        scale = loss_scale(self.model)

        def in_single(layer: Layer, x: Any, d: Tensor) -> None:
            x, d = _in_single(x), _in_single(d)
            if scale != 1:  # of a lookup, the gradient is x, and d are the tokens
                x, d = (x, d / scale) if d.is_floating_point() else (x / scale, d)
            on_use(layer, x, d)

        measured = scaled(measure or self.task.loss, scale)
        losses = backpropagate(self.model, measured, batch, self.plan, in_single, merge)
        check_losses(losses, len(batch))
        return losses.float() / scale


def _in_single(factor: Any) -> Any:
    """A layer's input or output gradient in float32, as bases and rows are; tokens, and what only a module takes, as
    they are."""
    halves = isinstance(factor, Tensor) and factor.dtype in (torch.float16, torch.bfloat16)
    return factor.float() if halves or factor.dtype == torch.float64 else factor


def open_models(
    task: Task,
    checkpoints: Sequence[Checkpoint],
    device: torch.device,
    rows: NDArray[np.int64] | None = None,
    examination: Examination | None = None,
) -> list[GradientModel]:
    """A task's models at several checkpoints, examined at the last one on some of the rows (None: of all), unless an
    examination of the task on such rows is given.

    Raises as `GradientModel`."""
    probe_rows = varied_rows(task, among=rows)
    probe = fetch(task.train, probe_rows)
    models: list[GradientModel] = []
    for checkpoint in reversed(checkpoints):
        known = models[0].examination if models else examination
        models.append(GradientModel(task, checkpoint, device, probe, rows=probe_rows, examination=known))
    return models[::-1]


@contextmanager
def _replayed_forward(model: nn.Module) -> Iterator[None]:
    """While open, the model answers its first call with gradients once more from memory when gradients are off.

    Only its `forward` is replaced meanwhile, so that a task finds everything else of the model as it is.
    """
    forward = model.forward
    first: list[_Call] = []

    def replay(*args: Any, **kwargs: Any) -> Any:
        if first and not torch.is_grad_enabled() and _is_call(first[0], args, kwargs):
            return first[0][2]
        output = forward(*args, **kwargs)
        if not first and torch.is_grad_enabled() and isinstance(output, Tensor):
            first.append((args, kwargs, output.detach(), output._version))
        return output

    model.forward = replay
    try:
        yield
    finally:
        del model.__dict__["forward"]


def _is_call(call: _Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether it had these very arguments, and its output was not changed in place since."""
    old_args, old_kwargs, output, version = call
    same = len(args) == len(old_args) and all(a is b for a, b in zip(args, old_args, strict=True))
    same = same and kwargs.keys() == old_kwargs.keys() and all(kwargs[k] is old_kwargs[k] for k in kwargs)
    return same and output._version == version
