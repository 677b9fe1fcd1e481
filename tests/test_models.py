"""Scores of every kind of model in the zoo equal autograd's, one example at a time, or the task is refused in words."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gradtrace import GradtraceError
from model_zoo import CASES, Case, ZooTask, agreement, trained_model

# Old APIs of PyTorch are part of the zoo, and a slow path may be announced.
pytestmark = pytest.mark.filterwarnings("ignore")

RIGHT = [case for case in CASES.values() if case.refusal is None]
REFUSED = [case for case in CASES.values() if case.refusal is not None]


def check(case: Case, directory: Path, **options: object) -> None:
    if case.needs:
        pytest.importorskip(case.needs)
    task = case.make()
    found = agreement(task, case.queries(task), directory, **options)
    assert found.lowest_r >= case.lowest_r, found
    assert found.largest_error <= case.largest_error, found


@pytest.mark.parametrize("case", RIGHT, ids=lambda case: case.name)
def test_right(case: Case, tmp_path: Path) -> None:
    check(case, tmp_path)


@pytest.mark.parametrize("case", [case for case in RIGHT if case.rotates], ids=lambda case: case.name)
def test_right_in_the_whole_spectral_basis(case: Case, tmp_path: Path) -> None:
    """A rotation that drops no dimension changes no inner product."""
    check(case, tmp_path, basis="spectral", dimensions=1_000_000)


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.name)
def test_refused(case: Case, tmp_path: Path) -> None:
    if case.needs:
        pytest.importorskip(case.needs)
    task = case.make()
    try:
        found = agreement(task, case.queries(task), tmp_path)
    except GradtraceError as error:
        text = str(error)
    else:
        assert case.or_right, f"accepted, {found}"
        assert found.lowest_r >= case.lowest_r
        assert found.largest_error <= case.largest_error
        return
    assert case.refusal is not None
    for pattern in (case.refusal.cause, case.refusal.remedy):
        assert re.search(pattern, text, re.IGNORECASE | re.DOTALL), f"{pattern} is not in: {text}"


@pytest.mark.parametrize("case", [case for case in REFUSED if case.kind == "mixing"], ids=lambda case: case.name)
def test_the_first_two_rows_hide_what_must_be_refused(case: Case) -> None:
    """Otherwise a check of these rows alone would do; of all rows, some show it."""
    task = case.make()
    model = trained_model(task).eval()
    assert case.shown or not depends(task, model, [task.train[:2]])
    orders = torch.randperm(len(task.train), generator=torch.Generator().manual_seed(0)).split(8)
    assert depends(task, model, [[task.train[row] for row in order] for order in orders])


def depends(task: ZooTask, model: nn.Module, batches: list[list[Any]]) -> bool:
    """Whether losses, or the gradient of a batch's last loss, differ from those of the examples alone."""
    for examples in batches:
        losses = task.loss(model, task.collate(examples))
        alone = [task.loss(model, task.collate([example])) for example in examples]
        if losses.shape != (len(examples),) or not torch.allclose(losses, torch.cat(alone), atol=1e-5):
            return True
        parameters = list(model.parameters())
        pair = [torch.autograd.grad(loss, parameters, allow_unused=True) for loss in (losses[-1], alone[-1][0])]
        if not all(
            torch.allclose(a, b, atol=1e-4) for a, b in zip(*pair, strict=True) if a is not None and b is not None
        ):
            return True
    return False
