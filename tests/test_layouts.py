"""Whose a position is, told by gradients with and without colors."""

from __future__ import annotations

import pytest
import torch

from gradtrace.gradients.layouts import colors, owners

BATCH = 8


def gradients(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of 4 positions an example, scattered: whose each is [32], and gradients without and with colors [32, 6]."""
    generator = torch.Generator().manual_seed(seed)
    example = torch.randperm(4 * BATCH, generator=generator) % BATCH
    plain = torch.randn(4 * BATCH, 6, generator=generator)
    return example, plain, plain * colors(BATCH, plain.device)[example][:, None]


@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-5])
def test_a_position_that_examples_share(size: float) -> None:
    example, plain, colored = gradients()
    color = colors(BATCH, plain.device)
    other = (example[3] + 1) % BATCH
    half = size * torch.randn(6)
    plain[3], colored[3] = size * plain[3] + half, size * colored[3] + half * color[other]
    assert owners(plain, colored, BATCH).mixed.nonzero().flatten().tolist() == [3]


def test_rounding_of_a_small_difference_of_large_terms_is_not_sharing() -> None:
    """Seen of a router: a gradient of 8e-6 of the largest, off by 2e-7 of the largest once it is colored."""
    example, plain, colored = gradients()
    largest = float(plain.norm(dim=1).max())
    color = colors(BATCH, plain.device)[example][3]
    plain[3] *= 8e-6 * largest / float(plain[3].norm())
    off = torch.ones(6) / 6**0.5 * 2e-7 * largest
    colored[3] = (plain[3] + off) * color
    found = owners(plain, colored, BATCH)
    assert not found.mixed.any()
    assert found.example.tolist() == example.tolist()
