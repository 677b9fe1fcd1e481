"""Telling what keeps a model from the fast path, once, before much time is spent."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence

from gradtrace.encoder import GradientModel
from gradtrace.errors import SlowPathWarning
from gradtrace.plan import GradientPath
from gradtrace.reference import autograd_gradients
from gradtrace.task import Example

_TIMED = 3  # examples


def warn_of_slow_paths(model: GradientModel, examples: Sequence[Example]) -> None:
    """Warn where parameters are differentiated one example at a time."""
    text = slow_path(model, examples)
    if text is not None:
        warnings.warn(text, SlowPathWarning, stacklevel=3)


def slow_path(model: GradientModel, examples: Sequence[Example]) -> str | None:
    """What is slow, how slow, why, and the remedy; None where nothing is differentiated one example at a time."""
    slow = model.plan.strays[GradientPath.ALONE]
    if not slow:
        return None
    names = [layer.names[0] for layer in slow]
    batch = model.batch(examples[:_TIMED])
    started = time.perf_counter()
    for position in range(len(batch)):
        autograd_gradients(model.model, model.task.loss, batch.alone(position), names)
    rate = len(batch) / (time.perf_counter() - started)
    reason = model.examination.choice.reasons.get(names[0], "no faster path is right for it")
    return (
        f"slow path: {len(slow)} of {len(model.plan.layers)} layers ({', '.join(names[:3])}{' ...' * (len(slow) > 3)}) "
        f"are differentiated one example at a time, about {rate:.3g} rows a second, because every faster path "
        f"differs from autograd ({reason}). To leave them out, freeze them or set layers = "
        f'["!{names[0]}"] in the task'
    )
