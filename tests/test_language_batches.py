"""Batches of texts of different lengths: parts of alike lengths, the same rows as in one batch, their order kept."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import tiny_language
from conftest import FRAMEWORK_WARNINGS
from gradtrace import load_checkpoints
from gradtrace.basis import two_sided_basis
from gradtrace.errors import LossError
from gradtrace.models.gradient_model import GradientModel
from gradtrace.sparse.strongest import StrongestOfEach
from gradtrace.tasks import CausalLM
from gradtrace.tasks.language import questions

pytestmark = [*FRAMEWORK_WARNINGS, pytest.mark.usefixtures("offline")]
LENGTHS = [9, 3, 30, 4, 3, 17, 40, 5, 12, 3]
TOKENS = 48


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> GradientModel:
    home = tiny_language.saved(tiny_language.gpt2(340), tmp_path_factory.mktemp("batches"))
    generator = torch.Generator().manual_seed(0)
    rows = [{"input_ids": torch.randint(5, 340, (length,), generator=generator).tolist()} for length in LENGTHS]
    task = CausalLM(home, rows, representations=True)
    examples = [task.train[row] for row in range(len(rows))]
    return GradientModel(task, load_checkpoints(home)[0], torch.device("cpu"), examples)


@pytest.fixture
def few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(questions, "TOKENS_A_BATCH", TOKENS)


def test_parts_hold_alike_lengths_and_few_tokens(model: GradientModel, few_tokens: None) -> None:
    parts = model.task.parts([model.task.train[row] for row in range(len(LENGTHS))])
    assert sorted(row for part in parts for row in part) == list(range(len(LENGTHS)))
    assert [LENGTHS[row] for part in parts for row in part] == sorted(LENGTHS, reverse=True)
    assert all(len(part) == 1 or len(part) * max(LENGTHS[row] for row in part) <= TOKENS for part in parts)
    assert len(parts) == 5


def test_rows_are_those_of_one_batch_in_its_order(model: GradientModel, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = model.batch([model.task.train[row] for row in range(len(LENGTHS))])
    basis = two_sided_basis(model.plan.layers, 64, 0)
    sparse = StrongestOfEach(torch.ones(sum(layer.size for layer in model.plan.layers)), 20)
    whole = model.encode(basis, batch)
    whole_sparse, _ = sparse.encode(model, batch, None)
    represented, _ = model.represent(batch)
    monkeypatch.setattr(questions, "TOKENS_A_BATCH", TOKENS)
    for values, wanted in zip(model.encode(basis, batch), whole, strict=True):
        torch.testing.assert_close(values, wanted, rtol=1e-3, atol=1e-5)
    rows, losses = sparse.encode(model, batch, None)
    torch.testing.assert_close(losses, whole[1])
    np.testing.assert_allclose(rows.norms, whole_sparse.norms, rtol=1e-4)
    np.testing.assert_array_equal(rows.vectors.coordinates, whole_sparse.vectors.coordinates)
    np.testing.assert_allclose(rows.vectors.values, whole_sparse.vectors.values, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(model.represent(batch)[0], represented)


def test_a_bad_row_has_its_place_in_the_batch(model: GradientModel, few_tokens: None) -> None:
    batch = model.batch([model.task.train[row] for row in range(len(LENGTHS))])
    basis = two_sided_basis(model.plan.layers, 64, 0)

    def infinite(module: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        losses = model.task.loss(module, inputs)
        return torch.where(inputs["attention_mask"].sum(1) == 17, torch.inf, losses)

    with pytest.raises(LossError) as caught:
        model.encode(basis, batch, infinite)
    assert list(caught.value.positions) == [LENGTHS.index(17)]


def test_padding_is_a_small_share_of_long_batches(model: GradientModel) -> None:
    """Of lengths from 16 to 512, evenly by their logarithm: 8 rows at a time, as they come, are 2.4 times as long."""
    lengths = np.exp(np.random.default_rng(0).uniform(np.log(16), np.log(512), 1280)).astype(int)
    examples = [{"input_ids": torch.zeros(n, dtype=torch.int64), "labels": torch.zeros(n)} for n in lengths]

    def padded(batches: list[list[int]]) -> float:
        return sum(len(batch) * max(lengths[batch]) for batch in batches) / lengths.sum()

    parts = []
    for start in range(0, len(lengths), 128):
        parts += [[start + row for row in part] for part in model.task.parts(examples[start : start + 128])]
    assert padded(parts) < 1.25
    assert padded([list(range(start, start + 8)) for start in range(0, len(lengths), 8)]) > 2
