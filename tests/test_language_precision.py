"""Language models in bfloat16 and float16: gradients beside those in float32, and what these numbers cannot hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tiny_language
from conftest import FRAMEWORK_WARNINGS
from gradtrace import load_checkpoints, open_index
from gradtrace.data.sample import varied_rows
from gradtrace.errors import LossError, MismatchError
from gradtrace.models.full_gradients import full_gradients
from gradtrace.models.gradient_model import GradientModel
from gradtrace.tasks import CausalLM
from gradtrace_indexer import build_index

pytestmark = [*FRAMEWORK_WARNINGS, pytest.mark.usefixtures("offline")]
TEXTS = tiny_language.texts(12)
LEAST_COSINE = {"bfloat16": 0.999, "float16": 0.99999}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("precision")
    tiny_language.saved(tiny_language.gpt2(340), home / "model")
    tiny_language.saved(tiny_language.gpt2(340).bfloat16(), home / "saved-in-bfloat16")
    base = tiny_language.saved(tiny_language.llama(340), home / "base")
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    torch.manual_seed(0)
    peft.get_peft_model(tiny_language.transformers.AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(
        home / "adapter"
    )
    return home


def task(directory: Path, **options: Any) -> CausalLM:
    return CausalLM(directory, [{"text": text} for text in TEXTS], **options)


def opened(made: CausalLM) -> GradientModel:
    rows = varied_rows(made)
    (checkpoint,) = load_checkpoints(made.pretrained.directory)
    return GradientModel(made, checkpoint, torch.device("cpu"), [made.train[row] for row in rows], rows=rows)


def gradients(made: CausalLM, scale: float = 1.0) -> Tensor:
    """Of all rows in one padded batch, float64 [rows, weights]; of the loss times `scale`"""
    model = opened(made)
    batch = model.batch([made.train[row] for row in range(len(TEXTS))])
    wholes = full_gradients(model, batch, lambda m, b: made.loss(m, b) * scale)
    by_layer = [sum(layer.gradient(x, d) for x, d in uses) for layer, uses in wholes.uses.items()]
    return torch.cat([gradient.flatten(1).double() for gradient in by_layer], dim=1)  # type: ignore[union-attr]


@pytest.mark.parametrize("model", ["model", "adapter"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_gradients_are_nearly_those_in_float32(home: Path, model: str, dtype: str) -> None:
    exact, rounded = (gradients(task(home / model, dtype=name)) for name in ("float32", dtype))
    cosines = torch.cosine_similarity(exact, rounded)
    assert cosines.min() > LEAST_COSINE[dtype]
    torch.testing.assert_close(rounded.norm(dim=1), exact.norm(dim=1), rtol=0.02, atol=0)


def test_small_gradients_stay_above_the_smallest_numbers_of_float16(home: Path) -> None:
    """Without a factor most of these would be zero: the smallest float16 number is 6e-8."""
    exact, rounded = (gradients(task(home / "model", dtype=name), scale=1e-5) for name in ("float32", "float16"))
    assert torch.cosine_similarity(exact, rounded).min() > 0.999


def test_models_run_in_float32_unless_told_otherwise(home: Path) -> None:
    assert {p.dtype for p in task(home / "saved-in-bfloat16").model().parameters()} == {torch.float32}
    assert {p.dtype for p in task(home / "model", dtype="bfloat16").model().parameters()} == {torch.bfloat16}
    adapted = dict(task(home / "adapter", dtype="float16").model().named_parameters())
    for name, parameter in adapted.items():
        assert parameter.dtype == (torch.float32 if "lora" in name else torch.float16)


@pytest.mark.parametrize("rows", ["dense", "sparse"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_an_index_answers_as_one_in_float32(home: Path, dtype: str, rows: Any, tmp_path: Path) -> None:
    scores = []
    for name in ("float32", dtype):
        made = task(home / "model", dtype=name)
        checkpoints = load_checkpoints(home / "model")
        index = build_index(made, checkpoints, tmp_path / name, rows=rows, basis="none" if rows == "dense" else None,
                            batch_size=5, progress=False)  # fmt: skip
        scores.append(index.scores([made.train[3], made.train[5]], method="graddot"))
    for exact, rounded in zip(*scores, strict=True):
        assert np.corrcoef(exact, rounded)[0, 1] > 0.99
    open_index(tmp_path / dtype, task(home / "model", dtype=dtype))
    with pytest.raises(MismatchError, match="shapes or types of the parameters"):
        open_index(tmp_path / dtype, task(home / "model"))


def test_what_float16_cannot_hold_is_refused_with_the_remedy(home: Path, tmp_path: Path) -> None:
    large = tiny_language.gpt2(340)
    with torch.no_grad():
        large.transformer.h[0].mlp.c_fc.weight.mul_(1e5)
        large.transformer.h[0].mlp.c_proj.weight.mul_(1e3)
    tiny_language.saved(large, tmp_path / "large")
    with pytest.raises(LossError, match=r"run it in bfloat16 or float32"):
        opened(task(tmp_path / "large", dtype="float16"))
    opened(task(tmp_path / "large", dtype="bfloat16"))


def test_the_factor_of_float16_leaves_losses_as_they_are(home: Path) -> None:
    model = opened(task(home / "model", dtype="float16"))
    batch = model.batch([model.task.train[row] for row in range(3)])
    losses = model.backpropagate(batch, lambda layer, x, d: None)
    torch.testing.assert_close(losses, model.losses(batch), rtol=1e-3, atol=0)
    assert isinstance(model.model, nn.Module)
