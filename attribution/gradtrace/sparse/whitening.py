"""Whitening by single weights: the coordinates of a gradient divided by their usual size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gradtrace.data.batches import ExampleBatch
from gradtrace.errors import CurvatureError
from gradtrace.fitted.curvature import ALL_COLUMNS, Columns, Curvature
from gradtrace.fitted.ekfac import mean_squares
from gradtrace.models.gradient_model import GradientModel
from gradtrace.sparse.coordinates import WeightCoordinates
from gradtrace.store.manifest import FisherEntry, Manifest
from gradtrace.store.regular_files import regular_path
from gradtrace.store.tensors import load_tensors

WEIGHT_FISHER = FisherEntry(
    source="empirical",
    description="of every weight the mean square of its gradient; products of different weights count as zero",
)
DAMPING = 1.0  # LDS .61 on a small GPT-2 (512 coordinates a row), where uncompressed gradients with .1 have .51


def whitening_factors(mean_squares: Tensor, layer_means: Tensor, damping: float) -> Tensor:
    """w = 1 / sqrt(v + damping * mean of v over the layer) of weights, with the mean square v of their gradients; 0
    in layers where v is zero throughout. float32 [n]

    The inner product of two whitened gradients is <g, H^-1 h>, with a diagonal H: an influence function whose curvature
    is the diagonal of the mean of g gT, damped.

    mean_squares, layer_means: v, and the mean of v over the weight's layer. Both float32 [n]
    """
    factors = (mean_squares + damping * layer_means).rsqrt()
    return torch.where(factors.isfinite(), factors, 0)


def gradient_squares(model: GradientModel, batches: Iterator[ExampleBatch]) -> dict[str, Tensor]:
    """The diagonal of the mean of g gT, of the examples' gradients g at their own labels.

    Returns, as `fitted.ekfac.curvature` does, on the CPU:
        eigenvalues: float32 [coordinates], the mean square of every weight's gradient.
        layer_means: float32 [layers, in alphabetical order], its mean over each layer.

    Raises:
        LossError: a loss is NaN or infinite.
        CurvatureError: all gradients are zero.
    """
    by_layer = mean_squares(model, batches, {})
    if not any(bool(v.any()) for v in by_layer.values()):
        raise CurvatureError("the gradients of all examples are zero: choose another checkpoint, or other layers")
    unused = {layer.name: torch.zeros(layer.size) for layer in model.plan.layers}
    squares = unused | {name: v.flatten().float().cpu() for name, v in by_layer.items()}
    means = [squares[name].double().mean().float() for name in sorted(squares)]
    return {"eigenvalues": torch.cat(list(squares.values())), "layer_means": torch.stack(means)}


@dataclass(frozen=True, eq=False, slots=True)
class WeightCurvature:
    """The curvature of all weights at one checkpoint, as it is stored.

    eigenvalues: the mean square of every weight's gradient, float32 [coordinates], of large models in a mapped file
    layer_means: its mean over each layer, in the order of the coordinates. float32 [layers]
    preconditioner: as that of `Curvature`
    """

    coordinates: WeightCoordinates
    eigenvalues: Tensor
    layer_means: Tensor
    preconditioner: Tensor | None

    def at(self, columns: Columns) -> Curvature:
        """That of some of the weights."""
        preconditioner = None if self.preconditioner is None else self.preconditioner[columns]
        means = self.coordinates.of_layers(self.layer_means, columns)
        return Curvature(self.eigenvalues[columns], means, preconditioner)


def load_weight_curvature(
    directory: Path, manifest: Manifest, coordinates: Sequence[WeightCoordinates]
) -> list[WeightCurvature]:
    """That of each checkpoint, whose columns are the weights.

    coordinates: of every training run

    Raises:
        CorruptIndexError: a file is missing or damaged.
    """
    return [_load(directory, manifest, number, coordinates) for number in range(len(manifest.curvature))]


def weight_curvature_at(
    directory: Path, manifest: Manifest, number: int, coordinates: Sequence[WeightCoordinates]
) -> Curvature:
    """That of one checkpoint, by its number, in memory. Raises as `load_weight_curvature`."""
    return _load(directory, manifest, number, coordinates).at(ALL_COLUMNS)


def _load(
    directory: Path, manifest: Manifest, number: int, coordinates: Sequence[WeightCoordinates]
) -> WeightCurvature:
    entry, of_run = manifest.checkpoints[number], coordinates[manifest.checkpoints[number].run]
    kept: dict[str, tuple[int | None, ...]] = {"preconditioner": (of_run.count,)} if entry.second_moments else {}
    shapes = {"eigenvalues": (of_run.count,), "layer_means": (len(of_run.shapes),)}
    path = regular_path(directory, manifest.curvature[number].path)
    tensors = load_tensors(path, "rebuild the index", **shapes, **kept)
    means = tensors["layer_means"][of_run.alphabetical_numbers()]
    return WeightCurvature(of_run, tensors["eigenvalues"], means, tensors.get("preconditioner"))
