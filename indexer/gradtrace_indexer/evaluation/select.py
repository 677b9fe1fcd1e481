"""Choosing among the checkpoints of a training by their losses on training rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from gradtrace.checkpoints import Checkpoint
from gradtrace.checkpoints.checkpoints_json import CheckpointIndex, FileEntry
from gradtrace.checkpoints.selection import least_falls, refusals
from gradtrace.data.dataset import fetch
from gradtrace.data.guards import check_dataset
from gradtrace.devices import pick_device
from gradtrace.errors import MissingLibraryError
from gradtrace.models.gradient_model import GradientModel
from gradtrace.task import Task


def mean_losses(
    task: Task,
    checkpoints: Sequence[Checkpoint],
    rows: int = 1000,
    batch_size: int = 128,
    seed: int = 0,
    device: str = "auto",
) -> list[float]:
    """The mean loss at each checkpoint, in eval mode, on the same random training rows (all, where there are fewer).

    Raises:
        CheckpointError: weights are missing or do not fit the model.
        TaskError: the data set or the loss is not as `Task` asks.
    """
    total = check_dataset(task)
    chosen = np.sort(np.random.default_rng(seed).choice(total, min(rows, total), replace=False)).tolist()
    batches = [fetch(task.train, chosen[start : start + batch_size]) for start in range(0, len(chosen), batch_size)]
    where = torch.device(pick_device(device))
    means = []
    for checkpoint in checkpoints:
        model = GradientModel(task, checkpoint, where, batches[0][:2])
        means.append(sum(float(model.losses(model.batch(batch)).sum()) for batch in batches) / len(chosen))
    return means


def selection_index(checkpoints: Sequence[Checkpoint], chosen: Sequence[int], directory: Path) -> CheckpointIndex:
    """A checkpoints.json of the chosen ones, for `directory`, where their files are."""
    first = checkpoints[0]
    return CheckpointIndex(
        optimizer=first.optimizer,
        batch_size=first.batch_size,
        checkpoints=[
            FileEntry(
                file=checkpoint.path.relative_to(directory).as_posix(),
                step=checkpoint.step,
                learning_rate=checkpoint.learning_rate,
                learning_rate_sum=checkpoint.learning_rate_sum,
            )
            for checkpoint in (checkpoints[position] for position in chosen)
        ],
    )


def explained(checkpoints: Sequence[Checkpoint], losses: Sequence[float], chosen: Sequence[int]) -> Iterator[str]:
    """A line for each checkpoint: its step, its loss, and why it was chosen or not."""
    falls = least_falls(losses)
    for position, refusal in enumerate(refusals(losses)):
        if position == len(losses) - 1:
            why = "chosen: the last, whose predictions answers show"
        elif position in chosen:
            why = f"chosen: the loss falls steadily, by {falls[position]:.2g} at least on either side"
        else:
            why = f"left out: {refusal or 'the loss falls more around the chosen ones beside it'}"
        yield f"{checkpoints[position].step:>9}  {losses[position]:<10.4g}  {why}"


def plot_selection(
    checkpoints: Sequence[Checkpoint], losses: Sequence[float], chosen: Sequence[int], path: Path
) -> None:
    """Draw the losses and the chosen checkpoints to a file of any kind that matplotlib writes.

    Raises:
        MissingLibraryError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingLibraryError("matplotlib", "plots") from error
    steps = [checkpoint.step for checkpoint in checkpoints]
    figure = Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, losses, ".-", color="grey", label="mean training loss")
    axes.plot([steps[p] for p in chosen], [losses[p] for p in chosen], "o", color="tab:red", label="selected")
    axes.set(xlabel="optimizer step", ylabel="loss", ylim=(0, None) if min(losses) > 0 else None)
    axes.legend()
    figure.savefig(path, dpi=100)
