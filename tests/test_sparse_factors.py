"""Factors of single weights that are computed for some columns at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gradtrace.fitted.curvature import Columns
from gradtrace.sparse import factors
from gradtrace.sparse.coordinates import WeightCoordinates
from gradtrace.sparse.whitening import WeightCurvature

SHAPES = {"b": (1, 3, 2), "a": (2, 1, 4), "c": (1, 1, 5)}
LAYERS = torch.tensor([0] * 6 + [1] * 8 + [2] * 5)  # of each of the 19 coordinates


def curvature() -> WeightCurvature:
    values = torch.rand(19, generator=torch.Generator().manual_seed(0))
    return WeightCurvature(WeightCoordinates(SHAPES), values, torch.tensor([1.0, 2.0, 3.0]), values * 2)


@pytest.mark.parametrize("columns", [slice(None), slice(0, 6), slice(4, 17), slice(18, 19), slice(7, 7)])
@pytest.mark.parametrize("as_numbers", [False, True])
def test_the_curvature_of_some_weights_is_theirs(columns: slice, as_numbers: bool) -> None:
    numbers = torch.arange(19)[columns]
    part = curvature().at(numbers if as_numbers else columns)
    assert torch.equal(part.eigenvalues, curvature().eigenvalues[numbers])
    assert torch.equal(part.means, LAYERS[numbers] + 1.0)
    assert part.preconditioner is not None
    assert torch.equal(part.preconditioner, part.eigenvalues * 2)


@pytest.mark.parametrize("piece", [1, 4, 19, 100])
def test_few_factors_are_computed_at_a_time(monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    monkeypatch.setattr(factors, "_PIECE", piece)
    sizes = []

    def of_columns(columns: Columns) -> Tensor:
        values = torch.arange(19).double()[columns].sqrt()
        sizes.append(len(values))
        return values

    computed = factors.ComputedFactors(of_columns, 19)
    wanted = torch.arange(19).double().sqrt().float()
    assert torch.equal(computed.whole(), wanted)
    assert torch.equal(computed[slice(3, 12)], wanted[3:12])
    assert torch.equal(computed[torch.tensor([2, 18])], wanted[[2, 18]])
    assert max(sizes) <= max(piece, 2)
