"""TextClassification: a task over texts or token ids; and a vocabulary of words."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from gradtrace.errors import DatasetError, QueryError
from gradtrace.task import Batch, Example
from gradtrace.tasks.base import Classification, Rows
from gradtrace.tasks.payload import check_keys, shown
from gradtrace.tasks.token_texts import token_texts

MAX_CHARACTERS = 1 << 20
PADDING, UNKNOWN = 0, 1  # ids of a `Vocabulary`
_WORDS = re.compile(r"\w+|[^\w\s]")


class TextClassification(Classification):
    """Classify texts; the model is called with (ids [batch, length], mask [batch, length]).

    `mask` is True at tokens and False at padding, which must not change the model's output. `encode` converts a text to
    1 to `max_length` ids; it is required if examples are texts. `decode` converts ids to text, to show examples that
    are ids, and the tokens of texts.

        TASK = TextClassification(model=make_model, train=(texts, labels), vocabulary_size=30_000, encode=encode)
        TASK = TextClassification(model=make_model, train=(token_ids, labels), vocabulary_size=30_000)

    Requests: {"text": string} or {"token_ids": [ids]}, and "label": number or name, optional.
    """

    def __init__(
        self,
        model: Callable[[], nn.Module],
        train: Any,
        query: Any = None,
        *,
        vocabulary_size: int,
        encode: Callable[[str], Sequence[int]] | None = None,
        decode: Callable[[list[int]], str] | None = None,
        class_names: Sequence[str] | None = None,
        pad_id: int = 0,
        max_length: int = 512,
    ) -> None:
        super().__init__(model, train, query, class_names=class_names)
        self.vocabulary_size = vocabulary_size
        self.encode = encode
        self.decode = decode
        self.pad_id = pad_id
        self.max_length = max_length

    def rows(self, inputs: Any, labels: Any) -> Rows:
        texts = [text if isinstance(text, str) else torch.as_tensor(text, dtype=torch.int64) for text in inputs]
        empty = [row for row, text in enumerate(texts) if not len(text)]
        if empty:
            raise DatasetError(f"row {empty[0]} has no token; leave out empty texts ({len(empty)} in all)")
        return Rows(texts, labels, "texts")

    def collate(self, examples: list[Example]) -> Batch:
        """((int64 [batch, longest], bool [batch, longest]), int64 [batch])"""
        tokens = [self._ids(text) if isinstance(text, str) else text for text, _ in examples]
        lengths = torch.tensor([len(ids) for ids in tokens])
        ids = pad_sequence(tokens, batch_first=True, padding_value=self.pad_id)
        mask = torch.arange(ids.shape[1]) < lengths[:, None]  # [batch, longest]
        return (ids, mask), torch.tensor([label for _, label in examples])

    def parse_input(self, payload: Mapping[str, Any]) -> str | Tensor:
        check_keys(payload, ("text", "token_ids", "label"))
        if ("text" in payload) == ("token_ids" in payload):
            raise QueryError('give either "text" or "token_ids"')
        if "text" in payload:
            text = payload["text"]
            if not isinstance(text, str):
                raise QueryError('"text" is a string')
            if len(text) > MAX_CHARACTERS:
                raise QueryError(f'"text" has {len(text):,} characters, more than the {MAX_CHARACTERS:,} that are read')
            ids = self._ids(text)
            return text if isinstance(self.train[0][0], str) else ids
        return self._checked_ids(payload["token_ids"])

    def render(self, example: Example) -> dict[str, Any]:
        if isinstance(example[0], str):
            return {"text": example[0]}
        ids = example[0].tolist()
        return {"token_ids": ids} if self.decode is None else {"text": self.decode(ids)}

    @property
    def has_tokens(self) -> bool:
        return self.decode is not None

    def tokens(self, example: Example) -> list[str]:
        """Call it only where the task `has_tokens`."""
        assert self.decode is not None
        ids = self._ids(example[0]) if isinstance(example[0], str) else example[0]
        return token_texts(ids.tolist(), self.decode)

    def _ids(self, text: str) -> Tensor:
        """int64 [length]"""
        if self.encode is None:
            raise QueryError('this task has no tokenizer; give "token_ids", or construct the task with encode=')
        return self._checked_ids([int(token) for token in self.encode(text)])

    def _checked_ids(self, ids: Any) -> Tensor:
        """int64 [length]. Raises QueryError for ids that the model cannot take."""
        if not isinstance(ids, list):
            raise QueryError('"token_ids" is a list of whole numbers')
        if not 1 <= len(ids) <= self.max_length:
            raise QueryError(f"the text has {len(ids)} tokens; give 1 to {self.max_length}")
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
            raise QueryError('"token_ids" is a list of whole numbers')
        outside = next((i for i in ids if not 0 <= i < self.vocabulary_size), None)
        if outside is not None:
            raise QueryError(
                f"token id {shown(outside)} is outside the vocabulary; ids go from 0 to {self.vocabulary_size - 1}"
            )
        return torch.tensor(ids)


class Vocabulary:
    """The most frequent words of the given texts, in lower case, including punctuation marks.

    Id 0 is padding, id 1 any other word. Words follow by frequency, then alphabetically, so that the same texts give
    the same ids. There are at most `size` ids.
    """

    def __init__(self, texts: Iterable[str], size: int) -> None:
        counts = Counter(word for text in texts for word in _words(text))
        ordered = sorted(counts, key=lambda word: (-counts[word], word))
        self.ids = {word: number for number, word in enumerate(ordered[: size - 2], UNKNOWN + 1)}
        self._words = ["", "?", *self.ids]  # by id

    def encode(self, text: str, most: int) -> list[int]:
        """The ids of the first `most` words."""
        return [self.ids.get(match[0], UNKNOWN) for match in islice(_WORDS.finditer(text.lower()), most)]

    def decode(self, ids: Sequence[int]) -> str:
        """The words with spaces between them; a question mark for one that is not in the vocabulary."""
        return " ".join(self._words[token] for token in ids)


def _words(text: str) -> list[str]:
    return _WORDS.findall(text.lower())
