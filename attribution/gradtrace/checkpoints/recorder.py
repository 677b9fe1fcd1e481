"""CheckpointRecorder: saves a model's weights during training, with the learning rates that attribution needs."""

from __future__ import annotations

import csv
import io
import math
import warnings
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from gradtrace.checkpoints import recorder_notes
from gradtrace.checkpoints.checkpoints_json import INDEX_NAME, CheckpointIndex, FileEntry, read_index
from gradtrace.checkpoints.learning_rates import stretch_sums
from gradtrace.checkpoints.second_moments import moments_path, recorded_moments
from gradtrace.checkpoints.selection import weakest
from gradtrace.durable import TEMPORARY_SUFFIX, write_whole
from gradtrace.errors import CheckpointError
from gradtrace.store.manifest import Optimizer

LOSSES_NAME = "losses.csv"


class CheckpointRecorder:
    """Saves a model's weights every `every` optimizer steps, with step, learning rates and optimizer settings.

        with CheckpointRecorder("runs/1/checkpoints", every=500, batch_size=64) as recorder:
            for inputs, labels in loader:
                ...
                optimizer.step()
                recorder.step(model, optimizer, loss)  # before scheduler.step(), so that the rate read is the rate used
                scheduler.step()

    Leaving the block saves the final weights, unless the last step saved them or an error ended the block. Without
    `with`, call `finish()` after the training. A recorder that is deleted without either logs that weights are missing.

    The loss is optional. If it is given, every save adds a line to `losses.csv`: the step, and the mean loss since the
    previous save. With `keep=N`, only N checkpoints stay on disk: the newest, and those around which this mean falls
    fastest and steadily (see `selection`). A checkpoint is deleted once a new one is completely written. Choose a small
    `every` in this case: it decides how finely checkpoints are selected. With `optimizer_state=True` the second moments
    of Adam and its variants are saved beside each checkpoint, for methods that need them.

    Files are written under a temporary name, synced and renamed, and then `checkpoints.json` in the same way: if the
    process is killed at any moment, the directory holds every checkpoint that was finished. With `resume=True` the
    recorder continues after the last checkpoint in its directory; set `steps` if training resumes from another step.
    Without it, a directory with checkpoints is refused, so that two trainings do not mix. In distributed training, use
    the recorder in one process only.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        every: int,
        keep: int | None = None,
        batch_size: int | None = None,
        optimizer_state: bool = False,
        resume: bool = False,
    ) -> None:
        if every < 1:
            raise CheckpointError(f"every={every}: give the number of optimizer steps between checkpoints, 1 or more")
        if keep is not None and keep < 1:
            raise CheckpointError(f"keep={keep}: give the number of checkpoints to keep on disk, 1 or more")
        self.directory, self.every, self.keep = Path(directory), every, keep
        self.optimizer_state = optimizer_state
        self.directory.mkdir(parents=True, exist_ok=True)
        resumed = (self.directory / INDEX_NAME).exists()
        if resumed and not resume:
            raise CheckpointError(
                f"{self.directory} has the checkpoints of a training already; give another directory or delete it, or "
                "pass resume=True if this training continues from the last of them"
            )
        self._index = read_index(self.directory / INDEX_NAME) if resumed else CheckpointIndex()
        self._remove_leftovers()
        self._index.batch_size = batch_size or self._index.batch_size
        self.steps = max((entry.step for entry in self._index.checkpoints), default=0)
        self._losses = _read_losses(self.directory / LOSSES_NAME) if resumed else {}
        self._loss_sum: float | Tensor = 0.0
        self._loss_count = 0
        self._learning_rate: float | None = None
        self._rate_sum, self._summed_to = 0.0, 0  # the sum of the learning rates of steps 1 to _summed_to
        self._optimizer: torch.optim.Optimizer | None = None
        self._saved: int | None = None  # the last step whose weights were saved
        self._recorded = 0  # number of calls of `step`
        self._failed = False  # an error ended the `with` block: it says enough
        self._model: nn.Module | None = None  # of the last call of `step`, until `finish`

    def __enter__(self) -> CheckpointRecorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish()
        self._failed = kind is not None

    def __del__(self) -> None:
        # Without a model, the constructor raised, or the recorder was never used or is finished.
        if getattr(self, "_model", None) is not None and self._saved != self.steps and not self._failed:
            recorder_notes.note_unfinished(self._saved, self.steps)

    def finish(self, model: nn.Module | None = None) -> None:
        """Save the final weights, unless the last step saved them. Call it at the end of the training.

        Logs a warning if they are the only checkpoint, or if there is none. Raises as `save`.

        model: None: the model of the last step
        """
        model = self._model if model is None else model
        if model is None or not self._recorded:
            recorder_notes.note_no_step()
            return
        is_first = not self._index.checkpoints
        self.save(model)
        self._model = None
        if is_first:
            recorder_notes.note_interval(self._recorded, self.every)

    def step(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss: float | Tensor | None = None,
        learning_rate: float | None = None,
    ) -> None:
        """Count one optimizer step, and save the model's weights after every `every` steps.

        Args:
            loss: the training loss of the step, a number or a scalar tensor. A tensor on a GPU is read at the next save
                only.
            learning_rate: of the step, if the optimizer already has that of the next step.
        """
        self._optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
        group = main_group(self._optimizer, warn=self._learning_rate is None)
        rate = float(group["lr"]) if learning_rate is None else learning_rate
        if 0 < rate < math.inf:  # a schedule may end at zero: the last rate above zero is recorded then
            self._learning_rate = rate
        self._add_to_sum(rate)
        self._index.optimizer = _describe(self._optimizer, group)
        if loss is not None:
            self._loss_sum = self._loss_sum + (loss.detach() if isinstance(loss, Tensor) else loss)
            self._loss_count += 1
        if not self._recorded and not self.optimizer_state:
            recorder_notes.note_moments(self._optimizer)
        self._recorded, self._model = self._recorded + 1, model
        self.steps += 1
        if self.steps % self.every == 0:
            self.save(model)

    def save(self, model: nn.Module) -> None:
        """Save the weights after the latest step, unless they are saved.

        Raises:
            CheckpointError: `step` was never called with a learning rate above zero; `keep` is set and no loss was
                given; or `optimizer_state` is set and the optimizer has no second moments.
        """
        if self._learning_rate is None or self._optimizer is None:
            raise CheckpointError(
                "no step with a learning rate above zero has been recorded; call recorder.step(model, optimizer) after "
                "each optimizer.step() and before scheduler.step()"
            )
        if self._saved == self.steps:
            return
        path = self.directory / f"step-{self.steps:09d}.safetensors"
        self._write_losses()
        if self.optimizer_state:
            write_whole(moments_path(path), recorded_moments(model, self._optimizer).save)
        write_whole(path, lambda temporary: save_file(_tensors(model), temporary))
        kept = [entry for entry in self._index.checkpoints if entry.step != self.steps]
        entry = FileEntry(
            file=path.name, step=self.steps, learning_rate=self._learning_rate, learning_rate_sum=self._rate_sum
        )
        self._index.checkpoints = sorted([*kept, entry], key=lambda entry: entry.step)
        removed = self._remove_surplus()
        self._write(INDEX_NAME, self._index.content())
        for entry in removed:
            (self.directory / entry.file).unlink(missing_ok=True)
            moments_path(self.directory / entry.file).unlink(missing_ok=True)
        self._saved = self.steps

    def _add_to_sum(self, rate: float) -> None:
        """Add the rate of the current step to the sum, which begins with the recorded steps before a resumption."""
        if self._summed_to != self.steps:
            before = [entry for entry in self._index.checkpoints if entry.step <= self.steps]
            missing = self.steps - (before[-1].step if before else 0)
            self._rate_sum = float(stretch_sums(before).sum()) + missing * rate
            if missing:
                warnings.warn(
                    f"the learning rates of the {missing} steps up to step {self.steps} were not recorded; they are "
                    f"taken to be that of the next one, {rate:g}",
                    stacklevel=3,
                )
        self._rate_sum += rate if math.isfinite(rate) else 0.0
        self._summed_to = self.steps + 1

    def _write_losses(self) -> None:
        """Add the mean loss since the last save to losses.csv, and remove later steps, if training was set back."""
        if not self._loss_count:
            if self.keep is not None:
                raise CheckpointError("keep=... chooses by the loss: call recorder.step(model, optimizer, loss)")
            return
        self._losses = {step: loss for step, loss in self._losses.items() if step < self.steps}
        self._losses[self.steps] = float(self._loss_sum) / self._loss_count
        self._loss_sum, self._loss_count = 0.0, 0
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([("step", "loss"), *self._losses.items()])
        self._write(LOSSES_NAME, text.getvalue())

    def _write(self, name: str, text: str) -> None:
        write_whole(self.directory / name, lambda temporary: temporary.write_text(text, "utf-8"))

    def _remove_leftovers(self) -> None:
        """Delete what a killed training had not finished writing or deleting."""
        for unfinished in self.directory.glob(f"step-*{TEMPORARY_SUFFIX}"):
            unfinished.unlink()
        listed = {Path(entry.file).stem for entry in self._index.checkpoints}
        for path in self.directory.glob("step-*.safetensors") if self.keep is not None else ():
            if path.name.split(".")[0] not in listed:
                path.unlink()

    def _remove_surplus(self) -> list[FileEntry]:
        """Remove checkpoints from the list until `keep` are left. Returns those removed."""
        removed: list[FileEntry] = []
        while self.keep is not None and len(self._index.checkpoints) > self.keep:
            entries = self._index.checkpoints
            steps = sorted(self._losses.keys() | {entry.step for entry in entries})
            losses = [self._losses.get(step, math.nan) for step in steps]
            step = steps[weakest(losses, [steps.index(entry.step) for entry in entries])]
            removed += [entry for entry in entries if entry.step == step]
            self._index.checkpoints = [entry for entry in entries if entry.step != step]
        return removed


def _read_losses(path: Path) -> dict[int, float]:
    """Mean loss by step, in the order of the steps."""
    if not path.exists():
        return {}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return {int(line["step"]): float(line["loss"]) for line in csv.DictReader(file)}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged ({error!r}); restore it, or delete it to begin a new one") from None


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state dict in the form that safetensors requires: contiguous tensors that share no memory."""
    return {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in model.state_dict().items()
        if isinstance(value, Tensor)
    }


def main_group(optimizer: torch.optim.Optimizer, warn: bool) -> dict[str, Any]:
    """The parameter group with the most weights, whose learning rate is recorded: a checkpoint holds only one."""
    groups = optimizer.param_groups
    main = max(groups, key=lambda group: sum(weight.numel() for weight in group["params"]))
    if warn and len({float(group["lr"]) for group in groups}) > 1:
        warnings.warn(
            f"the optimizer's parameter groups have different learning rates; {float(main['lr']):g} is recorded, that "
            "of the group with the most weights, and TracIn will weigh the others' gradients by it too",
            stacklevel=3,
        )
    return main


def _describe(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> Optimizer:
    name = type(optimizer).__name__.lower()
    if group.get("decoupled_weight_decay") and "adamw" not in name:  # Adam(decoupled_weight_decay=True) is AdamW
        name = name.replace("adam", "adamw") if "adam" in name else "adamw"
    return Optimizer(name, float(group.get("momentum", 0.0)), float(group.get("weight_decay", 0.0)))
