"""SequenceClassification and TokenClassification: a class, or a number, for each text or word."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from gradtrace.errors import DatasetError
from gradtrace.layers.base import wide
from gradtrace.task import Batch, Example, Label
from gradtrace.tasks.language.encoding import IGNORED, kept_tokens
from gradtrace.tasks.language.losses import token_losses
from gradtrace.tasks.language.options import Kind
from gradtrace.tasks.language.records import Record
from gradtrace.tasks.language.task import LanguageTask
from gradtrace.tasks.payload import listed, number, shown


class _Classifier(LanguageTask):
    """A model whose configuration names the classes."""

    @cached_property
    def class_names(self) -> list[str] | None:  # type: ignore[override]
        """As the configuration names them; None where it numbers them."""
        names = [str(name) for _, name in sorted(self._model.config.id2label.items())]
        return None if names == [f"LABEL_{label}" for label in range(len(names))] else names

    @property
    def classes(self) -> int:
        return int(self._model.config.num_labels)

    def class_number(self, label: Any) -> int:
        """Of a class's number or name. Raises DatasetError for any other label."""
        names = self.class_names or []
        if isinstance(label, str) and label in names:
            return names.index(label)
        if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < self.classes:
            return label
        named = f" or one of {listed(names)}" if names else ""
        raise DatasetError(f"label {shown(label)}: give a class number from 0 to {self.classes - 1}{named}")


class SequenceClassification(_Classifier):
    """A class for each text or pair of texts; a number, if the model has a single output.

    A row is a text, or two (`text_pair`), or `input_ids`; with a label. The loss is the cross-entropy of the label, or
    the squared error. Where the model gives several labels at once, a row has 0 or 1 for each class, or a list of the
    names of its classes (`labels`), and the loss is the mean of the classes' binary cross-entropies.

        TASK = SequenceClassification("runs/bert", "train.parquet", text="sentence1", text_pair="sentence2")

    Requests hold the same, under the names text, text_pair, input_ids and label; the label is optional.
    """

    kind: ClassVar[Kind] = "SequenceClassification"
    reduces_tokens: ClassVar = False
    keys: ClassVar = ("text", "text_pair", "input_ids", "token_type_ids", "label", "labels")

    @cached_property
    def _regresses(self) -> bool:
        return not self._several and (self.classes == 1 or self._model.config.problem_type == "regression")

    @cached_property
    def _several(self) -> bool:
        """Whether an example has several labels at once."""
        return bool(self._model.config.problem_type == "multi_label_classification")

    @property
    def has_predict(self) -> bool:
        return not self._several

    @property
    def has_label(self) -> bool:
        return not self._several

    def encoded(self, record: Record) -> tuple[Example, int]:
        """input_ids: int64 [length];  token_type_ids: the same, if the model has them;  second: position of the second
        text's first token, 0 if there is none;  label: int, float or None; of several, labels: float32 [classes]"""
        values = self.columns(record)
        if "input_ids" in values:
            names = [name for name in ("input_ids", "token_type_ids") if record.get(name) is not None]
            inputs = {name: self.ids(name, record[name]) for name in names}
            sequences: list[int | None] = [0] * len(inputs["input_ids"])
        elif "text" in values:
            tokens = self.encoder.tokenizer(values["text"], values.get("text_pair"), verbose=False)
            names = [name for name in ("input_ids", "token_type_ids") if name in tokens]
            inputs = {name: torch.tensor(tokens[name], dtype=torch.int64) for name in names}
            sequences = tokens.sequence_ids()
        else:
            raise self.lacks(record, "text", "input_ids")
        if not sequences:
            raise DatasetError(f"the row {shown(dict(record))} has no token; leave it out")
        kept = kept_tokens(sequences, self.encoder.max_length)
        second = sequences.index(1) if 1 in sequences else len(sequences)
        example = {name: value[kept] for name, value in inputs.items()}
        labels = {"labels": self._label_flags(values)} if self._several else {"label": self._label(values)}
        return {**example, "second": int(kept[:second].sum()), **labels}, int((~kept).sum())

    def _label_flags(self, values: Mapping[str, Any]) -> Tensor:
        """1 for the classes of an example, 0 for the others. float32 [classes]"""
        labels = values.get("label", values.get("labels"))
        if not isinstance(labels, Sequence | np.ndarray) or isinstance(labels, str):
            raise DatasetError(f"labels {shown(labels)}: give 0 or 1 for each of the {self.classes} classes, or names")
        if (len(labels) and isinstance(labels[0], str)) or not len(labels):
            flags = torch.zeros(self.classes)
            flags[[self.class_number(label) for label in labels]] = 1
            return flags
        if len(labels) != self.classes or any(label not in (0, 1) for label in labels):
            raise DatasetError(f"labels {shown(labels)}: give 0 or 1 for each of the {self.classes} classes, or names")
        return torch.tensor([float(label) for label in labels])

    def _label(self, values: Mapping[str, Any]) -> Label | None:
        label = values.get("label", values.get("labels"))
        if label is None or not self._regresses:
            return None if label is None else self.class_number(label)
        value = number(label)
        if value is None:
            raise DatasetError(f"label {shown(label)}: give a finite number, or leave it out")
        return value

    def token_ids(self, example: Example) -> tuple[Tensor, Tensor]:
        """The loss is of the text as a whole, so that all count."""
        return example["input_ids"], torch.ones_like(example["input_ids"], dtype=torch.bool)

    def label(self, example: Example) -> Label | None:
        """None of several: they are part of the example."""
        return example.get("label")  # type: ignore[no-any-return]

    def with_label(self, example: Example, label: Label) -> Example:
        return {**example, "label": label}

    def collate(self, examples: list[Example]) -> Batch:
        """input_ids, attention_mask, token_type_ids: int64 [batch, longest];  label: int64 or float32 [batch], of
        several float32 [batch, classes]"""
        batch = self.inputs([example["input_ids"] for example in examples])
        if "token_type_ids" in examples[0]:
            types = [example["token_type_ids"] for example in examples]
            batch["token_type_ids"] = pad_sequence(types, batch_first=True)
        if self._several:
            return {**batch, "label": torch.stack([example["labels"] for example in examples])}
        dtype = torch.float32 if self._regresses else torch.int64
        return {**batch, "label": torch.tensor([example["label"] for example in examples], dtype=dtype)}

    def predict(self, model: nn.Module, batch: Batch) -> Tensor:
        """[batch, classes] logits, or [batch] values"""
        logits: Tensor = model(**{name: value for name, value in batch.items() if name != "label"}).logits
        return wide(logits[:, 0] if self._regresses else logits)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        predicted = self.predict(model, batch)
        if self._several:
            return F.binary_cross_entropy_with_logits(predicted, batch["label"], reduction="none").mean(1)
        if self._regresses:
            error: Tensor = predicted - batch["label"]
            return error.square()
        return F.cross_entropy(predicted.double(), batch["label"], reduction="none").float()  # as `Classification`

    def render(self, example: Example) -> dict[str, Any]:
        first, second = example["input_ids"][: example["second"]], example["input_ids"][example["second"] :]
        pair = {"text_pair": self.encoder.decode(second)} if len(second) else {}
        return {"text": self.encoder.decode(first), **pair, **self._shown_labels(example)}

    def _shown_labels(self, example: Example) -> dict[str, Any]:
        if not self._several:
            return {}
        names = self.class_names
        flags = example["labels"].int().tolist()
        return {"labels": [name for name, flag in zip(names, flags, strict=True) if flag] if names else flags}


class TokenClassification(_Classifier):
    """A class for each word.

    A row is a list of words (`tokens`) with a list of labels (`labels`), numbers or names; or `input_ids` with labels
    that are -100 at tokens that do not count. Of a word's tokens, the first has its label. The loss of a row is the
    mean cross-entropy of its labels, or their sum.

        TASK = TokenClassification("runs/ner", "train.jsonl", text="words", label="ner_tags")

    Requests hold the same, under the names tokens, labels and input_ids.
    """

    kind: ClassVar[Kind] = "TokenClassification"
    keys: ClassVar = ("tokens", "input_ids", "labels")

    def column(self, name: str) -> str:
        given = {"tokens": self.options.text, "labels": self.options.label}
        return given.get(name) or name

    def encoded(self, record: Record) -> tuple[Example, int]:
        """input_ids, labels: int64 [length]"""
        values = self.columns(record)
        labels = [label if label == IGNORED else self.class_number(label) for label in values.get("labels", ())]
        if "input_ids" in values:
            ids = self.ids("input_ids", values["input_ids"])
            sequences: list[int | None] = [0] * len(ids)
        elif "tokens" in values:
            tokens = self.encoder.tokenizer(values["tokens"], is_split_into_words=True, verbose=False)
            ids, sequences = torch.tensor(tokens["input_ids"], dtype=torch.int64), tokens.sequence_ids()
            _check_count(labels, values["tokens"])
            labels = _at_first_tokens(labels, tokens.word_ids())
        else:
            raise self.lacks(record, "tokens", "input_ids")
        _check_count(labels, ids)
        kept = kept_tokens(sequences, self.encoder.max_length)
        example = {"input_ids": ids[kept], "labels": torch.tensor(labels, dtype=torch.int64)[kept]}
        return example, int((~kept).sum())

    def token_ids(self, example: Example) -> tuple[Tensor, Tensor]:
        return example["input_ids"], example["labels"] != IGNORED

    def collate(self, examples: list[Example]) -> Batch:
        """input_ids, attention_mask and labels, int64 [batch, longest]"""
        labels = self.padded_labels([example["labels"] for example in examples])
        return {**self.inputs([example["input_ids"] for example in examples]), "labels": labels}

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return self.reduced(*token_losses(logits, batch["labels"]))

    def render(self, example: Example) -> dict[str, Any]:
        """The words, each from a token that counts up to the next, and their labels."""
        starts = (example["labels"] != IGNORED).nonzero().flatten().tolist()
        words = [self.encoder.decode(ids).strip() for ids in example["input_ids"].tensor_split(starts)]
        labels, names = example["labels"][starts].tolist(), self.class_names
        return {"text": " ".join(filter(None, words)), "labels": [names[n] if names else n for n in labels]}


def _check_count(labels: Sequence[int], words: Sequence[Any] | Tensor) -> None:
    if len(labels) != len(words):
        raise DatasetError(f"a row has {len(words)} tokens and {len(labels)} labels; give one label for each")


def _at_first_tokens(labels: Sequence[int], words: Sequence[int | None]) -> list[int]:
    """The label of each token: of a word's first token that of the word, of the others -100.

    words: for each token the number of its word, None for special tokens
    """
    previous = [None, *words[:-1]]
    return [
        IGNORED if word is None or word == before else labels[word]
        for word, before in zip(words, previous, strict=True)
    ]
