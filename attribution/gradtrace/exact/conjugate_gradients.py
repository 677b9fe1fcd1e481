"""Conjugate gradients for many right-hand sides at once, with a matrix known only by its products."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gradtrace.errors import CurvatureError


def conjugate_gradients(
    products: Callable[[Tensor], Tensor], sides: Tensor, tolerance: float, iterations: int
) -> Tensor:
    """Solve A x = b for every row b of `sides` [k, p], A symmetric positive definite (Hestenes and Stiefel 1952).

    Args:
        products: [k, p] -> [k, p], A times each row.
        tolerance: largest |b - A x| / |b| of any row.
        iterations: the most products to take.

    Raises:
        CurvatureError: A is not positive definite, or `iterations` do not reach the tolerance.
    """
    x = torch.zeros_like(sides)
    residual, direction = sides.clone(), sides.clone()
    square = residual.square().sum(1)
    enough = square * tolerance**2
    for _ in range(iterations):
        unsolved = square > enough
        if not bool(unsolved.any()):
            return x
        product = products(direction)
        curvature = (direction * product).sum(1)
        _check_positive(curvature[unsolved], direction[unsolved])
        step = torch.where(unsolved, square / curvature, 0)[:, None]
        x += step * direction
        residual -= step * product
        before, square = square, residual.square().sum(1)
        direction = residual + torch.where(unsolved, square / before, 0)[:, None] * direction
    worst = float((square / sides.square().sum(1)).sqrt().nan_to_num().max())
    if worst <= tolerance:
        return x
    raise CurvatureError(
        f"{iterations} iterations of conjugate gradients leave a relative residual of {worst:.1e}, {tolerance:.1e} was "
        "asked for: allow more iterations, or raise the damping, which makes the curvature better conditioned"
    )


def _check_positive(curvature: Tensor, direction: Tensor) -> None:
    lowest = float((curvature / direction.square().sum(1)).min())
    if not lowest > 0:
        raise CurvatureError(
            f"the damped curvature is not positive definite ({lowest:.2e} along one direction): the weights are at no "
            "minimum of the mean loss. Train on, raise the damping well above this, or take gauss_newton=True"
        )
