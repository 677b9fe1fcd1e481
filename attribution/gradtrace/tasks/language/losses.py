"""Losses of tokens."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from gradtrace.layers.base import wide
from gradtrace.tasks.language.encoding import IGNORED


def token_losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The cross-entropy of each token, and 1 where it counts.

    Shapes: logits [batch, length, classes], labels [batch, length] -> [batch, length] each
    """
    losses = F.cross_entropy(wide(logits).flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none")
    return losses.view_as(labels), (labels != IGNORED).to(losses.dtype)
