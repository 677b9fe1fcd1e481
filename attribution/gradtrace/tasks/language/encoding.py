"""From texts to tokens, and which tokens count in the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gradtrace.errors import DatasetError
from gradtrace.tasks.token_texts import token_texts

IGNORED = -100  # label of a token that does not count, as in transformers


class Piece(NamedTuple):
    """A stretch of text. counts: in the loss"""

    text: str
    counts: bool


class Encoded(NamedTuple):
    """The tokens of a text.

    ids: int64 [length];  counts: bool [length], whether a token counts in the loss;  cut: tokens beyond `max_length`
    """

    ids: Tensor
    counts: Tensor
    cut: int

    @property
    def labels(self) -> Tensor:
        """int64 [length]: the ids of the tokens that count, -100 elsewhere."""
        return self.ids.where(self.counts, IGNORED)


class Encoder:
    """A tokenizer with a greatest length.

    Longer rows are shortened here and not by the tokenizer, whose state would change under another thread's call.
    """

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length

    def encode(self, pieces: Sequence[Piece], *, special_tokens: bool = True, eos: bool = False) -> Encoded:
        """The tokens of the pieces' joint text. A token over a border belongs to the piece of its last character.

        special_tokens: those that the tokenizer adds to a text;  eos: end with the end-of-sequence token
        """
        text, eos_id = "".join(piece.text for piece in pieces), self.tokenizer.eos_token_id
        tokens = self.tokenizer(text, add_special_tokens=special_tokens, return_offsets_mapping=True, verbose=False)
        ids, sequences = list(tokens["input_ids"]), tokens.sequence_ids()
        counts = _counted(pieces, np.array(tokens["offset_mapping"], dtype=np.int64).reshape(-1, 2))
        if eos and eos_id is None:
            raise DatasetError("the tokenizer has no end-of-sequence token; set append_eos to False")
        if eos and ids[-1:] != [eos_id]:
            ids, sequences, counts = [*ids, eos_id], [*sequences, 0], np.append(counts, pieces[-1].counts)
        return self.shortened(torch.tensor(ids, dtype=torch.int64), torch.from_numpy(counts), sequences)

    def beginning(self, text: str, *, special_tokens: bool = True) -> Tensor:
        """The tokens of a text that is to go on: without those that the tokenizer adds at the end. int64 [length]"""
        tokens = self.tokenizer(text, add_special_tokens=special_tokens, verbose=False)
        ids, sequences = list(tokens["input_ids"]), tokens.sequence_ids()
        while any(sequence is not None for sequence in sequences) and sequences[-1] is None:
            ids, sequences = ids[:-1], sequences[:-1]
        return torch.tensor(ids, dtype=torch.int64)

    def conversation_beginning(self, messages: Sequence[Mapping[str, str]]) -> Tensor:
        """The tokens of a conversation up to where the assistant's next turn begins. int64 [length]"""
        return self.beginning(self._templated(messages, add_generation_prompt=True), special_tokens=False)

    def shortened(self, ids: Tensor, counts: Tensor, sequences: Sequence[int | None]) -> Encoded:
        """The tokens that are kept of a longer row."""
        kept = kept_tokens(sequences, self.max_length)
        return Encoded(ids[kept], counts[kept], int((~kept).sum()))

    def decode(self, ids: Tensor) -> str:
        """Without special tokens, which encoding adds."""
        text: str = self.tokenizer.decode(ids.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def texts(self, ids: Tensor) -> list[str]:
        """The text of each token, special ones too."""
        decode = partial(self.tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return token_texts(ids.tolist(), decode)

    def conversation(self, messages: Sequence[Mapping[str, str]], loss_on: str, given: int = 0) -> list[Piece]:
        """The pieces of a conversation in the tokenizer's chat template.

        loss_on: "all", or "completion": the assistant's turns count alone
        given: messages at the beginning that are a prompt, and whose turns do not count
        """
        whole = self._templated(messages)
        if loss_on == "all":
            return [Piece(whole, True)]
        pieces, position = [], 0
        for number, message in enumerate(messages):
            if message["role"] != "assistant" or number < given:
                continue
            start = self._common(whole, messages[:number], add_generation_prompt=True)
            stop = self._common(whole, messages[: number + 1])
            pieces += [Piece(whole[position:start], False), Piece(whole[start:stop], True)]
            position = stop
        return [*pieces, Piece(whole[position:], False)]

    def _common(self, whole: str, messages: Sequence[Mapping[str, str]], **options: bool) -> int:
        """Length of the text of the first messages, where the whole conversation's begins with it."""
        text = self._templated(messages, **options) if messages else ""
        if not whole.startswith(text):
            raise DatasetError(
                "the chat template writes the beginning of a conversation otherwise than alone, so that the "
                "assistant's tokens are not told apart; set loss_on to all, or give input_ids with labels"
            )
        return len(text)

    def _templated(self, messages: Sequence[Mapping[str, str]], **options: bool) -> str:
        try:
            text: str = self.tokenizer.apply_chat_template([dict(m) for m in messages], tokenize=False, **options)
        except Exception as error:  # templates are programs, and raise what they like
            raise DatasetError(f"the tokenizer's chat template fails on the messages: {error}") from error
        return text


def kept_tokens(sequences: Sequence[int | None], limit: int) -> Tensor:
    """Which tokens are kept of a text, or of a pair of texts, that is longer than `limit`. bool [length]

    The end of a text is cut off, of a pair that of the longer one, as by transformers' truncation=True; the special
    tokens that the tokenizer adds stay.

    sequences: for each token the number of its text, 0 or 1; None for special ones that the tokenizer adds
    """
    number = torch.tensor([-1 if sequence is None else sequence for sequence in sequences], dtype=torch.int64)
    first, second = int((number == 0).sum()), int((number == 1).sum())
    room = max(limit - int((number < 0).sum()), 0)
    if first + second <= room:
        return torch.ones_like(number, dtype=torch.bool)
    shorter = min(first, second, room // 2)
    sizes = (room - shorter, shorter) if first >= second else (shorter, room - shorter)
    places = torch.where(number == 0, (number == 0).cumsum(0), (number == 1).cumsum(0))  # within its text, from 1
    return (number < 0) | (places <= torch.tensor(sizes)[number.clamp(min=0)])


def _counted(pieces: Sequence[Piece], offsets: Any) -> Any:
    """bool [tokens].  offsets: int64 [tokens, 2], first character of a token and the one after its last

    Tokens of no character, which the tokenizer adds, count as the token before; at the beginning, as the first piece.
    """
    ends = np.cumsum([len(piece.text) for piece in pieces])
    empty = offsets[:, 1] <= offsets[:, 0]
    last = np.where(empty, 0, offsets[:, 1] - 1)
    last = np.maximum.accumulate(last)  # an empty token takes the place of the one before
    numbers = np.searchsorted(ends, last, side="right").clip(max=len(pieces) - 1)
    return np.array([piece.counts for piece in pieces])[numbers]
