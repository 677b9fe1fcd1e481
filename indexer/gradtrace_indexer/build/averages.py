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
from gradtrace.checkpoints.learning_rates import stretch_sums
from gradtrace.checkpoints.second_moments import SecondMoments, moments_path
from gradtrace.errors import CheckpointError
from gradtrace.task import Task
from gradtrace_indexer.build.builder import second_moments
from gradtrace_indexer.writing.files import write_file, write_through


def with_averages(directory: Path, task: Task, checkpoints: Sequence[Checkpoint], segments: int) -> list[Checkpoint]:
    """Averages over segments as even as can be, written to `directory/averages`, and then the last checkpoint itself.

    Buffers, such as BatchNorm's statistics, are averaged as weights are, and whole numbers taken from the segment's
    last checkpoint. An average has the step of the last, the sum of learning rates up to there, and the mean rate of
    the segment's steps as its learning rate; second moments are averaged where all have them.

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
        moments = [second_moments(checkpoint, task) for checkpoint in segment]
        kept = [found for found in moments if found is not None]
        if len(kept) == len(segment):
            by_name = _mean(found.by_name for found in kept)
            mean = SecondMoments(by_name, kept[-1].beta2, kept[-1].eps)
            write_through(directory, moments_path(Path(name)).as_posix(), mean.save)
        state = _mean(checkpoint.load() for checkpoint in segment)
        write_file(directory, name, safetensors.torch.save(state))
    return replace(last, path=directory / name, learning_rate=rate, kind="average")


def _mean(states: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Of tensors by name; of whole numbers the last."""
    sums: dict[str, Tensor] = {}
    count = 0
    for state in states:
        count += 1
        for name, value in state.items():
            added = value.is_floating_point() and name in sums
            sums[name] = sums[name] + value.double() if added else value
    return {
        name: (sums[name] / count).to(last.dtype) if last.is_floating_point() else last.clone()
        for name, last in state.items()
    }
