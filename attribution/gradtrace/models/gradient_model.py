"""From a batch to rows: the per-example gradients of one checkpoint in the coordinates of a basis."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

from gradtrace.basis.basis import Basis
from gradtrace.checkpoints.loading import Checkpoint, load_into
from gradtrace.data.batches import ExampleBatch, Measure, collate, values_of
from gradtrace.data.dataset import fetch
from gradtrace.data.guards import check_finite, check_losses, check_some_finite
from gradtrace.data.sample import SAMPLE_ROWS, Sample, sample_of, varied_rows
from gradtrace.errors import LossError, SharedPositionsError, UnsupportedLayerError
from gradtrace.gradients.capture import OnUse, backpropagate
from gradtrace.gradients.examination import examine
from gradtrace.gradients.plan import LayerPlan, PathChoice, plan_layers, trainable_names
from gradtrace.gradients.reference import autograd_gradients, stray_gradients
from gradtrace.layers import Layer, real_values
from gradtrace.models.outputs import Outputs, model_outputs, predictions_of
from gradtrace.models.replay import replayed_forward
from gradtrace.models.representations import Uses, find_representation, recorded_inputs
from gradtrace.task import Batch, Example, Label, Task

MeasureName = Literal["loss", "measurement", "prediction"]  # the last: the negative predicted value


class Encoded(NamedTuple):
    """Of a batch: rows [batch, dimensions], losses [batch], predictions [batch], representations [batch, features]."""

    rows: Tensor
    losses: Tensor
    predictions: Tensor | None
    representations: Tensor | None


class Examination(NamedTuple):
    """What was found out of a task on a sample of rows; it holds at every checkpoint.

    choice: how the parameters are differentiated.
    outputs: the labels that the model would give, and its predictions.
    measurement: whether Task.measurement, if there is one, could be tried: training examples or task.query have what it
        needs.
    varied: whether the sample had examples of several sizes, so that padding was seen to change nothing.
    """

    choice: PathChoice
    outputs: Outputs
    measurement: bool
    varied: bool


class GradientModel:
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
        self.task, self.checkpoint, self.device = private_copy(task), checkpoint, device
        self.model = fresh_model(self.task, probe)
        load_into(self.model, checkpoint)
        self.trainable = trainable_names(self.model, self.task.layers)
        self.model.eval().requires_grad_(False).to(device)
        if any(isinstance(module, nn.Conv2d) for module in self.model.modules()):
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        sample = sample_of(self.task, range(len(probe)) if rows is None else rows, probe, device, largest)
        try:
            if examination is None:
                measured = self._measured_samples(sample)
                choice = examine(self.model, measured, self.trainable)
                examination = Examination(
                    choice,
                    model_outputs(self, probe[:largest]),
                    measurement=self.task.measurement in [measure for measure, _ in measured],
                    varied=not sample.examples.uniform,
                )
            else:
                check_some_finite(self.model, self.task.loss, sample)
        except LossError as error:
            raise LossError(f"checkpoint {checkpoint.name}: {error}") from error
        self.examination = examination._replace(outputs=examination.outputs.with_loss(self.task.loss))
        self.plan: LayerPlan = plan_layers(self.model, examination.choice)
        collated = [sample.batch(positions).collated for positions in sample.batches]
        self.representation = find_representation(self.task, self.model, collated)

    @property
    def outputs(self) -> Outputs:
        return self.examination.outputs

    def _measured_samples(self, sample: Sample) -> list[tuple[Measure, Sample]]:
        """Everything that is differentiated: the loss of training examples; the measurement, of queries where training
        examples do not have what it needs; and predicted values."""
        measured: list[tuple[Measure, Sample]] = [(self.task.loss, sample)]
        if self.task.has_measurement:
            samples = (sample, self._query_sample(len(sample.rows)))
            tried = next((own for own in samples if own is not None and self._works(self.task.measurement, own)), None)
            measured += [(self.task.measurement, tried)] if tried is not None else []
        if self.task.has_predict and self._predicts_values(sample):
            measured.append((self._negative_prediction, sample))
        return measured

    def _query_sample(self, count: int) -> Sample | None:
        queries = self.task.query
        if queries is None or not len(queries):
            return None
        rows = list(range(min(count, len(queries))))
        return sample_of(self.task, rows, fetch(queries, rows), self.device)

    def _works(self, measure: Measure, sample: Sample) -> bool:
        try:
            with torch.no_grad():
                return isinstance(measure(self.model, sample.examples.alone(0).collated), Tensor)
        except Exception:  # it is for other examples
            return False

    def _predicts_values(self, sample: Sample) -> bool:
        if not self._works(self.task.predict, sample):
            return False
        with torch.no_grad():
            predicted = self.task.predict(self.model, sample.examples.alone(0).collated)
        return predicted.is_floating_point() and predicted.shape in ((1,), (1, 1))

    def batch(self, examples: Sequence[Example]) -> ExampleBatch:
        """Collated and on the device."""
        return collate(self.task, examples, self.device)

    def collated(self, examples: Sequence[Example]) -> Batch:
        """What the task's functions take, on the device."""
        return self.batch(examples).collated

    def measure(self, name: MeasureName) -> Measure:
        """What is explained of a query, by this model's own copy of the task."""
        if name == "prediction":
            return self._negative_prediction
        return self.task.measurement if name == "measurement" else self.task.loss

    def _negative_prediction(self, model: nn.Module, batch: Batch) -> Tensor:
        return -self.task.predict(model, batch).flatten()

    def encode(self, basis: Basis, batch: ExampleBatch, measure: Measure | None = None) -> tuple[Tensor, Tensor]:
        """Rows [batch, dimensions] and losses [batch], both float32.

        Raises:
            LossError: a loss or a gradient is NaN or infinite, or the loss is not one number per example.
        """
        if measure == self.task.measurement and self.task.has_measurement and not self.examination.measurement:
            return self.encode_by_autograd(basis, batch, measure)
        try:
            return self._encode(basis, batch, measure or self.task.loss)
        except SharedPositionsError:
            if len(batch) == 1:
                raise
            alone = [self._encode(basis, batch.alone(n), measure or self.task.loss) for n in range(len(batch))]
            return torch.cat([rows for rows, _ in alone]), torch.cat([losses for _, losses in alone])

    def encode_by_autograd(self, basis: Basis, batch: ExampleBatch, measure: Measure) -> tuple[Tensor, Tensor]:
        """The same by plain autograd, one example at a time: whatever the measure, but slowly."""
        names = [name for layer in self.plan.layers for name in layer.names]
        losses, rows = [], []
        for position in range(len(batch)):
            value, gradients = autograd_gradients(self.model, measure, batch.alone(position), names)
            check_losses(value, 1)
            known = {name: real_values(own).float() for name, own in gradients.items() if own is not None}
            coordinates = {
                layer.name: basis.layers[layer.name].of_gradient(layer.from_parameters(known)[None])
                for layer in self.plan.layers
                if layer.name in basis.layers
            }
            rows.append(basis.assemble(coordinates, 1))
            losses.append(value.detach().float())
        check_finite(torch.cat(rows), "gradient")
        return torch.cat(rows), torch.cat(losses)

    def _encode(self, basis: Basis, batch: ExampleBatch, measure: Measure) -> tuple[Tensor, Tensor]:
        coordinates: dict[str, Tensor] = {}
        losses = self.backpropagate(batch, partial(basis.add_use, coordinates), measure)
        strays: dict[str, list[Tensor]] = {}
        for layer, _, gradient in stray_gradients(self.model, measure, batch, self.plan):
            if layer.name in basis.layers:
                strays.setdefault(layer.name, []).append(basis.layers[layer.name].of_gradient(gradient))
        rows = basis.assemble(coordinates | {name: torch.cat(parts) for name, parts in strays.items()}, len(losses))
        check_finite(rows, "gradient")
        return rows, losses

    def encode_and_predict(self, basis: Basis, batch: ExampleBatch, represent: bool = False) -> Encoded:
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

    def represent(self, batch: ExampleBatch) -> tuple[Tensor, Tensor]:
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

    def _representations(self, uses: Uses, batch: ExampleBatch) -> Tensor:
        """uses: of the represented layer; the first is that of the forward pass."""
        with torch.no_grad():
            found = (uses[0][1] if uses else self.task.representation(self.model, batch.collated)).float()
        check_finite(found, "representation")
        return found

    @property
    def predicts(self) -> bool:
        """Whether predictions are known: from the task's predict, or the outputs that its loss takes."""
        return self.task.has_predict or self.outputs.from_loss

    def predict(self, batch: ExampleBatch) -> Tensor:
        """int64 [batch] predicted classes, or float [batch] predicted values. Call it only where it `predicts`.

        Raises:
            TaskError: task.predict returns something else than one prediction an example.
        """
        if not self.task.has_predict:
            return self.outputs.predicted(self.model, self.trainable, batch.collated)
        with torch.no_grad():
            return self.outputs.predictions(self.task.predict(self.model, batch.collated))

    def label(self, example: Example) -> Label | None:
        """The task's label of an example, as whole number where it is a class."""
        return self.outputs.label(self.task.label(example))

    def losses(self, batch: ExampleBatch) -> Tensor:
        """Checked losses float32 [batch], without gradients."""
        losses = values_of(self.task.loss, self.model, batch.collated)
        check_losses(losses, None)
        return losses.float()

    def backpropagate(self, batch: ExampleBatch, on_use: OnUse, measure: Measure | None = None) -> Tensor:
        """Checked losses float32 [batch]; every layer's factors go to `on_use`."""

        def in_single(layer: Layer, x: Any, d: Tensor) -> None:  # bases and rows are float32
            on_use(layer, x.float() if x.dtype == torch.float64 else x, d.float() if d.dtype == torch.float64 else d)

        losses = backpropagate(self.model, measure or self.task.loss, batch, self.plan, in_single)
        check_losses(losses, len(batch))
        return losses.float()


def open_models(
    task: Task, checkpoints: Sequence[Checkpoint], device: torch.device, rows: NDArray[np.int64] | None = None
) -> list[GradientModel]:
    """A task's models at several checkpoints, examined at the last one on some of the rows (None: of all).

    Raises as `GradientModel`."""
    probe_rows = varied_rows(task, among=rows)
    probe = fetch(task.train, probe_rows)
    last = GradientModel(task, checkpoints[-1], device, probe, rows=probe_rows)
    others = [
        GradientModel(task, checkpoint, device, probe, rows=probe_rows, examination=last.examination)
        for checkpoint in checkpoints[:-1]
    ]
    return [*others, last]


def private_copy(task: Task) -> Task:
    """A task that shares no attribute that it may set or fill with the original: what a loss keeps there for later
    would be overwritten by another thread. Data sets, tensors and modules are shared, since they may be large."""
    memo = {id(value): value for value in _shared(vars(task))}
    try:
        return copy.deepcopy(task, memo)
    except Exception:  # it holds something that cannot be copied, such as an open file
        return copy.copy(task)


def _shared(value: Any) -> Iterator[Any]:
    for leaf in tree_leaves(value):
        is_data = hasattr(leaf, "__getitem__") and hasattr(leaf, "__len__")  # arrays, tables, data sets
        if isinstance(leaf, Tensor | nn.Module) or (is_data and not isinstance(leaf, str | bytes)):
            yield leaf


def fresh_model(task: Task, probe: Sequence[Example]) -> nn.Module:
    """A copy of the task's model, with the sizes of lazy modules taken from a forward pass.

    Tensors that hooks of the model compute from its parameters (weight_norm, pruning) are computed anew by the copy.
    """
    model = task.model()
    model = getattr(model, "_orig_mod", model)  # of torch.compile, whose layers cannot be watched
    _check_copyable(model)
    derived = {
        id(value): value.detach().clone()
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and value.grad_fn is not None
    }
    model = copy.deepcopy(model, dict(derived))
    if any(is_lazy(value) for value in [*model.parameters(), *model.buffers()]):
        with torch.no_grad():
            task.loss(model.eval(), task.collate(list(probe)))
    return model


def _check_copyable(model: nn.Module) -> None:
    """Raises UnsupportedLayerError for what a copy would lose, or share with the original, without a word."""
    for name, module in model.named_modules():
        cells = getattr(vars(module).get("forward"), "__closure__", None) or ()
        if any(isinstance(cell.cell_contents, nn.Module) for cell in cells):
            raise UnsupportedLayerError(
                f"the forward of {name or 'the model'} was replaced by a function that holds a module of its own, "
                "which a copy of the model would go on using: override forward in a class, or use types.MethodType"
            )
    hooked = [name for name, parameter in model.named_parameters() if parameter._backward_hooks]
    if hooked:
        raise UnsupportedLayerError(
            f"{hooked[0]} has a hook on its gradient (register_hook), which per-example gradients would miss: remove "
            "it in Task.model"
        )
