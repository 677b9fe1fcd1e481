"""The base class of language tasks: a pretrained model, records in files, and examples of tokens."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from gradtrace.errors import DatasetError, QueryError
from gradtrace.task import Example, Task
from gradtrace.tasks.language.encoding import IGNORED, Encoder
from gradtrace.tasks.language.options import Kind, LanguageOptions, Reduction
from gradtrace.tasks.language.pretrained import Pretrained
from gradtrace.tasks.language.records import Record, open_records
from gradtrace.tasks.payload import check_keys, listed, shown

_POSITIONS = ("n_positions", "max_position_embeddings", "n_ctx")  # of configurations: the longest sequence
_UNLIMITED = 1 << 20  # what tokenizers without a limit exceed


class EncodedRows:
    """A data set of examples, encoded from records as they are asked for."""

    def __init__(self, records: Sequence[Record], encode: Callable[[Record], Any]) -> None:
        self.records, self._encode = records, encode

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, row: int) -> Example:
        return self._encode(self.records[row])


class LanguageTask(Task):
    """
    Args:
        model: directory of a Hugging Face model, of a PEFT adapter, or of a Trainer's output with either.
        data, query_data: a .jsonl, .csv or .parquet file, a folder of datasets' save_to_disk, or any map-style data set
            of dicts.
        options: of `LanguageOptions`.

    Raises:
        TaskError: there is no model in the directory.
    """

    kind: ClassVar[Kind]
    reduces_tokens: ClassVar[bool] = True  # the loss is made from those of tokens
    keys: ClassVar[tuple[str, ...]]  # of requests; columns of the data have these names or those in the options

    def __init__(self, model: str | Path, data: Any, query_data: Any = None, **options: Any) -> None:
        self.options = LanguageOptions(**options)
        self.layers = self.options.layers
        self._data, self._query_data = data, query_data
        self.pretrained = Pretrained(Path(model), self.options.base_model, self.options.tokenizer)

    @abstractmethod
    def encoded(self, record: Record) -> tuple[Example, int]:
        """The example of a record, and the number of tokens that were cut off."""

    def question(self, record: Record) -> tuple[Example, int]:
        """As `encoded`, of a request or a row of the query data."""
        return self.encoded(record)

    @property
    def request_keys(self) -> tuple[str, ...]:
        return self.keys

    @abstractmethod
    def token_ids(self, example: Example) -> tuple[Tensor, Tensor]:
        """All tokens of an example, int64 [length], and which of them count in its loss, bool [length]."""

    def tokens(self, example: Example) -> list[str] | list[list[str]]:
        """Special tokens are among them, by their names."""
        return self.encoder.texts(self.token_ids(example)[0])

    def length(self, example: Example) -> int:
        return len(self.token_ids(example)[0])

    def counted(self, example: Example) -> int:
        """The number of tokens that count in the loss."""
        return int(self.token_ids(example)[1].sum())

    def stretches(self, example: Example) -> list[tuple[str, bool]]:
        """The decoded text with its special tokens, in stretches of tokens that count in the loss or do not."""
        ids, counts = self.token_ids(example)
        borders = (counts[1:] != counts[:-1]).nonzero().flatten() + 1
        pairs = zip(ids.tensor_split(borders), counts.tensor_split(borders), strict=True)
        return [(self.encoder.tokenizer.decode(part.tolist()), bool(flags[0])) for part, flags in pairs if len(part)]

    def model(self) -> nn.Module:
        model: nn.Module = self._model
        return model

    @cached_property
    def _model(self) -> Any:
        model: Any = self.pretrained.model(self.kind, self.options.dtype)
        model.config.pad_token_id = self.pad_id  # by which heads find the last token
        return model

    @property
    def weights_in_a_build(self) -> int:
        """Bytes of weights that a build holds at least: the task's and a copy; of an adapter's base, one for all."""
        bytes_each = getattr(torch, self.options.dtype).itemsize
        copies = 1 if self.pretrained.is_adapter else 2
        return int(self.pretrained.parameter_count(self.kind) * bytes_each * copies)

    @cached_property
    def train(self) -> EncodedRows:
        return EncodedRows(self.records(self._data), self.example)

    @cached_property
    def query(self) -> EncodedRows | None:
        return None if self._query_data is None else EncodedRows(open_records(self._query_data), self.asked)

    def records(self, source: Any) -> Sequence[Record]:
        """Of a file or a data set, those that are rows of this task."""
        return open_records(source)

    def example(self, record: Record) -> Example:
        return self.encoded(record)[0]

    def asked(self, record: Record) -> Example:
        return self.question(record)[0]

    @cached_property
    def encoder(self) -> Encoder:
        tokenizer = self.pretrained.tokenizer()
        return Encoder(tokenizer, self.options.max_length or self._longest(tokenizer))

    @cached_property
    def pad_id(self) -> int:
        """The tokenizer's; otherwise any, since padding is masked."""
        return self.encoder.tokenizer.pad_token_id or 0

    def _longest(self, tokenizer: Any) -> int:
        """The number of tokens that model and tokenizer take."""
        config = self.pretrained.config()
        limits = [getattr(config, name, None) for name in _POSITIONS]
        known = [limit for limit in [*limits, tokenizer.model_max_length] if isinstance(limit, int) and limit > 0]
        return min([*known, _UNLIMITED])

    @cached_property
    def reduction(self) -> Reduction:
        """Whether the loss of an example is the mean or the sum over its tokens. By default as in the training."""
        return self.options.reduction or ("sum" if self.pretrained.is_trainers else "mean")

    def columns(self, record: Record) -> dict[str, Any]:
        """The record's values under the names that requests have."""
        columns = {name: self.column(name) for name in self.keys}
        return {name: record[column] for name, column in columns.items() if record.get(column) is not None}

    def column(self, name: str) -> str:
        """The column of the data that holds what requests call by this name."""
        return getattr(self.options, name, None) or name

    def ids(self, name: str, ids: Any) -> Tensor:
        """int64 [length], of a record's `input_ids`, or of `labels`, which may be -100."""
        vocabulary = self._model.get_input_embeddings().num_embeddings
        values = torch.as_tensor(ids, dtype=torch.int64)
        known = (values >= 0) & (values < vocabulary) | ((values == IGNORED) & (name == "labels"))
        if values.dim() != 1 or not known.all():
            raise DatasetError(f"{name} is {shown(ids)}; give a list of token ids from 0 to {vocabulary - 1}")
        return values

    def lacks(self, record: Record, *wanted: str) -> DatasetError:
        names = ", ".join(map(self.column, wanted))
        return DatasetError(
            f"{type(self).__name__} looks for {names}, and the row has {listed(list(record))}; name the column, as in "
            "text='review' (--text review)"
        )

    def parse(self, payload: Mapping[str, Any]) -> Example:
        check_keys(payload, self.request_keys)
        try:
            example, cut = self.question({self.column(name): value for name, value in payload.items()})
        except (DatasetError, TypeError, KeyError, ValueError) as error:
            raise QueryError(f"this is not an example of {type(self).__name__}: {error}") from error
        if cut:
            raise QueryError(f"the example has {cut} tokens more than the {self.encoder.max_length} that are taken")
        return example

    def inputs(self, ids: Sequence[Tensor]) -> dict[str, Tensor]:
        """Padded at the end, with the mask of what is no padding. int64 [batch, longest]"""
        lengths = torch.tensor([len(one) for one in ids])
        padded = pad_sequence(list(ids), batch_first=True, padding_value=self.pad_id)
        mask = torch.arange(padded.shape[1]) < lengths[:, None]
        return {"input_ids": padded, "attention_mask": mask.long()}

    @staticmethod
    def padded_labels(labels: Sequence[Tensor]) -> Tensor:
        """int64 [batch, longest]"""
        return pad_sequence(list(labels), batch_first=True, padding_value=IGNORED)

    def reduced(self, losses: Tensor, counts: Tensor) -> Tensor:
        """The loss of each example from those of its tokens. Both [batch, length] -> [batch]; zero if none counts"""
        sums = (losses * counts).sum(1)
        return sums if self.reduction == "sum" else sums / counts.sum(1).clamp(min=1)
