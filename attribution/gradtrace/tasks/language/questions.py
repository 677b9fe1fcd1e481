"""What requests and query data ask of models that write: about chosen tokens, or why this text rather than another."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gradtrace.errors import DatasetError, QueryError
from gradtrace.task import Batch, Example, Explained
from gradtrace.tasks.language.encoding import IGNORED
from gradtrace.tasks.language.records import Record
from gradtrace.tasks.language.task import LanguageTask
from gradtrace.tasks.payload import listed, shown

TOKENS_A_BATCH = 4096  # so that the model's outputs fit into memory
_LISTED = 40  # tokens, in an error


@dataclass(frozen=True, slots=True)
class Question:
    """labels: of all tokens that count, int64 [length];  rather_than: the example that is compared with"""

    labels: Tensor
    rather_than: Example | None = None


class WritingTask(LanguageTask):
    """The base of tasks whose models write, token by token.

    A question is a row with one of two fields more. `only` chooses among the tokens that count: by their numbers, from
    0, or by a text that they hold once. `rather_than` is a text in place of the completion (of a row without one, of
    its text or of the last message): the loss of the row minus that with this text is explained.

    The example of a question has `asked`, a `Question`, besides.
    """

    question_keys: ClassVar = ("only", "rather_than")
    first_is_given: ClassVar[bool] = False  # the first token is read, never written

    @abstractmethod
    def hidden_states(self, model: nn.Module, batch: Batch) -> Tensor:
        """The last hidden states at the labels' tokens, floating point [batch, length, features]."""

    @abstractmethod
    def prompt_ids(self, prompt: str | Sequence[Mapping[str, str]]) -> Tensor:
        """The tokens of a text, or of a conversation, after which the model writes. int64 [length]

        Raises:
            DatasetError: it is too long, or not a prompt of this task.
        """

    @abstractmethod
    def room(self, prompt: Tensor) -> int:
        """How many tokens may be written after the prompt."""

    @abstractmethod
    def written(self, prompt: Tensor, generated: Tensor) -> tuple[Tensor, Example]:
        """The tokens that were written, and the example whose loss is theirs. generated: by transformers' `generate`"""

    def parts(self, examples: Sequence[Example]) -> list[list[int]]:
        """Examples of about the same length, so few that with padding they have `TOKENS_A_BATCH` tokens at most."""
        lengths = [self.length(example) for example in examples]
        order, parts = sorted(range(len(examples)), key=lambda position: -lengths[position]), []
        while order:
            fitting = max(1, TOKENS_A_BATCH // max(lengths[order[0]], 1))
            parts.append(order[:fitting])
            order = order[fitting:]
        return parts

    @property
    def has_representation(self) -> bool:
        return self.options.representations

    def representation(self, model: nn.Module, batch: Batch) -> Tensor:
        """The last hidden state at the last token that counts, which has read all before it. [batch, features]

        As in LESS (Xia et al. 2024).
        """
        states, counts = self.hidden_states(model, batch), batch["labels"] != IGNORED
        places = torch.arange(counts.shape[1], device=counts.device)
        last = (counts * places).amax(1)  # [batch]; the first token where none counts
        return states[torch.arange(len(last), device=last.device), last]

    @property
    def request_keys(self) -> tuple[str, ...]:
        return (*self.keys, *self.question_keys)

    def question(self, record: Record) -> tuple[Example, int]:
        """As `encoded`, of a request or a row of the query data."""
        example, cut = self.encoded(record)
        only, other = (record.get(self.column(name)) for name in self.question_keys)
        if only is not None and other is not None:
            raise DatasetError("only and rather_than are two questions; give one of them")
        if only is not None:
            return self._restricted(example, only), cut
        if other is None:
            return example, cut
        second, more = self.encoded(self._with_other(record, other))
        if torch.equal(example["input_ids"], second["input_ids"]) and torch.equal(example["labels"], second["labels"]):
            raise DatasetError("rather_than is the same as the text that it is compared with; give another one")
        return {**example, "asked": Question(example["labels"], second)}, cut + more

    def parse(self, payload: Mapping[str, Any]) -> Example:
        if isinstance(payload, Mapping):
            empty = [name for name in ("completion", "rather_than", "only") if payload.get(name) in ("", [])]
            if empty:
                raise QueryError(f"{empty[0]} is empty, so that there is no token to explain; give some text")
        return super().parse(payload)

    def explained(self, example: Example) -> Explained:
        asked: Question | None = example.get("asked")
        if asked is None:
            return Explained((example,))
        quoted = shown(self._explained_text(example))
        if asked.rather_than is None:
            return Explained((example,), f" of {quoted}")
        plain = {name: value for name, value in example.items() if name != "asked"}
        words = f" of {quoted} minus that of {shown(self._explained_text(asked.rather_than))}"
        return Explained((plain, asked.rather_than), words)

    def all_labels(self, example: Example) -> Tensor:
        """The labels of all tokens that count, also of those that a question leaves out. int64 [length]"""
        labels: Tensor = example["asked"].labels if "asked" in example else example["labels"]
        return labels

    def rendered_question(self, example: Example) -> dict[str, str]:
        asked: Question | None = example.get("asked")
        if asked is None:
            return {}
        if asked.rather_than is None:
            return {"only": self._explained_text(example)}
        return {"rather_than": self._explained_text(asked.rather_than)}

    def _explained_text(self, example: Example) -> str:
        """The text of the tokens that count, with gaps marked."""
        counts = example["labels"] != IGNORED
        borders = (counts[1:] != counts[:-1]).nonzero().flatten() + 1
        pieces = zip(example["labels"].tensor_split(borders), counts.tensor_split(borders), strict=True)
        return " … ".join(self.encoder.decode(ids) for ids, counted in pieces if len(ids) and counted[0])

    def _restricted(self, example: Example, only: Any) -> Example:
        """The example, of whose tokens only the chosen ones count."""
        labels = example["labels"]
        counted = (labels != IGNORED).nonzero().flatten()  # [counted]
        chosen = counted[_chosen(only, self.encoder.texts(labels[counted]))]
        if self.first_is_given and int(chosen[0]) == 0:
            raise DatasetError("the first token is never predicted, since none is before it; leave it out of only")
        restricted = torch.full_like(labels, IGNORED)
        restricted[chosen] = labels[chosen]
        return {**example, "labels": restricted, "asked": Question(labels)}

    def _with_other(self, record: Record, other: Any) -> Record:
        """The record with another text in place of the one that is asked about."""
        values = self.columns(record)
        if {"prompt", "completion"} <= values.keys():
            return {**record, self.column("completion"): other}
        if values.get("messages") and "messages" in self.keys:
            *before, last = values["messages"]
            return {**record, self.column("messages"): [*before, {**last, "content": other}]}
        if "text" in values and "prompt" not in self.keys[:1]:
            return {**record, self.column("text"): other}
        raise DatasetError("rather_than takes the place of a completion, a text or a last message, and there is none")


def _chosen(only: Any, texts: Sequence[str]) -> list[int]:
    """The numbers of the chosen tokens, ascending. texts: of the tokens that count"""
    if isinstance(only, str):
        return _holding(only.strip(), texts)
    numbers = only if isinstance(only, list) else []
    if not numbers or not all(isinstance(number, int) and not isinstance(number, bool) for number in numbers):
        raise DatasetError(f"only is {shown(only)}; give a text, or a list of tokens' numbers")
    outside = [number for number in numbers if not 0 <= number < len(texts)]
    if outside:
        raise DatasetError(
            f"only names token {outside[0]}, and the tokens that count are 0 to {len(texts) - 1}: {_numbered(texts)}"
        )
    return sorted(set(numbers))


def _holding(text: str, texts: Sequence[str]) -> list[int]:
    """The numbers of the tokens that hold a text together."""
    whole = "".join(texts)
    count = whole.count(text) if text else 0
    if count != 1:
        problem = f"are {count} times" if count else "are not"
        raise DatasetError(
            f"the words {shown(text)} of only {problem} in the text that counts; give more of the words, or the "
            f"numbers of tokens: {_numbered(texts)}"
        )
    start, position = whole.index(text), 0
    numbers: list[int] = []
    before: list[int] = []  # tokens without a text begin a character, which the next one ends
    for number, token in enumerate(texts):
        before.append(number)
        if token and position < start + len(text) and position + len(token) > start:
            numbers += before
        position += len(token)
        before = [] if token else before
    return numbers


def _numbered(texts: Sequence[str]) -> str:
    return listed([f"{number} {text!r}" for number, text in enumerate(texts)], _LISTED)
