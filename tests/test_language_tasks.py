"""Tasks of Hugging Face models: which tokens count, padding, and scores beside plain autograd through the model's own
loss."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tiny_language
from conftest import FRAMEWORK_WARNINGS
from gradtrace import load_checkpoints
from gradtrace.errors import DatasetError, QueryError, TaskError
from gradtrace.tasks import CausalLM, SequenceClassification, SequenceToSequence, TokenClassification
from gradtrace.tasks.language import LanguageTask
from gradtrace.tasks.language.encoding import kept_tokens
from gradtrace_indexer import build_index

pytestmark = [*FRAMEWORK_WARNINGS, pytest.mark.usefixtures("offline")]
VOCABULARY = 340
TEXTS = tiny_language.texts(16)
TAGS = ["O", "ANIMAL", "PLACE"]


@pytest.fixture(scope="module")
def words() -> Any:
    return tiny_language.tokenizer()


def with_lora(model: nn.Module, kind: str, *modules: str) -> Any:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    torch.manual_seed(1)
    config = peft.LoraConfig(r=2, target_modules=list(modules), task_type=kind, init_lora_weights=False)
    return peft.get_peft_model(model, config)


@dataclass
class Case:
    """task: made from a model's directory and records;  model: puts the model there, and gives what was saved"""

    task: type[LanguageTask]
    model: Callable[[Path], Any]
    records: list[dict[str, Any]]
    options: dict[str, Any]


def plain(made: Callable[[], Any], **saving: Any) -> Callable[[Path], Any]:
    def save(directory: Path) -> Any:
        model = made()
        tiny_language.saved(model, directory, **saving)
        return model

    return save


def adapter(base: Callable[[], Any], kind: str, *modules: str) -> Callable[[Path], Any]:
    """Beside its base model, which the adapter names by its path."""

    def save(directory: Path) -> Any:
        tiny_language.saved(base(), directory.with_name("base"))
        loaded = type(base()).from_pretrained(directory.with_name("base"))
        model = with_lora(loaded, kind, *modules)
        model.save_pretrained(directory)
        return model

    return save


def tagged(text: str) -> dict[str, Any]:
    places = {"house", "river", "tree", "hill"}
    animals = {"cat", "dog", "bird", "fish"}
    return {"words": text.split(), "tags": [1 if w in animals else 2 if w in places else 0 for w in text.split()]}


def tags_model() -> Any:
    return tiny_language.bert("ForTokenClassification", VOCABULARY, id2label=dict(enumerate(TAGS)))


def halves(text: str) -> dict[str, str]:
    head, _, tail = text.partition(" sees" if " sees" in text else " likes" if " likes" in text else " fears")
    return {"question": head, "answer": tail or " ."}


CASES = {
    "gpt-2, tied": Case(CausalLM, plain(lambda: tiny_language.gpt2(VOCABULARY)), [{"text": t} for t in TEXTS], {}),
    "gpt-2, untied, sharded": Case(
        CausalLM,
        plain(lambda: tiny_language.gpt2(VOCABULARY, tie_word_embeddings=False), max_shard_size="12KB"),
        [{"review": t} for t in TEXTS],
        {"text": "review"},
    ),
    "gpt-2, completions": Case(
        CausalLM,
        plain(lambda: tiny_language.gpt2(VOCABULARY)),
        [halves(t) for t in TEXTS],
        {"prompt": "question", "completion": "answer"},
    ),
    "llama, lora": Case(
        CausalLM,
        adapter(lambda: tiny_language.llama(VOCABULARY), "CAUSAL_LM", "q_proj", "v_proj"),
        [{"text": t} for t in TEXTS],
        {},
    ),
    "t5": Case(
        SequenceToSequence,
        plain(lambda: tiny_language.t5(VOCABULARY)),
        [halves(t) for t in TEXTS],
        {"prompt": "question", "completion": "answer"},
    ),
    "bert, classes": Case(
        SequenceClassification,
        plain(lambda: tiny_language.bert("ForSequenceClassification", VOCABULARY, num_labels=3)),
        [{"text": t, "label": len(t) % 3} for t in TEXTS],
        {},
    ),
    "bert, pairs, a number": Case(
        SequenceClassification,
        plain(lambda: tiny_language.bert("ForSequenceClassification", VOCABULARY, num_labels=1)),
        [{"text": t, "text_pair": TEXTS[0], "score": len(t) / 50} for t in TEXTS],
        {"label": "score"},
    ),
    "bert, several classes": Case(
        SequenceClassification,
        plain(
            lambda: tiny_language.bert(
                "ForSequenceClassification", VOCABULARY, num_labels=3, problem_type="multi_label_classification"
            )
        ),
        [{"text": t, "labels": [len(t) % 2, len(t) % 3 // 2, 1]} for t in TEXTS],
        {},
    ),
    "bert, classes, lora": Case(
        SequenceClassification,
        adapter(lambda: tiny_language.bert("ForSequenceClassification", VOCABULARY, num_labels=3), "SEQ_CLS", "query"),
        [{"text": t, "label": len(t) % 3} for t in TEXTS],
        {},
    ),
    "bert, words": Case(
        TokenClassification, plain(tags_model), [tagged(t) for t in TEXTS], {"text": "words", "label": "tags"}
    ),
}


@pytest.fixture(params=CASES, scope="module")
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[LanguageTask, Any]:
    """A task, and the model that was saved for it."""
    case, home = CASES[request.param], tmp_path_factory.mktemp("case")
    model = case.model(home / "model")
    return case.task(
        home / "model", tiny_language.json_lines(home / "train.jsonl", case.records), **case.options
    ), model


def model_loss(model: nn.Module, example: dict[str, Tensor]) -> Tensor:
    """What transformers computes for one example: the mean over its tokens."""
    inputs = {name: example[name][None] for name in ("input_ids", "token_type_ids") if name in example}
    labels = example["labels"][None] if "labels" in example else torch.tensor([example["label"]])
    return model(**inputs, labels=labels).loss  # type: ignore[no-any-return]


def gradient(model: nn.Module, example: dict[str, Tensor]) -> Tensor:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(model_loss(model, example), parameters, allow_unused=True)
    return torch.cat([grad.flatten().double() for grad in gradients if grad is not None])


def test_scores_are_those_of_plain_autograd(made: tuple[LanguageTask, Any], tmp_path: Path) -> None:
    task, model = made
    checkpoints = load_checkpoints(task.pretrained.directory)
    index = build_index(task, checkpoints, tmp_path / "index", basis="none", precision="float16", batch_size=5,
                        progress=False)  # fmt: skip
    scores = index.scores([task.train[row] for row in (0, 3)], method="tracin")
    gradients = torch.stack([gradient(model.eval(), task.train[row]) for row in range(len(task.train))])
    expected = (gradients[[0, 3]] @ gradients.T).numpy()
    for found, wanted in zip(scores, expected, strict=True):
        assert np.corrcoef(found, wanted)[0, 1] >= 0.9999
        np.testing.assert_allclose(found, wanted, atol=2e-3 * np.abs(wanted).max())


def test_losses_do_not_depend_on_padding(made: tuple[LanguageTask, Any]) -> None:
    task, model = made
    examples = [task.train[row] for row in range(len(task.train))]
    assert len({len(example["input_ids"]) for example in examples}) > 1
    with torch.no_grad():
        losses = task.loss(task.model().eval(), task.collate(examples))
        alone = torch.stack([model_loss(model.eval(), example) for example in examples])
    torch.testing.assert_close(losses, alone)


def test_what_is_shown_is_taken_as_a_request(made: tuple[LanguageTask, Any]) -> None:
    task, _ = made
    example = task.train[1]
    shown = json.loads(json.dumps(task.render(example)))
    if isinstance(task, TokenClassification):
        shown = {"tokens": shown["text"].split(), "labels": shown["labels"]}
    if (label := task.label(example)) is not None:
        shown["label"] = label
    parsed = task.parse(shown)
    assert parsed.keys() == example.keys()
    for name, value in example.items():
        assert (parsed[name] == value) if not isinstance(value, Tensor) else torch.equal(parsed[name], value)


def causal(home: Path, **options: Any) -> CausalLM:
    tiny_language.saved(tiny_language.gpt2(VOCABULARY), home)
    return CausalLM(home, [{}], **options)


def labels_of(task: LanguageTask, record: dict[str, Any]) -> tuple[list[int], list[int]]:
    example = task.example(record)
    return example["input_ids"].tolist(), example["labels"].tolist()


def test_a_completions_labels_are_those_made_by_hand(tmp_path: Path, words: Any) -> None:
    prompt, completion = "who sees a cat ?", " the dog ."
    asked, answered = words(prompt)["input_ids"], [*words(completion)["input_ids"], words.eos_token_id]
    record = {"prompt": prompt, "completion": completion}
    assert labels_of(causal(tmp_path), record) == ([*asked, *answered], [-100] * len(asked) + answered)
    assert labels_of(causal(tmp_path, loss_on="all"), record) == ([*asked, *answered], [*asked, *answered])
    assert labels_of(causal(tmp_path, append_eos=False), record)[0] == [*asked, *answered[:-1]]
    shown = causal(tmp_path).render(causal(tmp_path).example(record))
    assert shown == {"text": prompt + completion, "prompt": prompt, "completion": completion}


def test_a_token_over_the_border_belongs_to_the_completion(tmp_path: Path) -> None:
    ids, labels = labels_of(causal(tmp_path), {"prompt": "the ca", "completion": "t at"})
    assert ids == labels_of(causal(tmp_path), {"text": "the cat at"})[0] + [3]
    assert labels == [-100, *ids[1:]]


def test_of_a_conversation_all_tokens_count_or_the_assistants(tmp_path: Path, words: Any) -> None:
    said = [("user", "who ?"), ("assistant", "the cat"), ("user", "a dog ?"), ("assistant", "the bird .")]
    messages = [{"role": role, "content": text} for role, text in said]
    tokens = lambda text: words(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    stretches = ["<user>who ?<end><assistant>", "the cat<end>", "<user>a dog ?<end><assistant>", "the bird .<end>"]
    ids = [token for text in stretches for token in tokens(text)]
    assert ids == words.apply_chat_template(messages, return_dict=False)
    masked = [token if number % 2 else -100 for number, text in enumerate(stretches) for token in tokens(text)]
    assert labels_of(causal(tmp_path), {"messages": messages}) == (ids, ids)
    assert labels_of(causal(tmp_path, loss_on="completion"), {"messages": messages}) == (ids, masked)
    split = {"prompt": messages[:3], "completion": messages[3:]}
    last = len(tokens(stretches[3]))
    assert labels_of(causal(tmp_path), split) == (ids, [-100] * (len(ids) - last) + ids[-last:])


def test_pretokenised_rows_keep_their_labels(tmp_path: Path) -> None:
    ids, labels = [9, 10, 11, 12], [-100, 10, -100, 12]
    assert labels_of(causal(tmp_path), {"input_ids": ids, "labels": labels}) == (ids, labels)
    assert labels_of(causal(tmp_path), {"input_ids": ids}) == (ids, ids)
    for record in ({"input_ids": [1, VOCABULARY]}, {"input_ids": [1, 2], "labels": [1]}, {"input_ids": [1, -100]}):
        with pytest.raises(DatasetError, match=r"from 0 to 339|one label for each"):
            causal(tmp_path).example(record)


def test_the_loss_is_the_mean_or_the_sum_over_an_examples_own_tokens(tmp_path: Path) -> None:
    records = [{"prompt": "the cat", "completion": " sees a dog ."}, {"text": "the bird at the tree ."}]
    mean, total = causal(tmp_path), causal(tmp_path, reduction="sum")
    batch = mean.collate([mean.example(record) for record in records])
    means, sums = (task.loss(task.model().eval(), batch) for task in (mean, total))
    counts = [mean.counted(mean.example(record)) for record in records]
    assert counts == [5, 5]  # four words and the end; all but the first
    torch.testing.assert_close(sums, means * torch.tensor(counts))


@pytest.mark.parametrize("limit", [4, 6, 9, 30])
@pytest.mark.parametrize("pair", [None, "a dog .", "the bird at the tree likes a fish at the hill ."])
def test_long_rows_are_cut_as_transformers_does(pair: str | None, limit: int, words: Any) -> None:
    from tokenizers.processors import TemplateProcessing

    bert = tiny_language.tokenizer()
    bert.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 2), ("</s>", 3)]
    )
    text = "the cat at the house sees a dog ."
    whole = bert(text, pair)
    kept = kept_tokens(whole.sequence_ids(), limit)
    assert (
        torch.tensor(whole["input_ids"])[kept].tolist() == bert(text, pair, truncation=True, max_length=limit).input_ids
    )


def test_rows_are_cut_to_what_the_model_takes(tmp_path: Path) -> None:
    task = causal(tmp_path)
    example, cut = task.encoded({"text": " the" * 100})
    assert (len(example["input_ids"]), cut) == (64, 36)
    with pytest.raises(QueryError, match="36 tokens more than the 64"):
        task.parse({"text": " the" * 100})
    assert len(causal(tmp_path, max_length=8).example({"text": " the" * 100})["input_ids"]) == 8


def test_unfit_rows_and_directories_are_refused_with_the_remedy(tmp_path: Path) -> None:
    task = causal(tmp_path / "model")
    with pytest.raises(DatasetError, match=r"none to predict.*--skip-bad-rows"):
        task.example({"text": ""})
    with pytest.raises(DatasetError, match=r"the row has review; name the column.*--text review"):
        task.example({"review": "fine"})
    with pytest.raises(QueryError, match="it takes text, prompt"):
        task.parse({"txt": "fine"})
    with pytest.raises(TaskError, match="there is no directory"):
        CausalLM(tmp_path / "none", [])
    with pytest.raises(TaskError, match=r"holds no config.json"):
        CausalLM(tmp_path, [])
    (tmp_path / "model" / "tokenizer.json").unlink()
    (tmp_path / "model" / "tokenizer_config.json").unlink()
    with pytest.raises(TaskError, match=r"no tokenizer was read.*--tokenizer"):
        CausalLM(tmp_path / "model", [{}]).example({"text": "fine"})


def test_copies_of_an_adapted_model_share_its_base(tmp_path: Path) -> None:
    import copy

    CASES["llama, lora"].model(tmp_path / "model")
    model = CausalLM(tmp_path / "model", [{}]).model()
    other = copy.deepcopy(model).double()
    other = copy.deepcopy(model)
    for (name, parameter), (_, copied) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert parameter.dtype == torch.float32
        assert (parameter.data_ptr() == copied.data_ptr()) == ("lora" not in name)
        assert copied.requires_grad == ("lora" in name)
