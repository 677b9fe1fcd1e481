"""Rows as trainers leave them: packed ones, TRL's masks, several labels, and the loss that a trainer took."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny_language
from conftest import FRAMEWORK_WARNINGS
from gradtrace.errors import DatasetError, QueryError
from gradtrace.tasks import CausalLM, SequenceClassification
from gradtrace.tasks.language import token_summary

pytestmark = [*FRAMEWORK_WARNINGS, pytest.mark.usefixtures("offline")]
DOCUMENTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13], [14, 15]]
PACKED = [{"input_ids": [*DOCUMENTS[0], *DOCUMENTS[1]]}, {"input_ids": DOCUMENTS[2]}, {"input_ids": DOCUMENTS[3]}]
BOUNDARIES = {
    "seq_lengths": [[3, 2], [4], [2]],
    "position_ids": [[0, 1, 2, 0, 1], [0, 1, 2, 3], [0, 1]],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_language.saved(tiny_language.gpt2(340), tmp_path_factory.mktemp("rows") / "model")


def packed(column: str) -> list[dict[str, Any]]:
    return [{**row, column: values} for row, values in zip(PACKED, BOUNDARIES[column], strict=True)]


@pytest.mark.parametrize("column", BOUNDARIES)
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "saved", "list"])
def test_the_documents_of_packed_rows_are_rows(model: Path, column: str, kind: str, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    saved, source = datasets.Dataset.from_list(packed(column)), tmp_path / f"packed.{kind}"
    {
        "jsonl": saved.to_json,
        "parquet": saved.to_parquet,
        "saved": saved.save_to_disk,
        "list": lambda _: None,
    }[kind](source)
    task = CausalLM(model, packed(column) if kind == "list" else source)
    assert [task.train[row]["input_ids"].tolist() for row in range(len(task.train))] == DOCUMENTS
    assert any("documents of 3 packed rows" in text for text in token_summary(task, 10).sentences())


def test_labels_and_masks_of_packed_rows_are_taken_apart(model: Path) -> None:
    row = {"input_ids": [5, 6, 7, 8, 9], "completion_mask": [0, 1, 1, 0, 1], "seq_lengths": [3, 2]}
    assert [example["labels"].tolist() for example in CausalLM(model, [row]).train] == [[-100, 6, 7], [-100, 9]]
    labelled = {"input_ids": [5, 6, 7, 8, 9], "labels": [-100, 6, 7, -100, 9], "seq_lengths": [3, 2]}
    assert [example["labels"].tolist() for example in CausalLM(model, [labelled]).train] == [[-100, 6, 7], [-100, 9]]


def test_lengths_that_do_not_fit_are_refused(model: Path) -> None:
    with pytest.raises(DatasetError, match="has 3 input_ids, and its seq_lengths are 4 in sum"):
        len(CausalLM(model, [{"input_ids": [1, 2, 3], "seq_lengths": [4]}]).train)


def test_documents_have_the_gradients_that_a_packed_batch_has(model: Path) -> None:
    """Of a trainer without padding: one sequence, attention within documents, positions from 0 in each."""
    eager = tiny_language.transformers.AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager").eval()
    ids = torch.tensor([[token for document in DOCUMENTS for token in document]])
    number = torch.tensor([place for place, document in enumerate(DOCUMENTS) for _ in document])
    positions = torch.tensor([[place for document in DOCUMENTS for place in range(len(document))]])
    allowed = (number[:, None] == number) & (torch.arange(len(number))[:, None] >= torch.arange(len(number)))
    mask = torch.where(allowed, 0.0, torch.finfo(torch.float32).min)[None, None]
    logits = eager(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False).logits[0]
    losses = torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="none")
    within = number[1:] == number[:-1]  # the first token of a document is predicted from nothing
    total = gradient(eager, losses[within].sum())
    task = CausalLM(model, packed("seq_lengths"), reduction="sum")
    batch = task.collate([task.train[row] for row in range(len(task.train))])
    torch.testing.assert_close(gradient(task.model().eval(), task.loss(task.model(), batch).sum()), total)


def gradient(model: Any, loss: Tensor) -> Tensor:
    return torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, list(model.parameters()))])


def test_trls_masks_tell_which_tokens_count(model: Path) -> None:
    row = {"input_ids": [5, 6, 7, 8], "completion_mask": [0, 1, 1, 1], "assistant_masks": [1, 1, 0, 1]}
    assert CausalLM(model, [row]).train[0]["labels"].tolist() == [-100, 6, -100, 8]
    assert CausalLM(model, [row], loss_on="all").train[0]["labels"].tolist() == [5, 6, -100, 8]
    with pytest.raises(DatasetError, match="4 input_ids and 2 values in its mask"):
        CausalLM(model, [{**row, "completion_mask": [0, 1]}]).train[0]


def test_the_loss_is_the_trainers_where_a_trainer_wrote_the_model(model: Path, tmp_path: Path) -> None:
    assert CausalLM(model, [{}]).reduction == "mean"
    for file in ("checkpoint-3/trainer_state.json", "training_args.bin", "trainer_state.json"):
        directory = tiny_language.saved(tiny_language.gpt2(340), tmp_path / file.replace("/", "-"))
        (directory / file).parent.mkdir(exist_ok=True)
        (directory / file).write_text("{}")
        assert CausalLM(directory, [{}]).reduction == "sum"
        assert CausalLM(directory, [{}], reduction="mean").reduction == "mean"


def several(home: Path, **options: Any) -> SequenceClassification:
    names = {0: "sport", 1: "money", 2: "art"}
    made = tiny_language.bert(
        "ForSequenceClassification", 340, id2label=names, problem_type="multi_label_classification"
    )
    return SequenceClassification(tiny_language.saved(made, home), [{}], **options)


def test_several_labels_are_flags_or_names(tmp_path: Path) -> None:
    task = several(tmp_path)
    for labels in ([1, 0, 1], [1.0, 0.0, 1.0], ["art", "sport"]):
        assert task.example({"text": "the cat", "labels": labels})["labels"].tolist() == [1, 0, 1]
    assert several(tmp_path, label="topics").example({"text": "x", "topics": []})["labels"].tolist() == [0, 0, 0]
    assert task.render(task.example({"text": "the cat", "labels": [1, 0, 1]}))["labels"] == ["sport", "art"]
    for wrong in ([1, 0], [1, 0, 2], "art", None, ["war"], 1):
        with pytest.raises(QueryError, match=r"give 0 or 1 for each of the 3 classes|one of sport, money, art"):
            task.parse({"text": "the cat", "labels": wrong})
