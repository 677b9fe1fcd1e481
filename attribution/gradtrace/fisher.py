"""Labels drawn from the model's own predictions, for the Fisher information (Kunstner et al. 2019 tell why)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from gradtrace import random_numbers
from gradtrace.basis import Basis
from gradtrace.encoder import GradientModel
from gradtrace.full_gradients import full_gradients
from gradtrace.spectral import squares
from gradtrace.task import Batch, Example, Label


def class_probabilities(scores: Tensor) -> Tensor:
    """[batch, classes] probabilities from scores that are logits, log-probabilities or probabilities already."""
    sums = scores.sum(1)
    if bool((scores >= 0).all()) and bool(torch.allclose(sums, torch.ones_like(sums), atol=1e-4)):
        return scores
    return scores.float().softmax(1)


def fisher_batches(model: GradientModel, samples: Iterable[Sequence[Example]], seed: int) -> Iterator[Batch]:
    """The samples with labels drawn from the model's predictions; with their own labels if the task predicts nothing.

    The same seed and samples give the same labels.
    """
    for number, examples in enumerate(samples):
        batch = model.batch(examples)
        if model.task.has_predict:
            labels = _draw_labels(model, batch, examples, seed, number)
            batch = model.batch([model.task.with_label(e, y) for e, y in zip(examples, labels, strict=True)])
        yield batch


def _draw_labels(
    model: GradientModel, batch: Batch, examples: Sequence[Example], seed: int, stream: int
) -> list[Label]:
    with torch.no_grad():
        predicted = model.task.predict(model.model, batch)
        if predicted.dim() == 2 and predicted.shape[1] > 1:
            chances = class_probabilities(predicted).double().cumsum(1)  # [batch, classes]
            integers = random_numbers.random_integers(seed, stream, 0, len(examples), chances.device)
            uniforms = ((integers >> 11) & ((1 << 53) - 1)).double() / 2**53
            return (chances / chances[:, -1:] <= uniforms[:, None]).sum(1).tolist()
        if not predicted.is_floating_point():  # predicted classes without scores: nothing to draw from
            return predicted.flatten().tolist()
        values: list[Label] = predicted.flatten().double().tolist()
        noise = random_numbers.gaussian(seed, stream, 0, len(examples)).tolist()
        spread = _noise_scale(model, examples, values)
        return [value + scale * z for value, scale, z in zip(values, spread, noise, strict=True)]


def _noise_scale(model: GradientModel, examples: Sequence[Example], values: Sequence[Label]) -> list[float]:
    """Standard deviation of the Gaussian whose negative log-likelihood is the loss: c (f - y)^2 has 1 / sqrt(2 c)."""
    task = model.task
    at = [
        task.loss(
            model.model, model.batch([task.with_label(e, y + shift) for e, y in zip(examples, values, strict=True)])
        )
        for shift in (0.0, 1.0)
    ]
    return (2 * (at[1] - at[0]).double().clamp_min(1e-12)).rsqrt().tolist()


def curvature(model: GradientModel, basis: Basis, samples: Iterable[Sequence[Example]], seed: int) -> dict[str, Tensor]:
    """Corrected eigenvalues of the Fisher at one checkpoint (George et al. 2018, Equation 8).

    Returns:
        eigenvalues: float32 [dimensions], mean square of each kept coordinate.
        layer_means: float32 [layers of the basis, in alphabetical order], mean eigenvalue over all coordinates of each.
    """
    total, count = torch.zeros(basis.dimensions, dtype=torch.float64), 0
    traces = dict.fromkeys(sorted(basis.layers), 0.0)
    for batch in fisher_batches(model, samples, seed):
        gradients = full_gradients(model, batch)
        parts: dict[str, Tensor] = {}
        for layer, uses in gradients.uses.items():
            for x, d in uses:
                basis.add_use(parts, layer, x, d)
        basis.add_strays(parts, gradients.strays)
        total += basis.assemble(parts, len(gradients.losses)).square().sum(0).double().cpu()
        count += len(gradients.losses)
        for layer, square in squares(gradients, {}).items():
            if layer.name in traces:
                traces[layer.name] += float(square.sum()) / layer.size
    return {
        "eigenvalues": (total / count).float(),
        "layer_means": torch.tensor(list(traces.values()), dtype=torch.float32) / count,
    }
