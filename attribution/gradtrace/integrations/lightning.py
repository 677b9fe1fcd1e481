"""CheckpointRecorder as a callback of Lightning's Trainer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gradtrace.checkpoints.recorder import CheckpointRecorder, main_group
from gradtrace.errors import CheckpointError, MissingLibraryError

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise MissingLibraryError("lightning", "frameworks") from error


class RecorderCallback(Callback):  # type: ignore[misc, unused-ignore]
    """Records after each optimizer step, with the rate of that step, in the main process only.

        recorder = CheckpointRecorder("runs/1/checkpoints", every=500)
        Trainer(..., callbacks=[RecorderCallback(recorder)]).fit(module, loader)

    The weights are those of the LightningModule; a task's model may be the module or the one it holds everything in.
    """

    def __init__(self, recorder: CheckpointRecorder) -> None:
        self.recorder = recorder
        self._learning_rate: float | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if len(trainer.optimizers) != 1:
            raise CheckpointError(
                f"the module has {len(trainer.optimizers)} optimizers and a checkpoint one learning rate: call "
                "CheckpointRecorder.step yourself, with the optimizer of the model to attribute"
            )
        self.recorder.steps = trainer.global_step

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self._learning_rate = float(main_group(optimizer, warn=False)["lr"])

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.is_global_zero and trainer.global_step > self.recorder.steps:  # not while accumulating gradients
            loss = outputs["loss"] if isinstance(outputs, dict) else outputs
            self.recorder.step(
                pl_module, trainer.optimizers[0], loss if isinstance(loss, Tensor) else None, self._learning_rate
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            self.recorder.finish(pl_module)
