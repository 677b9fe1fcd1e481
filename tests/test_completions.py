"""What language models write, beside transformers' own generate; and the questions about it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny
import tiny_language
from conftest import FRAMEWORK_WARNINGS, serving_when_ready
from gradtrace import Index, load_checkpoints
from gradtrace.errors import QueryError
from gradtrace.tasks import CausalLM, SequenceToSequence
from gradtrace_client import Client, InvalidRequestError
from gradtrace_indexer import build_index
from gradtrace_service.app import create_app

pytestmark = [*FRAMEWORK_WARNINGS, pytest.mark.usefixtures("offline")]
VOCABULARY = 340
TEXTS = tiny_language.texts(8)
PROMPT = "the cat at the house"
MODELS = {
    "gpt-2": (CausalLM, tiny_language.gpt2),
    "llama": (CausalLM, tiny_language.llama),
    "t5": (SequenceToSequence, tiny_language.t5),
}


def built(kind: str, home: Path) -> Index:
    task, model = MODELS[kind]
    tiny_language.saved(model(VOCABULARY), home / "model")
    rows = [{"prompt": text[:12], "completion": text[12:]} for text in TEXTS]
    checkpoints = load_checkpoints(home / "model")
    return build_index(task(home / "model", rows), checkpoints, home / "index", dimensions=8, progress=False)


@pytest.fixture(params=MODELS, scope="module")
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Index, Any, bool]:
    """An index, its model, and whether that reads the prompt by an encoder."""
    model = MODELS[request.param][1](VOCABULARY).eval()
    return built(request.param, tmp_path_factory.mktemp("completions")), model, request.param == "t5"


def generated(model: Any, reads: bool, **options: Any) -> list[int]:
    ids = torch.tensor([tiny_language.tokenizer()(PROMPT)["input_ids"]])
    output = model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, num_beams=1, **options)[0]
    return output[1 if reads else ids.shape[1] :].tolist()  # type: ignore[no-any-return]


def test_greedy_is_what_transformers_generates(made: tuple[Index, Any, bool]) -> None:
    index, model, reads = made
    written = index.complete(PROMPT, max_tokens=9)
    ids = generated(model, reads, max_new_tokens=9, do_sample=False)
    words = tiny_language.tokenizer()
    assert len(written.tokens) == len(ids)
    assert "".join(written.tokens) == words.decode(ids)
    assert written.text == words.decode(ids, skip_special_tokens=True)
    assert written.ended == ("end" if ids[-1] == words.eos_token_id else "length")


def test_the_payload_asks_about_these_very_tokens(made: tuple[Index, Any, bool]) -> None:
    index, model, reads = made
    written = index.complete(PROMPT, max_tokens=9)
    ids = generated(model, reads, max_new_tokens=9, do_sample=False)
    example = index.task.parse(written.payload)
    counted = example["labels"][example["labels"] != -100]
    assert counted.tolist() == ids
    chosen = index.task.parse({**written.payload, "only": [1, 2]})
    assert chosen["labels"][chosen["labels"] != -100].tolist() == ids[1:3]
    assert np.isfinite(index.scores([example, chosen])).all()


def test_draws_follow_the_models_probabilities_and_the_seed(tmp_path: Path) -> None:
    index = built("gpt-2", tmp_path)
    first = index.complete(PROMPT, max_tokens=12, temperature=1.0, seed=3)
    torch.rand(5)  # the global generator has no part in it
    assert index.complete(PROMPT, max_tokens=12, temperature=1.0, seed=3) == first
    texts = {index.complete(PROMPT, max_tokens=12, temperature=1.0, seed=seed).text for seed in range(4)}
    assert len(texts) > 1
    cold = index.complete(PROMPT, max_tokens=12, temperature=1e-6, seed=5)
    assert cold.tokens == index.complete(PROMPT, max_tokens=12).tokens
    model, task = index.contents.last_model.model, index.task
    with torch.no_grad():
        logits = model(input_ids=task.prompt_ids(PROMPT)[None]).logits[0, -1]
    likely = (logits / 0.1).softmax(0).double()
    counts = torch.zeros(len(likely), dtype=torch.float64)
    for seed in range(150):
        ids = task.parse(index.complete(PROMPT, max_tokens=1, temperature=0.1, seed=seed).payload)["labels"]
        counts[ids[ids != -100]] += 1
    top = likely.topk(5).indices
    spread = (150 * likely[top] * (1 - likely[top])).sqrt()
    assert ((counts[top] - 150 * likely[top]).abs() <= 5 * spread + 1).all()


def test_conversations_go_on_with_the_assistant(tmp_path: Path) -> None:
    index = built("gpt-2", tmp_path)
    messages = [{"role": "user", "content": "who sees a dog ?"}]
    written = index.complete(messages, max_tokens=5)
    prompt = tiny_language.tokenizer().apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert index.task.prompt_ids(messages).tolist() == prompt
    example = index.task.parse(written.payload)
    assert example["input_ids"][: len(prompt)].tolist() == prompt


def test_a_text_that_ends_is_asked_about_as_prompt_and_completion(tmp_path: Path) -> None:
    """Of a model that always writes the same two tokens and the end."""
    index = built("gpt-2", tmp_path)
    task, words = index.task, tiny_language.tokenizer()
    writes = [*words(" dog .")["input_ids"], words.eos_token_id]
    prompt = words(PROMPT)["input_ids"]
    table = dict(zip([prompt[-1], *writes[:-1]], writes, strict=True))
    with torch.no_grad():  # each token's embedding is its own direction, and the head turns it to the next one's
        model = index.contents.last_model.model
        for block in model.transformer.h:
            block.attn.c_proj.weight.zero_()
            block.mlp.c_proj.weight.zero_()
        model.transformer.wpe.weight.zero_()
        model.lm_head.weight = torch.nn.Parameter(torch.zeros(VOCABULARY, 16), requires_grad=False)
        for before, after in table.items():
            state = model.transformer.ln_f(model.transformer.wte.weight[before])
            model.lm_head.weight[after] = state
    written = index.complete(PROMPT, max_tokens=6)
    assert (written.text, written.ended) == (" dog .", "end")
    assert written.payload == {"prompt": PROMPT, "completion": " dog ."}
    assert written.tokens == [" dog", " .", "</s>"]
    cut = index.complete(PROMPT, max_tokens=2)
    assert (cut.text, cut.ended) == (" dog .", "length")
    assert cut.payload == {"prompt": PROMPT, "completion": " dog .", "only": [0, 1]}
    assert index.complete(PROMPT, max_tokens=6, seconds=0.0).ended == "time"
    assert task.explained(task.parse(cut.payload)).words == " of ' dog .'"


def test_prompts_that_are_refused(tmp_path: Path) -> None:
    index = built("gpt-2", tmp_path)
    for prompt, options, words in (
        ("", {}, "the prompt is empty"),
        (PROMPT, {"max_tokens": 64}, "leave room for 59 more"),
        (" the" * 70, {}, "leave room for 0 more"),
        ([{"role": "user"}], {}, "this is not a prompt of CausalLM"),
    ):
        with pytest.raises(QueryError, match=words):
            index.complete(prompt, **options)  # type: ignore[arg-type]
    plain = tiny.build(tiny.ClassTask(tiny.mlp, tiny.classes(12)), tmp_path / "plain")
    with pytest.raises(QueryError, match="ClassTask writes no text"):
        plain.complete(PROMPT)


@pytest.fixture
def client(tmp_path: Path) -> Iterator[tuple[Client, Index]]:
    index = built("gpt-2", tmp_path)
    with serving_when_ready(create_app(index)) as url, Client(url, retries=0) as connected:
        yield connected, index


def test_a_service_completes_and_says_why(client: tuple[Client, Index]) -> None:
    service, index = client
    assert service.index().can_complete
    written, expected = service.complete(PROMPT, max_tokens=7), index.complete(PROMPT, max_tokens=7)
    assert (written.text, written.tokens, written.payload, written.ended) == (
        expected.text, expected.tokens, expected.payload, expected.ended,
    )  # fmt: skip
    answer = service.influence({**written.payload, "only": [0]}, k=3)
    assert answer.results[0].query.target.startswith("loss of ")
    turn = service.complete([{"role": "user", "content": "who ?"}], max_tokens=3, temperature=0.7, seed=1)
    assert (
        turn.text == index.complete([{"role": "user", "content": "who ?"}], max_tokens=3, temperature=0.7, seed=1).text
    )
    for prompt, options, words in (
        (PROMPT, {"max_tokens": 257}, "max_tokens"),
        (PROMPT, {"max_tokens": 100}, "leave room for 59 more"),
        (PROMPT, {"temperature": -1.0}, "temperature"),
        ("", {}, "the prompt is empty"),
        ([], {}, "messages"),
    ):
        with pytest.raises(InvalidRequestError, match=words):
            service.complete(prompt, **options)  # type: ignore[arg-type]
