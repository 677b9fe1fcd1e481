"""Fill one shard: read, differentiate, project, round and write rows in batches counted from the shard's start."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from queue import SimpleQueue
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gradtrace.basis import Basis
from gradtrace.devices import threads
from gradtrace.errors import LossError
from gradtrace.models.gradient_model import Encoded, GradientModel
from gradtrace.task import Batch, Example, Label
from gradtrace_indexer.build.bad_rows import BadRows, encode_finite
from gradtrace_indexer.build.row_reader import RowReader
from gradtrace_indexer.writing.columns import ColumnBuffer
from gradtrace_indexer.writing.shard_writer import ShardWriter


class RowWorkers:
    """Encodes batches in parallel, one thread for each copy of the model; results come in order.

    On a CPU, two batches on one core each take less time than one after the other on two cores.

    represent: encode representations as well
    """

    def __init__(self, models: Sequence[GradientModel], basis: Basis, represent: bool = False) -> None:
        self._models: SimpleQueue[GradientModel] = SimpleQueue()
        for model in models:
            self._models.put(model)
        self._basis, self._represent, self._count = basis, represent, len(models)
        self._collate, self.label, self.checkpoint = models[0].batch, models[0].label, models[0].checkpoint.name

    def encode(self, batches: Iterator[list[Example]], skipping: bool) -> Generator[tuple[Encoded | None, list[int]]]:
        """Each batch encoded, with the positions of its encoded examples: all, or where `skipping`, those whose loss
        and gradient are finite (None where there is none)."""
        pending: deque[tuple[list[Example], Future[Encoded] | None]] = deque()
        with threads(max(1, torch.get_num_threads() // self._count)), ThreadPoolExecutor(self._count) as pool:
            for examples in batches:
                pending.append((examples, pool.submit(self._encode, self._collate(examples)) if examples else None))
                if len(pending) > self._count:  # one more than there are workers, so that none waits
                    yield self._result(*pending.popleft(), skipping)
            while pending:
                yield self._result(*pending.popleft(), skipping)

    def _result(
        self, examples: list[Example], future: Future[Encoded] | None, skipping: bool
    ) -> tuple[Encoded | None, list[int]]:
        if future is None:
            return None, []
        try:
            return future.result(), list(range(len(examples)))
        except LossError:
            if not skipping:
                raise
        return encode_finite(lambda subset: self._encode(self._collate(subset)), examples)

    def _encode(self, batch: Batch) -> Encoded:
        model = self._models.get()
        try:
            return model.encode_and_predict(self._basis, batch, self._represent)
        finally:
            self._models.put(model)


def write_rows(
    reader: RowReader,
    workers: RowWorkers,
    rows: Sequence[int],
    batch_size: int,
    writer: ShardWriter,
    on_batch: Callable[[int], object],
    bad: BadRows,
    representations: ShardWriter | None = None,
) -> ColumnBuffer:
    """Write the gradient rows of these training rows, and the representations that workers encode; returns their
    columns. Bad rows are stored as zeros.

    Raises:
        LossError: a loss or gradient is NaN or infinite and bad rows are not skipped, the text names them; or more than
            half of the rows are bad.
        DatasetError: a row cannot be read and bad rows are not skipped; the text names it.
    """
    batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    pending: deque[_ReadBatch] = deque()  # those that are being encoded
    columns = ColumnBuffer()
    with closing(workers.encode(_examples(workers, reader, batches, bad, pending), bad.skipping)) as results:
        for batch in batches:
            try:
                encoded, kept = next(results)
            except LossError as error:
                raise error.naming(pending[0].rows) from error
            read = pending.popleft()
            bad.add_all_but(kept, read.rows, workers.checkpoint)
            places = np.searchsorted(batch, [read.rows[at] for at in kept]).tolist()
            complete = _with_zeros(encoded, places, len(batch), writer, representations)
            writer.append(complete.rows)
            if representations is not None and complete.representations is not None:
                representations.append(complete.representations)
            columns.append(complete, dict(zip(places, [read.labels[at] for at in kept], strict=True)))
            on_batch(len(batch))
    bad.refuse_many(len(rows))
    return columns


class _ReadBatch(NamedTuple):
    """The rows of a batch that are not known to be bad and could be read, and their labels."""

    rows: list[int]
    labels: list[Label | None]


def _examples(
    workers: RowWorkers,
    reader: RowReader,
    batches: Sequence[Sequence[int]],
    bad: BadRows,
    pending: deque[_ReadBatch],
) -> Iterator[list[Example]]:
    """The examples of each batch in turn; its rows and labels are added to `pending`."""
    wanted = [[row for row in batch if row not in bad] for batch in batches]
    for batch, content in zip(wanted, reader.batches(wanted), strict=True):
        rows, examples = bad.readable(batch, content)
        pending.append(_ReadBatch(rows, [workers.label(example) for example in examples]))
        yield examples


def _with_zeros(
    encoded: Encoded | None, places: Sequence[int], count: int, writer: ShardWriter, represented: ShardWriter | None
) -> Encoded:
    """The encoded rows at their places in a batch of `count` rows, with zeros at the others."""
    if encoded is None:
        features = None if represented is None else torch.zeros(count, represented.layout.dimensions)
        return Encoded(torch.zeros(count, writer.layout.dimensions), torch.zeros(count), None, features)
    if len(places) == count:
        return encoded

    def spread(values: Tensor | None) -> Tensor | None:
        if values is None:
            return None
        spread_values = values.new_zeros(count, *values.shape[1:])
        spread_values[list(places)] = values
        return spread_values

    return Encoded(*map(spread, encoded))  # type: ignore[arg-type]  # rows and losses are never None
