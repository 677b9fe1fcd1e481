"""An index at a glance: its classes, losses and checkpoints."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gradtrace import Index
from gradtrace.contents import IndexContents
from gradtrace.tasks.features import coordinates
from gradtrace_client.browse_schemas import CheckpointLoss, LabelSummary, LossHistogram, Overview
from gradtrace_service.answers.browsed import browsed
from gradtrace_service.answers.documents import index_info
from gradtrace_service.answers.split_rows import SplitRows
from gradtrace_service.engine.work import each_alone

_MOST_LABELS = 1_000
_BINS = 40
_NARROWEST = 1e-6  # the lowest edge above zero, relative to the largest loss: what is below is one bin

Floats = NDArray[np.float64]


@each_alone
def overview(index: Index, request: None, waited_ms: float) -> Overview:
    """Answer GET /overview."""
    kept = browsed(index)
    kept.begin(kept.checkpoint_losses)
    known, place = kept.split("train"), coordinates(index.task)
    return Overview(
        index=index_info(index),
        labels=_labels(index, known),
        loss_by_checkpoint=_losses(index.contents, kept.checkpoint_losses.means),
        loss_histogram=_histogram(known.columns["loss"][known.present]),
        coordinates=None if place is None else list(place),
        pending=kept.checkpoint_losses.pending,
    )


def _labels(index: Index, known: SplitRows) -> list[LabelSummary]:
    """Of the classes that have the most rows, in their order; none where labels are values."""
    if "label" not in known.whole:
        return []
    labels, losses = known.columns["label"][known.present], known.columns["loss"][known.present]
    correct = known.columns["correct"][known.present]
    labels, losses, correct = (column[~np.isnan(labels)] for column in (labels, losses, correct))
    numbers, at = np.unique(labels, return_inverse=True)
    rows, sums, rights = (np.bincount(at, weights) for weights in (None, losses, correct))
    largest = np.sort(np.argsort(-rows, kind="stable")[:_MOST_LABELS])
    return [
        LabelSummary(
            label=int(numbers[n]),
            label_name=index.task.label_name(int(numbers[n])),
            rows=int(rows[n]),
            correct=None if np.isnan(rights[n]) else int(rights[n]),
            mean_loss=float(sums[n] / rows[n]),
        )
        for n in largest
    ]


def _losses(contents: IndexContents, means: Floats) -> list[CheckpointLoss]:
    return [
        CheckpointLoss(name=entry.name, step=entry.step, run=entry.run, mean_loss=None if np.isnan(mean) else mean)
        for entry, mean in zip(contents.manifest.checkpoints, means.tolist(), strict=True)
    ]


def _histogram(losses: Floats) -> LossHistogram | None:
    """Most losses are small: where none is negative, each bin is wider than the one before by the same factor, from
    the smallest loss on."""
    losses = losses[np.isfinite(losses)]
    if not len(losses):
        return None
    bins: int | Floats = _BINS
    if losses.min() >= 0 and losses.max() > 0:
        largest = float(losses.max())
        smallest, lowest = float(losses.min()), _NARROWEST * largest
        if not lowest <= smallest < largest:
            bins = np.concatenate([[0.0], np.geomspace(lowest, largest, _BINS)])
        else:
            bins = np.geomspace(smallest, largest, _BINS + 1)
            bins[0] = smallest
        bins[-1] = largest  # rounding may leave it below
    counts, edges = np.histogram(losses, bins)
    return LossHistogram(edges=edges.tolist(), counts=counts.tolist())
