"""SequenceToSequence: models that read an input and write a target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradtrace.errors import DatasetError
from gradtrace.task import Batch, Example
from gradtrace.tasks.language.encoding import IGNORED, Encoded, Piece
from gradtrace.tasks.language.losses import token_losses
from gradtrace.tasks.language.options import Kind
from gradtrace.tasks.language.questions import WritingTask
from gradtrace.tasks.language.records import Record
from gradtrace.tasks.payload import shown


class SequenceToSequence(WritingTask):
    """An encoder and a decoder, as in T5 and BART.

    A row is a prompt, which the encoder reads, with a completion, which the decoder writes; or `input_ids` with
    `labels`. The loss of a row is the mean cross-entropy of its completion's tokens, or their sum.

        TASK = SequenceToSequence("runs/t5", "train.csv", prompt="question", completion="answer")

    Requests hold the same, under the names prompt, completion, input_ids and labels, and may choose among the
    completion's tokens or compare two completions, see `WritingTask`.
    """

    kind: ClassVar[Kind] = "SequenceToSequence"
    keys: ClassVar = ("text", "prompt", "completion", "input_ids", "labels")  # a text is what `render` shows people

    def encoded(self, record: Record) -> tuple[Example, int]:
        values = self.columns(record)
        if {"input_ids", "labels"} <= values.keys():
            read, written = self.ids("input_ids", values["input_ids"]), self.ids("labels", values["labels"])
            source = self.encoder.shortened(read, read != IGNORED, [0] * len(read))
            target = self.encoder.shortened(written, written != IGNORED, [0] * len(written))
        elif {"prompt", "completion"} <= values.keys():
            source, target = self._tokens(values["prompt"]), self._tokens(values["completion"])
        else:
            raise self.lacks(record, "prompt", "completion", "input_ids", "labels")
        if not len(source.ids) or not target.counts.any():
            raise DatasetError(f"the row {shown(dict(record))} has no token to read, or none to write; leave it out")
        return {"input_ids": source.ids, "labels": target.labels}, source.cut + target.cut

    def _tokens(self, text: str) -> Encoded:
        return self.encoder.encode([Piece(text, True)], eos=bool(self.options.append_eos))

    def token_ids(self, example: Example) -> tuple[Tensor, Tensor]:
        """Those that are read, then those that are written."""
        read, written = example["input_ids"], example["labels"][example["labels"] != IGNORED]
        return torch.cat([read, written]), torch.arange(len(read) + len(written)) >= len(read)

    def tokens(self, example: Example) -> list[list[str]]:
        """Those that the encoder reads, and those that the decoder reads: a start token, and all that are written but
        the last."""
        read, labels = example["input_ids"], self.all_labels(example)
        padding = [""] * self._padding(len(read), len(labels))
        written = _base(self._model).prepare_decoder_input_ids_from_labels(labels=labels[None])[0]
        return [self.encoder.texts(read) + padding, self.encoder.texts(written)]

    def _padding(self, read: int, written: int) -> int:
        """The tokens that a single example is padded with, so that its two sequences are told apart by their lengths.

        read, written: the lengths"""
        return int(read == written < self.encoder.max_length)

    def collate(self, examples: list[Example]) -> Batch:
        """input_ids, attention_mask: int64 [batch, longest input];  labels, and those of all tokens that are written:
        int64 [batch, longest target]"""
        labels = self.padded_labels([example["labels"] for example in examples])
        written = self.padded_labels([self.all_labels(example) for example in examples])
        inputs = self.inputs([example["input_ids"] for example in examples])
        if len(examples) == 1:
            padding = (0, self._padding(inputs["input_ids"].shape[1], labels.shape[1]))
            fill = {"input_ids": self.pad_id, "attention_mask": 0}
            inputs = {name: F.pad(values, padding, value=fill[name]) for name, values in inputs.items()}
        return {**inputs, "labels": labels, "written": written}

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.reduced(*token_losses(self._output(model, batch).logits, batch["labels"]))

    def hidden_states(self, model: nn.Module, batch: Batch) -> Tensor:
        """Of the decoder: each predicts its label's token."""
        states: Tensor = self._output(model, batch, output_hidden_states=True).decoder_hidden_states[-1]
        return states

    @staticmethod
    def _output(model: nn.Module, batch: Batch, **options: bool) -> Any:
        written = _base(model).prepare_decoder_input_ids_from_labels(labels=batch["written"])
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        return model(**inputs, decoder_input_ids=written, use_cache=False, **options)

    def prompt_ids(self, prompt: str | Sequence[Mapping[str, str]]) -> Tensor:
        encoded = self._tokens(_text(prompt))
        if encoded.cut:
            raise DatasetError(f"it has {encoded.cut} tokens more than the {self.encoder.max_length} that are read")
        return encoded.ids

    def room(self, prompt: Tensor) -> int:
        return self.encoder.max_length

    def written(self, prompt: Tensor, generated: Tensor) -> tuple[Tensor, Example]:
        ids = generated[1:]  # after the token that the decoder starts with
        return ids, {"input_ids": prompt, "labels": ids}

    def render(self, example: Example) -> dict[str, Any]:
        labels = self.all_labels(example)
        prompt, completion = map(self.encoder.decode, (example["input_ids"], labels[labels != IGNORED]))
        rendering = {"text": f"{prompt}\n{completion}", "prompt": prompt, "completion": completion}
        return rendering | self.rendered_question(example)


def _text(prompt: Any) -> str:
    if not isinstance(prompt, str):
        raise DatasetError(f"{shown(prompt)} is not a text")
    return prompt


def _base(model: Any) -> Any:
    """The model that an adapter is of, or itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
