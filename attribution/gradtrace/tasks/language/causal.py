"""CausalLM: models that predict each next token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gradtrace.errors import DatasetError
from gradtrace.task import Batch, Example
from gradtrace.tasks.language.encoding import IGNORED, Encoded, Piece
from gradtrace.tasks.language.losses import token_losses
from gradtrace.tasks.language.options import Kind
from gradtrace.tasks.language.packed import unpacked
from gradtrace.tasks.language.questions import WritingTask
from gradtrace.tasks.language.records import Record
from gradtrace.tasks.payload import shown


class CausalLM(WritingTask):
    """A language model that predicts each token from those before it.

    A row is a text; a prompt with a completion, each a text or a list of messages; a conversation (`messages`); or
    `input_ids`, with `labels` that are -100 at tokens that do not count, or with TRL's masks. The documents of packed
    rows (`packed`) are rows. The loss of a row is the mean cross-entropy of its tokens that count, or their sum. It
    never depends on the other rows of a batch.

        TASK = CausalLM("runs/gpt2", "train.jsonl", "test.jsonl", text="review")

    Requests hold the same, under the names text, prompt, completion, messages, input_ids and labels, and may choose
    among the tokens or compare two texts, see `WritingTask`.
    """

    kind: ClassVar[Kind] = "CausalLM"
    keys: ClassVar = (
        "text", "prompt", "completion", "messages", "input_ids", "labels", "completion_mask", "assistant_masks",
    )  # fmt: skip
    first_is_given: ClassVar = True

    def encoded(self, record: Record) -> tuple[Example, int]:
        encoded = self._encoded(self.columns(record), record)
        if len(encoded.ids) < 2:
            raise DatasetError(
                f"the row {shown(dict(record))} has {len(encoded.ids)} token(s), so that there is none to predict; "
                "leave such rows out of the data, or build with --skip-bad-rows"
            )
        return {"input_ids": encoded.ids, "labels": encoded.labels}, encoded.cut

    def _encoded(self, values: dict[str, Any], record: Record) -> Encoded:
        if "input_ids" in values:
            ids = self.ids("input_ids", values["input_ids"])
            labels = self._labels(values, ids)
            if len(ids) != len(labels):
                raise DatasetError(f"a row has {len(ids)} input_ids and {len(labels)} labels; give one label for each")
            return self.encoder.shortened(ids, labels != IGNORED, [0] * len(ids))
        options, eos = self.options, bool(self.options.append_eos)
        if "text" in values and options.text is not None:
            return self.encoder.encode([Piece(_text(values["text"]), True)], eos=eos)
        if "prompt" in values and "completion" in values:
            loss_on = options.loss_on or "completion"
            prompt, completion = values["prompt"], values["completion"]
            if not isinstance(prompt, str):
                pieces = self.encoder.conversation([*prompt, *completion], loss_on, given=len(prompt))
                return self.encoder.encode(pieces, special_tokens=False, eos=eos)
            pieces = [Piece(prompt, loss_on == "all"), Piece(_text(completion), True)]
            return self.encoder.encode(pieces, eos=eos or options.append_eos is None)
        if "messages" in values:
            pieces = self.encoder.conversation(values["messages"], options.loss_on or "all")
            return self.encoder.encode(pieces, special_tokens=False, eos=eos)
        if "text" in values:
            return self.encoder.encode([Piece(_text(values["text"]), True)], eos=eos)
        raise self.lacks(record, "text", "prompt", "completion", "messages", "input_ids")

    def _labels(self, values: dict[str, Any], ids: Tensor) -> Tensor:
        """Of a pretokenised row. TRL's rows have masks in place of labels."""
        if "labels" in values:
            return self.ids("labels", values["labels"])
        names = ["assistant_masks", *(["completion_mask"] if self.options.loss_on != "all" else [])]
        for mask in (torch.as_tensor(values[name]) for name in names if name in values):
            if mask.shape != ids.shape:
                raise DatasetError(f"a row has {len(ids)} input_ids and {len(mask)} values in its mask; give one each")
            ids = ids.where(mask != 0, IGNORED)
        return ids

    def records(self, source: Any) -> Sequence[Record]:
        """Packed rows are taken apart."""
        return unpacked(super().records(source))

    def token_ids(self, example: Example) -> tuple[Tensor, Tensor]:
        """The first token is never predicted."""
        counts = example["labels"] != IGNORED
        return example["input_ids"], counts & (torch.arange(len(counts)) > 0)

    def collate(self, examples: list[Example]) -> Batch:
        """input_ids, attention_mask and labels, int64 [batch, longest]"""
        labels = self.padded_labels([example["labels"] for example in examples])
        return {**self.inputs([example["input_ids"] for example in examples]), "labels": labels}

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        output = self._output(model, batch)
        return self.reduced(*token_losses(output.logits[:, :-1], batch["labels"][:, 1:]))

    def hidden_states(self, model: nn.Module, batch: Batch) -> Tensor:
        states: Tensor = self._output(model, batch, output_hidden_states=True).hidden_states[-1]
        return states

    @staticmethod
    def _output(model: nn.Module, batch: Batch, **options: bool) -> Any:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        return model(**inputs, use_cache=False, **options)

    def prompt_ids(self, prompt: str | Sequence[Mapping[str, str]]) -> Tensor:
        if isinstance(prompt, str):
            return self.encoder.beginning(prompt)
        return self.encoder.conversation_beginning(prompt)

    def room(self, prompt: Tensor) -> int:
        return self.encoder.max_length - len(prompt)

    def written(self, prompt: Tensor, generated: Tensor) -> tuple[Tensor, Example]:
        ids = generated[len(prompt) :]
        labels = torch.cat([torch.full_like(prompt, IGNORED), ids])
        return ids, {"input_ids": generated, "labels": labels}

    def render(self, example: Example) -> dict[str, Any]:
        """The decoded text; prompt and completion beside it, if the tokens that count are its end."""
        ids, counts = example["input_ids"], self.all_labels(example) != IGNORED
        start = int((~counts).sum())
        shown = {"text": self.encoder.decode(ids)}
        if start and counts[start:].all() and len(ids) > start:
            shown |= {"prompt": self.encoder.decode(ids[:start]), "completion": self.encoder.decode(ids[start:])}
        return shown | self.rendered_question(example)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise DatasetError(f"{shown(value)} is not a text; give a string, or a list of messages under messages")
    return value
