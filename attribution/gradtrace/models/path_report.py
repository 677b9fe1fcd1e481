"""How each layer of a model is differentiated, in words; and what is slow, told once before much time is spent."""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from gradtrace.errors import SlowPathWarning
from gradtrace.gradients.plan import GradientPath
from gradtrace.gradients.reference import autograd_gradients
from gradtrace.models.gradient_model import GradientModel
from gradtrace.task import Example

_TIMED = 3  # examples


class LayerLine(NamedTuple):
    """A layer of a model.

    kind: class of its module; of a parameter by itself, of the module that holds it.
    path: how its per-example gradients are computed.
    reason: why not faster, or what is unusual about its inputs; may be empty.
    """

    name: str
    kind: str
    parameters: int
    path: str
    reason: str


def layer_lines(model: GradientModel) -> list[LayerLine]:
    """All layers, in the model's order."""
    choice = model.examination.choice
    lines = []
    for layer in model.plan.layers:
        path = choice.paths[layer.names[0]]
        speed = "fast" if path in (GradientPath.FACTORS, GradientPath.CALLS) else path.value
        kind = type(model.model.get_submodule(layer.names[0].rpartition(".")[0])).__name__
        reasons = [choice.reasons.get(layer.names[0], "")]
        reasons += [choice.layouts[layer.name].value] if layer.name in choice.layouts else []
        lines.append(LayerLine(layer.name, kind, layer.size, speed, "; ".join(filter(None, reasons))))
    return lines


def summary(model: GradientModel) -> str:
    """One line: how many layers take which path, and with which labels an eigenbasis is fitted."""
    counts = Counter(line.path for line in layer_lines(model))
    paths = ", ".join(f"{count} {path}" for path, count in counts.items())
    return f"layers: {paths}; labels of the eigenbasis: {model.outputs.source} ({model.outputs.description})"


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
