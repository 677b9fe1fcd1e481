"""The curvature at a checkpoint: corrected eigenvalues of the Fisher information in the basis of an index."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from gradtrace.basis import Basis
from gradtrace.fitted.eigenbases import squares
from gradtrace.fitted.fisher_batches import fisher_batches
from gradtrace.models.full_gradients import full_gradients
from gradtrace.models.gradient_model import GradientModel
from gradtrace.store.manifest import Manifest
from gradtrace.store.tensor_files import load_tensors
from gradtrace.task import Example


def curvature(model: GradientModel, basis: Basis, samples: Iterable[Sequence[Example]], seed: int) -> dict[str, Tensor]:
    """Corrected eigenvalues of the Fisher at one checkpoint (George et al. 2018, Equation 8).

    Returns:
        eigenvalues: float32 [dimensions], mean square of each kept coordinate.
        layer_means: float32 [layers of the basis, in alphabetical order], mean eigenvalue over all coordinates of each.
    """
    total, count = torch.zeros(basis.dimensions, dtype=torch.float64), 0.0
    traces = dict.fromkeys(sorted(basis.layers), 0.0)
    for labelled in fisher_batches(model, samples, seed):
        gradients = full_gradients(model, labelled.batch, labelled.measure).times(labelled.weights.sqrt())
        parts: dict[str, Tensor] = {}
        for layer, uses in gradients.uses.items():
            for x, d in uses:
                basis.add_use(parts, layer, x, d)
        basis.add_whole(parts, gradients.strays)
        total += basis.assemble(parts, len(gradients.losses)).square().sum(0).double().cpu()
        count += float(labelled.weights.sum())
        for layer, square in squares(gradients, {}).items():
            if layer.name in traces:
                traces[layer.name] += float(square.sum()) / layer.size
    return {
        "eigenvalues": (total / count).float(),
        "layer_means": torch.tensor(list(traces.values()), dtype=torch.float32) / count,
    }


def load_curvature(directory: Path, manifest: Manifest) -> list[dict[str, Tensor]]:
    """By checkpoint "eigenvalues" [dimensions], "layer_means" [layers] and, where second moments were kept,
    "preconditioner" [dimensions], float32; none for bases without curvature.

    Raises:
        CorruptIndexError: a file is missing or damaged.
    """
    return [load_tensors(directory / entry.path, "rebuild the index") for entry in manifest.curvature]
