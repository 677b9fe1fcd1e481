"""Losses of tokens."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from gradtrace.tasks.language.encoding import IGNORED


def at_least_single(logits: Tensor) -> Tensor:
    """Those of a model in half precision in float32: a log-probability takes more digits than they have."""
    return logits.float() if logits.dtype.itemsize < 4 else logits


def token_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The cross-entropy of each token, and 1 where it counts.

    Shapes: logits [batch, length, classes], labels [batch, length] -> [batch, length] each
    """
    losses = F.cross_entropy(
        at_least_single(logits).flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return losses.view_as(labels), (labels != IGNORED).to(losses.dtype)
