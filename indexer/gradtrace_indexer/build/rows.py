"""Fill one shard: read, differentiate, project, round and write rows in batches counted from the shard's start."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from functools import partial
from queue import SimpleQueue
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from gradtrace.devices import threads
from gradtrace.errors import LossError
from gradtrace.models.gradient_model import Encoded, GradientModel
from gradtrace.store.row_ids import Ids
from gradtrace.task import Batch, Example, Label
from gradtrace_indexer.build.bad_rows import BadRows, encode_finite
from gradtrace_indexer.build.row_kinds import R, RowKind
from gradtrace_indexer.build.row_reader import RowReader
from gradtrace_indexer.writing.columns import ColumnBuffer
from gradtrace_indexer.writing.shard_writer import ShardWriter

W = TypeVar("W", contravariant=True)


class RowWriter(Protocol[W]):
    """Writes the rows of one shard, batch by batch."""

    def append(self, rows: W) -> None: ...


class RowWorkers(Generic[R]):
    """Encodes batches in parallel, one thread for each copy of the model; results come in order.

    On a CPU, two batches on one core each take less time than one after the other on two cores.

    represent: encode representations as well
    """

    def __init__(self, models: Sequence[GradientModel], kind: RowKind[R], represent: bool = False) -> None:
        self._models: SimpleQueue[GradientModel] = SimpleQueue()
        for model in models:
            self._models.put(model)
        self.kind, self._represent, self._count = kind, represent, len(models)
        self._collate, self._label, self._checkpoint = models[0].batch, models[0].label, models[0].checkpoint.name

    def encode(
        self, batches: Iterable[tuple[list[int], list[Example]]], bad: BadRows
    ) -> Generator[tuple[Encoded[R] | None, dict[int, Label | None]]]:
        """Each batch, given as row numbers and examples, encoded (None: no row of it), and the labels of the encoded
        rows by number. Rows without a finite loss and gradient are left out and added to `bad`, where it skips.

        Raises:
            LossError: a loss or gradient is NaN or infinite and bad rows are not skipped; the text names the rows.
        """
        pending: deque[tuple[list[int], list[Example], Future[Encoded[R]] | None]] = deque()
        with threads(max(1, torch.get_num_threads() // self._count)), ThreadPoolExecutor(self._count) as pool:
            for rows, examples in batches:
                future = pool.submit(self._encode, self._collate(examples)) if examples else None
                pending.append((rows, examples, future))
                if len(pending) > self._count:  # one more than there are workers, so that none waits
                    yield self._result(*pending.popleft(), bad)
            while pending:
                yield self._result(*pending.popleft(), bad)

    def _result(
        self, rows: list[int], examples: list[Example], future: Future[Encoded[R]] | None, bad: BadRows
    ) -> tuple[Encoded[R] | None, dict[int, Label | None]]:
        encoded, kept = None, list(range(len(rows)))
        try:
            encoded = future.result() if future is not None else None
        except LossError as error:
            if not bad.skipping:
                raise error.naming(rows) from error
            encoded, kept = encode_finite(lambda subset: self._encode(self._collate(subset)), examples)
        bad.add_all_but(kept, rows, self._checkpoint)
        return encoded, {rows[position]: self._label(examples[position]) for position in kept}

    def _encode(self, batch: Batch) -> Encoded[R]:
        model = self._models.get()
        try:
            return model.encode_and_predict(partial(self.kind.encode, model, batch), batch, self._represent)
        finally:
            self._models.put(model)


def encoded_batches(
    reader: RowReader, workers: RowWorkers[R], rows: Ids, batch_size: int, bad: BadRows
) -> Iterator[Encoded[R]]:
    """These training rows in batches, without bad ones. Raises as `write_rows`."""
    batches = [rows[start : start + batch_size].tolist() for start in range(0, len(rows), batch_size)]
    with closing(workers.encode(map(bad.readable, batches, reader.batches(batches)), bad)) as results:
        for encoded, _ in results:
            if encoded is not None:
                yield encoded
    bad.refuse_many(len(rows))


def write_rows(
    reader: RowReader,
    workers: RowWorkers[R],
    rows: Sequence[int],
    batch_size: int,
    writer: RowWriter[R],
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
    wanted = [[row for row in batch if row not in bad] for batch in batches]
    read = map(bad.readable, wanted, reader.batches(wanted))
    columns = ColumnBuffer()
    with closing(workers.encode(read, bad)) as results:
        for batch, (encoded, labels) in zip(batches, results, strict=True):
            places = np.searchsorted(batch, list(labels)).tolist()
            complete = _with_zeros(encoded, places, len(batch), workers.kind, representations)
            writer.append(complete.rows)
            if representations is not None and complete.representations is not None:
                representations.append(complete.representations)
            norms = workers.kind.norms(complete.rows)
            columns.append(complete, norms, dict(zip(places, labels.values(), strict=True)))
            on_batch(len(batch))
    bad.refuse_many(len(rows))
    return columns


def _with_zeros(
    encoded: Encoded[R] | None, places: Sequence[int], count: int, kind: RowKind[R], represented: ShardWriter | None
) -> Encoded[R]:
    """The encoded rows at their places in a batch of `count` rows, with zeros at the others."""
    if encoded is None:
        features = None if represented is None else torch.zeros(count, represented.layout.dimensions)
        return Encoded(kind.placed(None, [], count), torch.zeros(count), None, features)
    if len(places) == count:
        return encoded

    def spread(values: Tensor) -> Tensor:
        at = torch.tensor(places, device=values.device)
        return values.new_zeros(count, *values.shape[1:]).index_copy(0, at, values)

    predictions, representations = (
        None if values is None else spread(values) for values in (encoded.predictions, encoded.representations)
    )
    return Encoded(kind.placed(encoded.rows, places, count), spread(encoded.losses), predictions, representations)
