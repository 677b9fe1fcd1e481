"""Tasks of Hugging Face models: what counts in the loss, scores beside plain autograd, and the commands that need no
Python file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typer.testing import CliRunner

import tiny_language
from gradtrace import load_checkpoints
from gradtrace_service.cli import app

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # the frameworks', of PyTorch and of each other
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore:.*:ResourceWarning"),
]
TRAIN, QUERY = tiny_language.texts(24), tiny_language.texts(4, seed=1)


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module")
def words() -> Any:
    return tiny_language.tokenizer()


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Trainer's output directory, beside it its data."""
    home = tmp_path_factory.mktemp("language")
    tiny_language.json_lines(home / "train.jsonl", [{"text": text} for text in TRAIN])
    tiny_language.json_lines(home / "test.jsonl", [{"text": text} for text in QUERY])
    return tiny_language.trained(tiny_language.gpt2(340), TRAIN, home / "run")


def mean_loss(model: nn.Module, ids: Tensor) -> Tensor:
    """Of one unpadded text, by hand."""
    logits = model(input_ids=ids[None]).logits[0]
    return F.cross_entropy(logits[:-1], ids[1:])


def gradient(model: nn.Module, loss: Tensor) -> Tensor:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, parameters)]).double()


def invoke(*words: object) -> str:
    done = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.mark.recipe
def test_a_trainers_directory_is_indexed_and_asked_in_a_line_each(output: Path, tmp_path: Path, words: Any) -> None:
    transformers = tiny_language.transformers
    data, queries = output.parent / "train.jsonl", output.parent / "test.jsonl"
    invoke("build", "--model", output, "--data", data, "--query-data", queries, "--out", tmp_path / "index",
           "--basis", "none", "--precision", "float16", "--batch-size", 8)  # fmt: skip
    answer = json.loads(invoke("query", tmp_path / "index", "--query-row", 0, "--k", 24, "--json"))
    hits = answer["results"][0]["proponents"] + answer["results"][0]["opponents"]
    scores = np.zeros((2, len(TRAIN)))
    for checkpoint in load_checkpoints(output):
        model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint.path).eval()
        of = [gradient(model, mean_loss(model, torch.tensor(words(text)["input_ids"]))) for text in [QUERY[0], *TRAIN]]
        scores[0] += checkpoint.learning_rate * np.array([float(of[0] @ row) for row in of[1:]])
    for hit in hits:
        scores[1, hit["row"]] = hit["score"]
        assert hit["example"]["text"] == TRAIN[hit["row"]]
    assert np.corrcoef(scores)[0, 1] >= 0.9999
