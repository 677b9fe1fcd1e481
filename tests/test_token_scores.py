"""Scores by token: they sum to the row's score for every method, and are what autograd finds where each position of a
layer has weights of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tiny
import tiny_language
from conftest import FRAMEWORK_WARNINGS
from gradtrace import (
    Checkpoint,
    CheckpointRecorder,
    Index,
    QueryError,
    RowTokens,
    TaskError,
    load_checkpoints,
    open_index,
)
from gradtrace.layers import by_position, layer_type_of, position_axis
from gradtrace.tasks import CausalLM, SequenceClassification, SequenceToSequence, TextClassification, Vocabulary
from gradtrace.tasks.language import LanguageTask
from gradtrace.tasks.token_texts import token_texts
from gradtrace_indexer import add_kernels, build_index
from test_language_tasks import VOCABULARY, adapter, halves, plain

pytestmark = [*FRAMEWORK_WARNINGS, pytest.mark.usefixtures("offline")]
TEXTS = [*tiny_language.texts(7), "the cat ."]


@dataclass
class Case:
    """everywhere: whether every gradient has a position"""

    task: type[LanguageTask]
    model: Callable[[Path], Any]
    records: list[dict[str, Any]]
    options: dict[str, Any]
    everywhere: bool = True


CASES = {
    "gpt-2, tied": Case(CausalLM, plain(lambda: tiny_language.gpt2(VOCABULARY)), [{"text": t} for t in TEXTS], {}),
    "gpt-2, untied": Case(
        CausalLM,
        plain(lambda: tiny_language.gpt2(VOCABULARY, tie_word_embeddings=False)),
        [{"text": t} for t in TEXTS],
        {"reduction": "sum"},
    ),
    "llama, completions": Case(
        CausalLM,
        plain(lambda: tiny_language.llama(VOCABULARY)),
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
        # without the biases of relative positions, which are those of pairs
        {"prompt": "question", "completion": "answer", "layers": ["*", "!*relative_attention_bias*"]},
    ),
    "bert, classes": Case(
        SequenceClassification,
        plain(lambda: tiny_language.bert("ForSequenceClassification", VOCABULARY, num_labels=3)),
        [{"text": t, "label": len(t) % 3} for t in TEXTS],
        {},
        everywhere=False,  # the head sees the first token alone
    ),
}


@pytest.fixture(params=CASES, scope="module")
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Case, Index]:
    """An index whose rows are rounded to float16, of all coordinates."""
    case, home = CASES[request.param], tmp_path_factory.mktemp("case")
    case.model(home / "model")
    task = case.task(home / "model", tiny_language.json_lines(home / "train.jsonl", case.records), **case.options)
    checkpoints = load_checkpoints(task.pretrained.directory)
    index = build_index(task, checkpoints, home / "index", basis="none", precision="float16", progress=False)
    return case, index


def sums_to_its_score(found: RowTokens, scale: float, elsewhere: float) -> None:
    """scale: the largest score of any row.  elsewhere: how much of it may be elsewhere, at most"""
    for side in (found.training, found.query):
        assert len(side.tokens) == len(side.scores) > 1
        assert sum(side.scores) + side.elsewhere == pytest.approx(found.score, rel=1e-9, abs=1e-12)
        assert abs(side.elsewhere) <= elsewhere * scale


@pytest.mark.parametrize("method", ["tracin", "graddot", "cosine"])
def test_tokens_sum_to_the_scores_of_a_language_model(built: tuple[Case, Index], method: str) -> None:
    case, index = built
    query = index.task.train[3]
    scores = index.scores([query], method=method)[0]
    rows = index.token_scores(query, range(len(TEXTS)), method=method)
    assert [row.row for row in rows] == list(range(len(TEXTS)))
    scale = float(np.abs(scores).max())
    np.testing.assert_allclose([row.score for row in rows], scores, atol=1e-5 * scale)
    for row in rows:
        sums_to_its_score(row, scale, 2e-3 if case.everywhere else 1)
        if case.everywhere:
            assert np.abs(row.training.scores).sum() > 0.1 * abs(row.score)
    (own,) = (row for row in rows if row.row == 3)
    assert own.training.tokens == own.query.tokens
    np.testing.assert_allclose(own.training.scores, own.query.scores, atol=2e-3 * scale)  # but for the rounding


def test_tokens_read_as_the_text(built: tuple[Case, Index]) -> None:
    task = built[1].task
    assert isinstance(task, LanguageTask)
    example = task.train[2]
    tokens = task.tokens(example)
    if isinstance(task, SequenceToSequence):
        read, written = tokens
        start = task.encoder.tokenizer.pad_token  # of T5's decoder
        assert "".join(read).rstrip("\n") == task.render(example)["prompt"]
        assert written[0] == start
        assert task.render(example)["completion"].startswith("".join(written[1:]))
        return
    assert len(tokens) == len(example["input_ids"])
    assert "".join(tokens) == task.encoder.tokenizer.decode(example["input_ids"].tolist())


@pytest.mark.parametrize("rows", ["dense", "sparse"])
def test_a_contrast_of_completions_has_the_tokens_of_both(tmp_path: Path, rows: str) -> None:
    tiny_language.saved(tiny_language.gpt2(VOCABULARY), tmp_path / "model")
    task = CausalLM(tmp_path / "model", [{"text": text} for text in TEXTS])
    checkpoints = load_checkpoints(tmp_path / "model")
    index = build_index(task, checkpoints, tmp_path / "index", rows=rows, dimensions=100, progress=False)
    asked = {"prompt": "who sees a cat ?", "completion": " the dog ."}
    contrast = task.parse({**asked, "rather_than": " a fish ."})
    first, second = (task.parse({**asked, "completion": text}) for text in (" the dog .", " a fish ."))
    (found,), (one,), (other,) = (index.token_scores(query, [2]) for query in (contrast, first, second))
    assert found.query.tokens == [*one.query.tokens, *other.query.tokens]
    assert found.score == pytest.approx(index.scores([contrast])[0, 2], rel=1e-4)
    sums_to_its_score(found, np.abs(found.query.scores).sum(), 1e-2)
    if rows == "dense":  # sparse queries keep coordinates of their own
        difference = [*one.query.scores, *np.negative(other.query.scores)]
        np.testing.assert_allclose(found.query.scores, difference, atol=1e-5 * np.abs(difference).max())
    (chosen,) = index.token_scores(task.parse({**asked, "only": "dog"}), [2])
    assert chosen.query.tokens == one.query.tokens
    sums_to_its_score(chosen, np.abs(chosen.query.scores).sum(), 1e-2)


def by_position_of(model: nn.Module, name: str, ids: Tensor) -> Tensor:
    """The gradient of a text's mean loss by the weight of a Linear or Embedding that each position has a copy of.
    [positions, *weight.shape]"""
    module = model.get_submodule(name)
    copies = module.weight.detach().expand(len(ids), *module.weight.shape).clone().requires_grad_(True)

    def called(x: Tensor) -> Tensor:
        if isinstance(module, nn.Embedding):
            return torch.stack([copies[t][x[0, t]] for t in range(len(ids))])[None]
        return torch.stack([F.linear(x[0, t], copies[t]) for t in range(len(ids))])[None]

    original, module.forward = module.forward, called
    logits = model(input_ids=ids[None], use_cache=False).logits[0]
    loss = F.cross_entropy(logits[:-1], ids[1:])
    module.forward = original
    return torch.autograd.grad(loss, copies)[0]


@pytest.mark.parametrize(
    "layer",
    ["model.embed_tokens", "model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj", "lm_head"],
)
def test_a_layers_tokens_are_those_of_weights_that_each_position_has_alone(tmp_path: Path, layer: str) -> None:
    """With only this layer attributed."""
    model = tiny_language.llama(VOCABULARY).eval()
    tiny_language.saved(model, tmp_path / "model")
    task = CausalLM(tmp_path / "model", [{"text": text} for text in TEXTS[:5]], layers=[f"{layer}.weight"])
    checkpoints = load_checkpoints(tmp_path / "model")
    index = build_index(task, checkpoints, tmp_path / "index", basis="none", precision="float16", progress=False)
    found = index.token_scores(task.train[1], [4], method="graddot")[0]
    of_row, of_query = (by_position_of(model, layer, task.train[row]["input_ids"]) for row in (4, 1))
    for scores, expected in (
        (found.training.scores, of_row.flatten(1) @ of_query.sum(0).flatten()),
        (found.query.scores, of_query.flatten(1) @ of_row.sum(0).flatten()),
    ):
        np.testing.assert_allclose(scores, expected, atol=2e-3 * float(expected.abs().max()))


def test_normalisation_by_the_models_own_module_has_positions(tmp_path: Path) -> None:
    """Llama's RMSNorm: only the scale, whose gradient at a position is d times the normalised input there."""
    model = tiny_language.llama(VOCABULARY).eval()
    tiny_language.saved(model, tmp_path / "model")
    task = CausalLM(tmp_path / "model", [{"text": text} for text in TEXTS[:5]], layers=["model.norm.weight"])
    checkpoints = load_checkpoints(tmp_path / "model")
    index = build_index(task, checkpoints, tmp_path / "index", basis="none", precision="float16", progress=False)
    found = index.token_scores(task.train[1], [4], method="graddot")[0]
    ids, wholes = [task.train[row]["input_ids"] for row in (4, 1)], []
    for text in ids:
        hidden = model.model(input_ids=text[None], output_hidden_states=True).last_hidden_state[0].detach()
        hidden.requires_grad_(True)
        F.cross_entropy(model.lm_head(hidden)[:-1], text[1:]).backward()
        wholes.append(hidden.grad * hidden.detach())  # the scale is 1
    expected = wholes[0] @ wholes[1].sum(0)
    np.testing.assert_allclose(found.training.scores, expected, atol=2e-3 * float(expected.abs().max()))


class Sentences(nn.Module):
    """Words, a convolution over them, a normalisation, and the mean over the words."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.window = nn.Embedding(50, 6), nn.Conv1d(6, 8, 3, padding=1)
        self.norm, self.classifier = nn.LayerNorm(8), nn.Linear(8, 2)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.norm(self.window((self.words(ids) * mask[..., None]).mT).mT) * mask[..., None]
        return self.classifier(x.sum(1) / mask.sum(1, keepdim=True))


def sentences_task(kind: type[TextClassification] = TextClassification, **arguments: Any) -> TextClassification:
    vocabulary, data = Vocabulary(TEXTS, 50), (TEXTS, [row % 2 for row in range(len(TEXTS))])
    return kind(
        Sentences,
        data,
        vocabulary_size=50,
        encode=lambda text: vocabulary.encode(text, 40),
        **{"decode": vocabulary.decode, "class_names": ("-", "+"), **arguments},
    )


def trained(directory: Path, task: TextClassification) -> list[Checkpoint]:
    """Three checkpoints of a few steps of Adam, with its second moments."""
    torch.manual_seed(0)
    model = task.model()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02, eps=1e-3)
    batch = task.collate([task.train[row] for row in range(len(TEXTS))])
    with CheckpointRecorder(directory, every=2, optimizer_state=True) as recorder:
        for _ in range(6):
            optimizer.zero_grad()
            task.loss(model, batch).mean().backward()
            optimizer.step()
            recorder.step(model, optimizer)
    return load_checkpoints(directory)


class Positioned(TextClassification):
    """Attributes only what runs over the words."""

    layers = ("words.*", "window.*", "norm.*")


@pytest.fixture(
    params=[
        {"basis": "gauss-newton", "dimensions": 48, "average_segments": 2},
        {"basis": "spectral", "dimensions": 64, "precision": "int8"},
        {"basis": "two-sided", "dimensions": 64},
        {"basis": "rademacher", "dimensions": 32},
        {"basis": "none"},
        {"rows": "sparse", "dimensions": 200},
    ],
    ids=lambda arguments: arguments.get("basis", "sparse"),
    scope="module",
)
def positioned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Index:
    home, task = tmp_path_factory.mktemp("positioned"), sentences_task(Positioned)
    arguments = request.param if "rows" in request.param else {"precision": "float16", **request.param}
    build_index(task, trained(home / "checkpoints", task), home / "index", progress=False, **arguments)
    if "rows" not in request.param:
        add_kernels(home / "index", progress=False)
    return open_index(home / "index", task)


@pytest.mark.parametrize(
    "method", ["tracin", "tracin-adam", "graddot", "cosine", "influence", "source", "fast-source", "trak"]
)
def test_tokens_sum_to_the_scores_of_every_method(positioned: Index, method: str) -> None:
    if method not in positioned.methods:
        pytest.skip("the index does not answer by it")
    query, rows = positioned.task.train[2], [6, 0, 3]
    scores = positioned.scores([query], method=method)[0]
    rounding = 0.01 if positioned.manifest.precision == "float16" else 0.05
    for row, found in zip(rows, positioned.token_scores(query, rows, method=method), strict=True):
        assert found.row == row
        size = np.abs(found.query.scores).sum()
        assert found.score == pytest.approx(scores[row], abs=1e-4 * size)
        sums_to_its_score(found, size, 1)
        assert abs(found.query.elsewhere) <= 1e-4 * size  # nothing of the query is rounded
        assert abs(found.training.elsewhere) <= rounding * max(size, np.abs(found.training.scores).sum())


def test_a_contrasts_tokens_are_differences(positioned: Index) -> None:
    (query, _), rows = positioned.task.train[2], [1, 4]
    found = positioned.token_scores((query, 0), rows, target={"label": "-", "rather_than": "+"})
    sides = [positioned.token_scores((query, label), rows) for label in (0, 1)]
    for contrast, first, second in zip(found, *sides, strict=True):
        difference = np.subtract(first.query.scores, second.query.scores)
        np.testing.assert_allclose(contrast.query.scores, difference, atol=1e-5 * np.abs(first.query.scores).max())
        difference = np.subtract(first.training.scores, second.training.scores)
        np.testing.assert_allclose(contrast.training.scores, difference, atol=1e-5 * np.abs(difference).max())


def test_checkpoints_are_chosen_and_what_has_no_words_is_elsewhere(tmp_path: Path) -> None:
    task = sentences_task()
    index = build_index(task, trained(tmp_path / "checkpoints", task), tmp_path / "index", basis="none",
                        precision="float16", progress=False)  # fmt: skip
    names = [entry.name for entry in index.manifest.checkpoints]
    query = task.train[2]
    whole = index.token_scores(query, [5])[0]
    (hit,) = [hit for hit in index.influence([query], k=8, include=["layers"])[0].proponents if hit.row == 5] or [
        hit for hit in index.influence([query], k=8, include=["layers"])[0].opponents if hit.row == 5
    ]
    assert hit.layers is not None
    size = np.abs(whole.training.scores).sum()
    assert whole.training.elsewhere == pytest.approx(hit.layers["classifier"], abs=5e-3 * size)  # of the mean word
    assert whole.query.elsewhere == pytest.approx(hit.layers["classifier"], abs=1e-4 * size)
    alone = [index.token_scores(query, [5], checkpoints=[name])[0] for name in names]
    np.testing.assert_allclose(
        whole.query.scores, np.sum([found.query.scores for found in alone], axis=0), atol=1e-5 * size
    )


def test_what_has_no_tokens_is_refused(positioned: Index, tmp_path: Path) -> None:
    query = positioned.task.train[0]
    with pytest.raises(QueryError, match="row 99 is not in the index"):
        positioned.token_scores(query, [99])
    if "repsim" in positioned.methods:
        with pytest.raises(QueryError, match="of method 'repsim' cannot be split by token"):
            positioned.token_scores(query, [0], method="repsim")
    task = sentences_task(decode=None)
    assert not task.has_tokens
    plain_task = tiny.ClassTask(tiny.mlp, tiny.classes(9))
    index = tiny.build(plain_task, tmp_path)
    with pytest.raises(QueryError, match=r"ClassTask does not tell the tokens .* define tokens\(self, example\)"):
        index.token_scores(plain_task.train[0], [1])


@pytest.mark.parametrize(
    ("tokens", "problem"),
    [([1, 2], "something else than texts"), ([], "no token"), (["a"] * 7, "no layer of the model runs over 7 pos")],
)
def test_wrong_tokens_are_refused(tmp_path: Path, tokens: Sequence[Any], problem: str) -> None:
    class Told(tiny.ClassTask):
        def tokens(self, example: Any) -> Any:
            return tokens

    index = tiny.build(Told(tiny.mlp, tiny.classes(9)), tmp_path)
    with pytest.raises((TaskError, QueryError), match=problem):
        index.token_scores(index.task.train[0], [1])


@pytest.mark.parametrize("text", ["the cat at the hill .", "ünïcödé 猫 and 🐈 .", "", "🐈"])
def test_tokens_join_to_the_text(text: str) -> None:
    words = tiny_language.tokenizer()
    ids = words(text)["input_ids"]
    texts = token_texts(ids, words.decode)
    assert len(texts) == len(ids)
    assert "".join(texts) == text


def test_a_cut_character_ends_the_text() -> None:
    words = tiny_language.tokenizer()
    ids = words("a 🐈")["input_ids"][:-1]
    assert "".join(token_texts(ids, words.decode)) == words.decode(ids)


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(3, 4), (1, 7, 3), (1, 7, 4)),
    "linear by heads": (lambda: nn.Linear(3, 4), (1, 2, 7, 3), (1, 2, 7, 4)),
    "time first": (lambda: nn.Linear(3, 4), (1, 7, 1, 3), (1, 7, 1, 4)),
    "layer norm": (lambda: nn.LayerNorm(3), (1, 7, 3), (1, 7, 3)),
    "convolution": (lambda: nn.Conv1d(3, 4, 3, padding=1), (1, 3, 7), (1, 4, 7)),
    "grouped convolution": (lambda: nn.Conv1d(4, 6, 3, padding=1, groups=2), (1, 4, 7), (1, 6, 7)),
    "group norm": (lambda: nn.GroupNorm(2, 4), (1, 4, 7), (1, 4, 7)),
}


@pytest.mark.parametrize("case", LAYERS)
def test_positions_of_a_layer_are_examples_whose_gradients_sum_to_the_whole(case: str) -> None:
    """And each is that of the output gradient at this position alone, by autograd."""
    build, inputs, outputs = LAYERS[case]
    torch.manual_seed(0)
    module, x, d = build(), torch.randn(inputs), torch.randn(outputs)
    layer_type = layer_type_of(module)
    assert layer_type is not None
    layer = layer_type(module, ["weight", "bias"])
    axis = position_axis(layer, x, d, 7)
    assert axis is not None
    gradients = torch.cat([layer.gradient(*part) for _, *part in by_position(layer, x, d, axis)])
    torch.testing.assert_close(gradients.sum(0, keepdim=True), layer.gradient(x, d))
    for position in (0, 4):
        alone = torch.zeros_like(d)
        alone.select(axis, position).copy_(d.select(axis, position))
        expected = torch.autograd.grad(module(x), [*module.parameters()], alone)
        named = layer.parameter_gradients(gradients[position : position + 1])
        for name, value in zip(("weight", "bias"), expected, strict=True):
            torch.testing.assert_close(named[name][0], value)


def test_positions_that_cannot_be_told_are_none() -> None:
    layer = layer_type_of(nn.Linear(3, 4))(nn.Linear(3, 4), ["weight"])  # type: ignore[misc]
    assert position_axis(layer, torch.randn(1, 3), torch.randn(1, 4), 1) is None  # a single vector
    assert position_axis(layer, torch.randn(1, 5, 5, 3), torch.randn(1, 5, 5, 4), 5) is None  # two candidates
    assert position_axis(layer, torch.randn(1, 6, 3), torch.randn(1, 6, 4), 5) is None
