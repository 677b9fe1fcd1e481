"""InfluenceRecorder: records the effect of each training row on the model while it trains."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gradtrace.basis import Basis, two_sided_basis
from gradtrace.data.dataset import content_hash, fetch
from gradtrace.data.guards import check_dataset
from gradtrace.data.sample import sample_of
from gradtrace.errors import RecordingError, UnsupportedLayerError
from gradtrace.gradients.capture import training_hooks
from gradtrace.gradients.path_choice import examine
from gradtrace.gradients.plan import GradientPath, LayerPlan, PathChoice, plan_layers, trainable_names
from gradtrace.recording.contributions import Contributions, Probes
from gradtrace.recording.files import RECORDING_NAME, Recording, RecordingEntry, read_recording, write_recording
from gradtrace.recording.hydra import HydraRows, SgdStep, sgd_step
from gradtrace.task import Example, Task

_SAMPLE = 16  # examples of the first batch, on which the model is examined


class InfluenceRecorder:
    """Records the effect of each row of a batch on the model, from the training step's own forward and backward pass.

        recorder = InfluenceRecorder("runs/1/recording", task, probes=[test_set[3], test_set[7]])
        for rows, (inputs, labels) in loader:  # rows: the examples' numbers in task.train
            with recorder.step(model, optimizer, rows):
                loss = F.cross_entropy(model(inputs), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            scheduler.step()
        recording = recorder.finish()

    A row's contribution c_z to the step's gradient is computed from (a, d) of its activations in each layer, as the
    training computed them, with augmentation, dropout and batch statistics. The contributions of a batch add up to the
    gradient that the optimizer uses, which is checked at the first step. (Where BatchNorm mixes the batch, a row's
    contribution includes its effect on the losses of other rows.) The training's results do not change in any bit.

    The recorder records
    - for every row z, HyDRA's vector (Chen et al. 2021, without Hessian): d theta_T / d w_z, the derivative of the
      final weights with respect to the row's weight in the loss. Momentum and weight decay are followed exactly; the
      vector is projected by a seeded two-sided random basis (`hydra_rows`). `build_index(recording=...)` makes an index
      of these rows for method `hydra`;
    - for every probe z' and row z, TracIn by step (Pruthi et al. 2020, Section 3.2): the sum over steps t that use z of
      lr_t <grad loss(z'), c_z>, at the weights before the step. For a step on a single row, the fall of the probe's
      loss is measured instead (TracInIdeal, Section 3.1): if all steps are on single rows, the scores of all rows sum
      to the fall in the whole training (Lemma 3.1).

    One block holds one batch: one forward and backward pass, and one step of a `torch.optim.SGD`. To resume a training,
    save `state_dict` with its checkpoints. In distributed training, batches of other processes are not recorded.
    """

    def __init__(
        self,
        directory: str | Path,
        task: Task,
        *,
        dimensions: int = 1024,
        probes: Sequence[Example] = (),
        seed: int = 0,
    ) -> None:
        """
        Args:
            dimensions: of the HyDRA rows, at least one for each layer; 0: only scores on the probes.
            probes: examples with labels, as `task.train[i]` returns them; each costs a forward and backward pass at
                every step, and float64 [rows] in memory.

        Raises:
            RecordingError: there is nothing to record, or the directory has a recording.
            DatasetError: task.train is not a fixed, map-style data set.
        """
        self.directory = Path(directory)
        self.rows = check_dataset(task)
        if not dimensions and not probes:
            raise RecordingError("nothing to record: give dimensions of HyDRA rows, or probes")
        if (self.directory / RECORDING_NAME).exists():
            raise RecordingError(f"{self.directory} has a recording already: give another directory, or delete it")
        self.directory.mkdir(parents=True, exist_ok=True)
        self.steps = 0
        self._task, self._dimensions, self._seed = task, dimensions, seed
        self._probes = Probes(task, list(probes), self.rows)
        self._plan: LayerPlan | None = None
        self._model: nn.Module | None = None
        self._basis: Basis | None = None
        self._hydra: HydraRows | None = None
        self._restored: Mapping[str, Any] | None = None

    @contextmanager
    def step(self, model: nn.Module, optimizer: torch.optim.Optimizer, rows: Sequence[int] | Tensor) -> Iterator[None]:
        """While open, the model's passes are recorded as those of a batch of these training rows, in their order.

        Raises:
            RecordingError: a row is not in task.train, the optimizer is not SGD or does not take exactly one step, or
                the rows' contributions do not add up to its gradient.
            TaskError: the task's loss or model cannot be attributed.
        """
        numbers = self._checked(rows)
        optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
        plan = self._planned(model, sgd_step(optimizer), numbers)
        contributions = Contributions(len(numbers), self._basis, keep=bool(self._probes) or not self.steps)
        steps_before = self.steps
        if len(numbers) == 1:
            self._probes.update_losses()

        def before_step(stepped: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            if not steps_before:
                contributions.check_sum(model)
            self._record(numbers, contributions, sgd_step(stepped))

        handle = optimizer.register_step_pre_hook(before_step)
        try:
            with training_hooks(plan.modules, contributions.add):
                yield
        finally:
            handle.remove()
        if self.steps != steps_before + 1:
            raise RecordingError(
                f"{self.steps - steps_before} optimizer steps in one block: put the forward pass, loss.backward() and "
                "exactly one optimizer.step() of a batch into each `with recorder.step(...)`"
            )
        if len(numbers) == 1:
            self._probes.measure(int(numbers))

    def finish(self) -> Recording:
        """Write the recording to disk, after the last step. Returns the opened recording.

        Raises:
            RecordingError: no step was recorded.
        """
        if self._model is None:
            raise RecordingError("no step was recorded: open recorder.step(model, optimizer, rows) around each")
        entry = RecordingEntry(
            rows=self.rows,
            dimensions=self._basis.dimensions if self._basis else 0,
            requested=self._dimensions,
            seed=self._seed,
            steps=self.steps,
            probes=len(self._probes),
            weights_sha256=weights_sha256(self._model),
            files=[],
        )
        self._probes.update_losses()
        write_rows = self._hydra.write if self._hydra else None
        write_recording(self.directory, entry, self._probes.tensors(), self._basis, write_rows)
        if self._hydra is not None:
            self._hydra.remove_files()
        return read_recording(self.directory)

    def state_dict(self) -> dict[str, Any]:
        """The state for `load_state_dict` in a resumed training. Save it at once, together with the weights."""
        hydra = self._hydra.state() if self._hydra else None
        return {"steps": self.steps, "probes": self._probes.tensors(), "hydra": hydra}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`. Call it before the first step, on a recorder with the same arguments."""
        self._probes.restore(state["probes"])
        self._restored, self.steps = state, state["steps"]

    def _checked(self, rows: Sequence[int] | Tensor) -> Tensor:
        """The rows as int64 [batch] on the CPU. Raises RecordingError if task.train does not have them."""
        numbers = torch.as_tensor(rows, dtype=torch.int64).cpu()
        if numbers.dim() != 1 or not len(numbers) or int(numbers.min()) < 0 or int(numbers.max()) >= self.rows:
            raise RecordingError(
                f"rows must be the batch's numbers in task.train, from 0 to {self.rows - 1}, one for each example; got "
                f"{numbers.tolist()[:5]} ..."
            )
        return numbers

    def _planned(self, model: nn.Module, step: SgdStep, numbers: Tensor) -> LayerPlan:
        """The plan of the model's layers. At the first step, examines the model and prepares what is recorded."""
        if self._plan is not None and model is self._model:
            return self._plan
        if self._plan is not None:
            raise RecordingError("another model than before: give each training a recorder of its own")
        shadow_model, names = copy.deepcopy(model), trainable_names(model)
        shadow_model.eval().requires_grad_(False)
        rows, device = numbers[:_SAMPLE].tolist(), next(model.parameters()).device
        sample = sample_of(self._task, rows, fetch(self._task.train, rows), device)
        choice = examine(shadow_model, [(self._task.loss, sample)], names)
        _check_recordable(choice)
        plan = plan_layers(model, choice)
        if self._dimensions:
            if self._dimensions < len(plan.layers):
                raise RecordingError(f"dimensions must be at least {len(plan.layers)}, one for each layer")
            size = sum(layer.size for layer in plan.layers)
            self._basis = two_sided_basis(plan.layers, min(self._dimensions, size), self._seed).to(device)
            self._hydra = HydraRows(self.directory, self.rows, self._basis.dimensions, momentum=step.momentum > 0)
        if self._restored is not None and self._hydra is not None:
            self._hydra.restore(self._restored["hydra"])
        self._probes.begin(model, shadow_model, plan_layers(shadow_model, choice), plan, self._restored is not None)
        self._plan, self._model = plan, model
        return plan

    def _record(self, numbers: Tensor, contributions: Contributions, step: SgdStep) -> None:
        """Record a batch, just before the optimizer changes the weights."""
        if self._hydra is not None:
            self._hydra.add(numbers, contributions.coordinates().cpu(), step)
        if len(numbers) > 1:
            self._probes.approximate(numbers, contributions, step.rate)
        self.steps += 1


def weights_sha256(model: nn.Module) -> str:
    """Hexadecimal SHA-256 of all parameters with their names."""
    return content_hash(list(model.named_parameters()))


def _check_recordable(choice: PathChoice) -> None:
    """Raises UnsupportedLayerError for parameters whose gradients are not on path FACTORS with examples first."""
    others = [name for name, path in choice.paths.items() if path is not GradientPath.FACTORS]
    others += [name for name in choice.layouts if name not in others]
    if others or choice.whole_graph:
        raise UnsupportedLayerError(
            f"{', '.join(others) or 'the model'}: the training's own pass gives no per-example gradients of these "
            "parameters (no supported layer type, weights that layers share in different roles, or examples that are "
            "not in a layer's first dimension); freeze them (requires_grad_(False)), or use checkpoints instead of a "
            "recorder"
        )
