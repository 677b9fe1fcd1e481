"""Questions about chosen tokens, and why this text rather than another, beside plain autograd."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typer.testing import CliRunner

import tiny_language
from conftest import FRAMEWORK_WARNINGS
from gradtrace import Index, load_checkpoints
from gradtrace.errors import DatasetError, QueryError
from gradtrace.tasks import CausalLM, SequenceToSequence
from gradtrace.tasks.language.questions import WritingTask
from gradtrace_indexer import build_index
from gradtrace_service.cli import app

pytestmark = [*FRAMEWORK_WARNINGS, pytest.mark.usefixtures("offline")]
VOCABULARY = 340
TEXTS = tiny_language.texts(12)
PROMPT, PARIS, ROME = "who sees a cat ?", " the dog at the house .", " the fish ."
MODELS: dict[str, tuple[type[WritingTask], Callable[[], Any]]] = {
    "gpt-2": (CausalLM, lambda: tiny_language.gpt2(VOCABULARY)),
    "llama": (CausalLM, lambda: tiny_language.llama(VOCABULARY)),
    "t5": (SequenceToSequence, lambda: tiny_language.t5(VOCABULARY)),
}


def halves(text: str) -> dict[str, str]:
    words = text.split()
    return {"prompt": " ".join(words[:5]), "completion": " " + " ".join(words[5:])}


def made(kind: str, home: Path, **options: Any) -> tuple[WritingTask, Any]:
    """A task, and its model."""
    task, model = MODELS[kind]
    tiny_language.saved(model().eval(), home)
    return task(home, [halves(text) for text in TEXTS], **options), model().eval()


@pytest.fixture(params=MODELS, scope="module")
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Index, Any]:
    home = tmp_path_factory.mktemp("questions")
    task, model = made(request.param, home / "model")
    checkpoints = load_checkpoints(home / "model")
    options: dict[str, Any] = {"basis": "none", "precision": "float16", "progress": False}
    return build_index(task, checkpoints, home / "index", **options), model


def token_losses(model: nn.Module, prompt: str, completion: str) -> Tensor:
    """Of the completion's tokens and the end, by hand."""
    words = tiny_language.tokenizer()
    read, written = (torch.tensor(words(text)["input_ids"]) for text in (prompt, completion))
    if hasattr(model, "decoder"):
        before = torch.cat([torch.tensor([0]), written[:-1]])
        logits = model(input_ids=read[None], decoder_input_ids=before[None]).logits[0]
        return F.cross_entropy(logits, written, reduction="none")
    written = torch.cat([written, torch.tensor([words.eos_token_id])])
    logits = model(input_ids=torch.cat([read, written])[None]).logits[0]
    return F.cross_entropy(logits[len(read) - 1 : -1], written, reduction="none")


def gradient(model: nn.Module, value: Tensor) -> Tensor:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(value, parameters, allow_unused=True)
    return torch.cat([grad.flatten().double() for grad in gradients if grad is not None])


def expected(model: nn.Module, value: Tensor) -> np.ndarray[Any, Any]:
    """Inner products of a value's gradient with those of the rows' losses."""
    query = gradient(model, value)
    rows = [token_losses(model, *halves(text).values()).mean() for text in TEXTS]
    return np.array([float(query @ gradient(model, row)) for row in rows])


def assert_close(scores: Any, wanted: Any) -> None:
    np.testing.assert_allclose(scores, wanted, atol=2e-3 * np.abs(wanted).max())


@pytest.mark.parametrize(
    ("only", "positions"), [([1], [1]), ([4, 0, 4], [0, 4]), ("dog", [1]), ("at the house", [2, 3, 4])], ids=str
)
def test_chosen_tokens_count_alone(built: tuple[Index, Any], only: Any, positions: list[int]) -> None:
    index, model = built
    asked = index.task.parse({"prompt": PROMPT, "completion": PARIS, "only": only})
    wanted = token_losses(model, PROMPT, PARIS)[positions].mean()
    (result,) = index.influence([asked], k=3)
    assert abs(result.loss - float(wanted)) < 1e-4
    (scores,) = index.scores([asked])
    assert_close(scores, expected(model, wanted))
    shown = index.task.render(asked)
    assert (shown["prompt"], shown["completion"].strip()) == (PROMPT, PARIS.strip())
    assert result.target == f"loss of {shown['only']!r}"


def test_a_contrast_is_the_difference_of_two_losses(built: tuple[Index, Any]) -> None:
    index, model = built
    payload = {"prompt": PROMPT, "completion": PARIS}
    pair = index.task.parse(payload | {"rather_than": ROME})
    first, second = token_losses(model, PROMPT, PARIS).mean(), token_losses(model, PROMPT, ROME).mean()
    wanted = expected(model, first - second)
    plain = index.task.parse({"prompt": PROMPT, "completion": ROME})
    scores = index.scores([plain, pair, index.task.parse(payload)])  # contrasts and others, together
    assert_close(scores[1], wanted)
    np.testing.assert_allclose(scores[1], scores[2] - scores[0], atol=1e-5 * np.abs(scores).max())
    (result,) = index.influence([pair], k=12, rescore=True)
    assert abs(result.loss - float(first)) < 1e-4
    for hit in [*result.proponents, *result.opponents]:
        assert abs(hit.score - wanted[hit.row]) < 1e-4 * np.abs(wanted).max()
    shown = index.task.render(pair)
    assert shown["rather_than"].strip() == ROME.strip()
    assert result.target == f"loss of {shown['completion']!r} minus that of {shown['rather_than']!r}"


def test_the_cosine_of_a_contrast_is_that_of_the_difference(built: tuple[Index, Any]) -> None:
    index, model = built
    pair = index.task.parse({"prompt": PROMPT, "completion": PARIS, "rather_than": ROME})
    value = token_losses(model, PROMPT, PARIS).mean() - token_losses(model, PROMPT, ROME).mean()
    query = gradient(model, value)
    rows = [gradient(model, token_losses(model, *halves(text).values()).mean()) for text in TEXTS]
    wanted = [float(torch.cosine_similarity(query, row, dim=0)) for row in rows]
    np.testing.assert_allclose(index.scores([pair], method="cosine")[0], wanted, atol=2e-3)


def test_minimal_pairs_are_asked_about_together(built: tuple[Index, Any]) -> None:
    index, _ = built
    pairs = [
        index.task.parse({"prompt": prompt, "completion": PARIS, "rather_than": ROME}) for prompt in (PROMPT, "the cat")
    ]
    (mean,) = index.influence(pairs, k=12, aggregate="mean")
    scores = index.scores(pairs).mean(0)
    for hit in [*mean.proponents, *mean.opponents]:
        assert abs(hit.score - scores[hit.row]) < 1e-4 * np.abs(scores).max()
    with pytest.raises(QueryError, match="training example 1 compares two texts"):
        index.pairs([index.task.train[0], pairs[0]], pairs)


def last_state(model: nn.Module, prompt: str, completion: str) -> Tensor:
    """The last hidden state at the completion's end, by hand."""
    words = tiny_language.tokenizer()
    read, written = (words(text)["input_ids"] for text in (prompt, completion))
    if hasattr(model, "decoder"):
        output = model(input_ids=torch.tensor([read]), decoder_input_ids=torch.tensor([[0, *written[:-1]]]),
                       output_hidden_states=True)  # fmt: skip
        return output.decoder_hidden_states[-1][0, -1].double()
    ids = torch.tensor([[*read, *written, words.eos_token_id]])
    return model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0, -1].double()


@pytest.mark.parametrize("kind", ["gpt-2", "t5"])
def test_repsim_compares_the_last_hidden_states(kind: str, tmp_path: Path) -> None:
    task, model = made(kind, tmp_path / "model", representations=True)
    options: dict[str, Any] = {"dimensions": 8, "progress": False}
    index = build_index(task, load_checkpoints(tmp_path / "model"), tmp_path / "index", **options)
    query = {"prompt": PROMPT, "completion": PARIS}
    with torch.no_grad():
        rows = torch.stack([last_state(model, *halves(text).values()) for text in TEXTS])
        wanted = torch.cosine_similarity(rows, last_state(model, PROMPT, PARIS), dim=1)
    np.testing.assert_allclose(index.scores([task.parse(query)], method="repsim")[0], wanted, atol=2e-3)
    with pytest.raises(QueryError, match="compares representations, not two losses: leave rather_than out"):
        index.scores([task.parse(query | {"rather_than": ROME})], method="repsim")
    plain, _ = made(kind, tmp_path / "model")
    without = build_index(plain, load_checkpoints(tmp_path / "model"), tmp_path / "plain", **options)
    with pytest.raises(QueryError, match="--representations"):
        without.scores([task.parse(query)], method="repsim")


def test_the_command_line_asks_about_completions(tmp_path: Path) -> None:
    def asked(*words: str) -> Any:
        done = CliRunner().invoke(app, ["query", str(tmp_path / "index"), *words, "--k", "3", "--json"])
        assert done.exit_code == 0, f"{done.output} {done.exception}"
        return json.loads(done.stdout)["results"][0]

    data = tiny_language.json_lines(tmp_path / "train.jsonl", [halves(text) for text in TEXTS])
    model = tiny_language.saved(tiny_language.gpt2(VOCABULARY), tmp_path / "model")
    flags = ["--model", str(model), "--data", str(data), "--out", str(tmp_path / "index"), "--dimensions", "16"]
    assert CliRunner().invoke(app, ["build", *flags]).exit_code == 0
    contrast = asked("--prompt", PROMPT, "--completion", PARIS, "--rather-than", ROME)
    assert contrast["query"]["target"] == f"loss of {PARIS!r} minus that of {ROME!r}"
    assert contrast["query"]["example"]["rather_than"] == ROME
    chosen = asked("--prompt", PROMPT, "--completion", PARIS, "--only", "house")
    assert chosen["query"]["target"] == "loss of ' house'"
    alike = asked("--prompt", PROMPT, "--completion", PARIS, "--method", "bm25")
    scores = [hit["score"] for hit in alike["proponents"]]
    assert scores == sorted(scores, reverse=True)
    for words, problem in (
        (["--prompt", PROMPT], "belong to --completion"),
        (["--completion", PARIS, "--example", "{}"], "one of --example, --image and --completion"),
        (["--completion", PARIS, "--target-label", "3", "--rather-than", "4"], "label"),
        (["--completion", PARIS, "--only", "cat"], "are not in the text"),
    ):
        done = CliRunner().invoke(app, ["query", str(tmp_path / "index"), *words])
        assert done.exit_code
        assert problem in f"{done.output} {done.exception}"


def test_texts_and_conversations_are_compared_too(tmp_path: Path) -> None:
    task, _ = made("gpt-2", tmp_path)
    good, bad = "the cat sees a dog .", "the cat see a dog ."
    pair = task.explained(task.parse({"text": good, "rather_than": bad}))
    assert pair.words == f" of {good!r} minus that of {bad!r}"
    for example, text in zip(pair.examples, (good, bad), strict=True):
        assert torch.equal(example["input_ids"], task.example({"text": text})["input_ids"])
        assert example.keys() == {"input_ids", "labels"}
    said = [{"role": "user", "content": "who ?"}, {"role": "assistant", "content": "a cat"}]
    other = [said[0], {"role": "assistant", "content": "a dog"}]
    _, second = task.explained(task.parse({"messages": said, "rather_than": "a dog"})).examples
    assert torch.equal(second["input_ids"], task.example({"messages": other})["input_ids"])
    _, second = task.explained(
        task.parse({"prompt": said[:1], "completion": said[1:], "rather_than": other[1:]})
    ).examples
    assert torch.equal(second["labels"], task.example({"prompt": said[:1], "completion": other[1:]})["labels"])


def test_query_data_may_ask_the_same(tmp_path: Path) -> None:
    tiny_language.saved(tiny_language.gpt2(VOCABULARY), tmp_path)
    rows = [{"text": "the cat .", "rather_than": "the dog ."}, {"text": "the cat .", "only": "cat"}]
    task = CausalLM(tmp_path, rows, rows)
    assert [len(task.explained(task.query[row]).examples) for row in range(2)] == [2, 1]
    assert int((task.query[1]["labels"] != -100).sum()) == 1
    assert all(task.train[row].keys() == {"input_ids", "labels"} for row in range(2))  # what was trained on


def test_token_texts_join_to_the_text(tmp_path: Path) -> None:
    task, _ = made("gpt-2", tmp_path)
    for text in ("the cat at the river .", "naïve 日本語 ☃ cat", " "):
        ids = task.example({"text": text + " the dog"})["input_ids"]
        texts = task.encoder.texts(ids)
        assert "".join(texts) == text + " the dog"
        assert len(texts) == len(ids)
    assert "☃" in task.render(task.parse({"text": "a ☃ cat", "only": "☃"}))["only"]


@pytest.mark.parametrize(
    ("payload", "words"),
    [
        ({"completion": "", "prompt": PROMPT}, "completion is empty"),
        ({"completion": PARIS, "prompt": PROMPT, "rather_than": ""}, "rather_than is empty"),
        ({"completion": PARIS, "prompt": PROMPT, "only": []}, "only is empty"),
        ({"completion": PARIS, "prompt": PROMPT, "rather_than": PARIS}, "rather_than is the same"),
        ({"completion": PARIS, "prompt": PROMPT, "rather_than": ROME, "only": "dog"}, "two questions"),
        ({"completion": PARIS, "prompt": PROMPT, "only": [7]}, "token 7, .* are 0 to 6: 0 ' the', 1 ' dog'"),
        ({"completion": PARIS, "prompt": PROMPT, "only": [-1]}, "token -1"),
        ({"completion": PARIS, "prompt": PROMPT, "only": [True]}, "a list of tokens' numbers"),
        ({"completion": PARIS, "prompt": PROMPT, "only": 3}, "a list of tokens' numbers"),
        ({"completion": PARIS, "prompt": PROMPT, "only": "the"}, "'the' of only are 2 times .* 3 ' the'"),
        ({"completion": PARIS, "prompt": PROMPT, "only": "cat"}, "'cat' of only are not in the text"),
        ({"completion": PARIS, "prompt": PROMPT, "only": " "}, "are not in the text"),
        ({"completion": PARIS, "prompt": PROMPT, "rather_than": 5}, "5 is not a text"),
        ({"text": PARIS, "only": [0]}, "the first token is never predicted"),
        ({"input_ids": [9, 10, 11], "rather_than": "a"}, "there is none"),
        ({"input_ids": [9, 10, 11], "rathr_than": "a"}, "rather_than"),
    ],
    ids=str,
)
def test_questions_that_are_refused(tmp_path: Path, payload: dict[str, Any], words: str) -> None:
    task, _ = made("gpt-2", tmp_path)
    with pytest.raises(QueryError, match=words):
        task.parse(payload)
    with pytest.raises(DatasetError, match="first token"):
        task.question({"text": PARIS, "only": [0]})
