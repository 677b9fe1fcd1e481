"""Scores of every kind of model in the zoo equal autograd's, one example at a time, or the task is refused in words."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from _pytest.mark import ParameterSet
from torch import nn

from gradtrace import Checkpoint, GradtraceError
from gradtrace.basis import identity_basis
from gradtrace.models.gradient_model import open_models
from model_zoo import CASES, Case, ZooTask, agreement, trained_model

# Old APIs of PyTorch are part of the zoo, and a slow path may be announced.
pytestmark = pytest.mark.filterwarnings("ignore")


def named(cases: Iterable[Case]) -> list[ParameterSet]:
    return [pytest.param(case, id=case.name, marks=[pytest.mark.long] if case.long else []) for case in cases]


RIGHT = named(case for case in CASES.values() if case.refusal is None)
ROTATED = named(case for case in CASES.values() if case.rotates)
REFUSED = named(case for case in CASES.values() if case.refusal is not None)
COPIED = named(
    case
    for case in CASES.values()
    if case.refusal is None and case.kind in ("adapters", "parameters", "recurrent", "reparametrised", "wrappers")
)
MIXING = named(case for case in CASES.values() if case.kind == "mixing" and not case.or_right)


def check(case: Case, directory: Path, **options: object) -> None:
    if case.needs:
        pytest.importorskip(case.needs)
    task = case.make()
    found = agreement(task, case.queries(task), directory, **options)
    assert found.lowest_r >= case.lowest_r, found
    assert found.largest_error <= case.largest_error, found


@pytest.mark.parametrize("case", RIGHT)
def test_right(case: Case, tmp_path: Path) -> None:
    check(case, tmp_path)


@pytest.mark.parametrize("case", ROTATED)
def test_right_in_the_whole_spectral_basis(case: Case, tmp_path: Path) -> None:
    """A rotation that drops no dimension changes no inner product."""
    check(case, tmp_path, basis="spectral", dimensions=1_000_000)


@pytest.mark.parametrize("case", COPIED)
def test_a_clone_gives_the_same_rows_and_shares_no_weights(case: Case, tmp_path: Path) -> None:
    if case.needs:
        pytest.importorskip(case.needs)
    task = case.make()
    torch.save(task.state(trained_model(task)), tmp_path / "weights.pt")
    (model,) = open_models(task, [Checkpoint(tmp_path / "weights.pt", 1, 1.0)], torch.device("cpu"))
    examples = case.queries(task) or [task.train[row] for row in range(3)]
    basis = identity_basis(model.plan.layers, seed=0)
    rows = model.encode(basis, model.batch(examples))[0]
    clone = model.clone()
    torch.testing.assert_close(clone.encode(basis, clone.batch(examples))[0], rows)
    with torch.no_grad():
        for parameter in clone.model.parameters():
            parameter.zero_()
    torch.testing.assert_close(model.encode(basis, model.batch(examples))[0], rows)


@pytest.mark.parametrize("case", REFUSED)
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


@pytest.mark.parametrize("case", MIXING)
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
