"""CheckpointRecorder as a callback of Hugging Face's Trainer."""

from __future__ import annotations

from typing import Any

from gradtrace.checkpoints.recorder import CheckpointRecorder
from gradtrace.errors import MissingLibraryError

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as error:
    raise MissingLibraryError("transformers", "frameworks") from error


class RecorderCallback(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Records after each optimizer step, before the schedule moves on, in the main process only.

        recorder = CheckpointRecorder("runs/1/checkpoints", every=500)
        Trainer(..., callbacks=[RecorderCallback(recorder)]).train()

    The loss that the recorder sees is the one the Trainer logged last: keep `logging_steps` at most `every`.
    """

    def __init__(self, recorder: CheckpointRecorder) -> None:
        self.recorder = recorder
        self._loss: float | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.recorder.steps = state.global_step

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        self._loss = (logs or {}).get("loss", self._loss)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            self.recorder.step(kwargs["model"], kwargs["optimizer"], self._loss)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            self.recorder.finish(kwargs["model"])
