"""Averages of checkpoints' weights over segments of a training, for FAST-SOURCE (Bae et al. 2024)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import safetensors.torch
from torch import Tensor

from gradtrace.checkpoints import Checkpoint
from gradtrace.checkpoints.indexed import has_usable_moments
from gradtrace.checkpoints.learning_rates import stretch_sums
from gradtrace.checkpoints.second_moments import SecondMoments, moments_path
from gradtrace.errors import CheckpointError
from gradtrace.task import Task
from gradtrace_indexer.writing.files import write_file, write_through


def with_averages(directory: Path, task: Task, checkpoints: Sequence[Checkpoint], segments: int) -> list[Checkpoint]:
    """The averages of segments of nearly equal length, written to `directory/averages`; then the last checkpoint.

    Floating-point buffers, such as BatchNorm's statistics, are averaged as weights are; whole numbers are those of the
    segment's last checkpoint. An average has that checkpoint's step and sum of learning rates, and the mean rate of the
    segment's steps as its learning rate; second moments are averaged where all checkpoints have them.

    Raises:
        CheckpointError: more segments than checkpoints, or a checkpoint cannot be read.
        StoreError: the disk is full.
    """
    if not 1 <= segments <= len(checkpoints):
        raise CheckpointError(
            f"average_segments={segments}: give a number from 1 to that of the checkpoints, {len(checkpoints)}"
        )
    sums, averages, since = stretch_sums(checkpoints), [], 0
    for part in np.array_split(np.arange(len(checkpoints)), segments):
        segment = [checkpoints[number] for number in part]
        rate = float(sums[part].sum()) / max(segment[-1].step - since, 1)
        averages.append(_average(directory, task, segment, rate))
        since = segment[-1].step
    return [*averages, checkpoints[-1]]


def _average(directory: Path, task: Task, segment: Sequence[Checkpoint], rate: float) -> Checkpoint:
    last = segment[-1]
    digest = hashlib.sha256("".join(checkpoint.sha256() for checkpoint in segment).encode()).hexdigest()
    name = f"averages/steps-{segment[0].step:09d}-{last.step:09d}-{digest[:8]}.safetensors"
    if not (directory / name).exists():
        if all(has_usable_moments(checkpoint, task) for checkpoint in segment):
            kept = [checkpoint.second_moments(task.model()) for checkpoint in segment]
            moments = [each for each in kept if each is not None]
            mean = SecondMoments(_mean(each.by_name for each in moments), moments[-1].beta2, moments[-1].eps)
            write_through(directory, moments_path(Path(name)).as_posix(), mean.save)
        write_file(directory, name, safetensors.torch.save(_mean(checkpoint.load() for checkpoint in segment)))
    return replace(last, path=directory / name, learning_rate=rate, kind="average")


def _mean(states: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of each tensor; whole numbers are those of the last state."""
    sums: dict[str, Tensor] = {}
    count = 0
    for state in states:
        count += 1
        for name, value in state.items():
            if value.is_floating_point():
                sums[name] = sums.get(name, 0) + value.double()
    return {name: (sums[name] / count).to(last.dtype) if name in sums else last.clone() for name, last in state.items()}
