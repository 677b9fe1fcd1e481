"""Fill one shard: fetch, differentiate, project, round, write, in batches counted from the shard's start."""

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
from gradtrace_indexer.build.bad_rows import BadRows, finite_part
from gradtrace_indexer.build.row_reader import RowReader
from gradtrace_indexer.writing.columns import ColumnBuffer
from gradtrace_indexer.writing.shard_writer import ShardWriter


class RowWorkers:
    """Encodes batches side by side, one thread for each copy of the model; results come in order.

    On a CPU, two batches on one core each take less time than one after the other on two cores.

    represent: take representations as well
    """

    def __init__(self, models: Sequence[GradientModel], basis: Basis, represent: bool = False) -> None:
        self._models: SimpleQueue[GradientModel] = SimpleQueue()
        for model in models:
            self._models.put(model)
        self._basis, self._represent, self._count = basis, represent, len(models)
        self._collate, self.label, self.checkpoint = models[0].batch, models[0].label, models[0].checkpoint.name

    def encode(self, batches: Iterator[list[Example]], skipping: bool) -> Generator[tuple[Encoded | None, list[int]]]:
        """Of each batch what is encoded of it, and the positions of its examples: all, or where `skipping`, those whose
        loss and gradient are finite (None where there is none)."""
        pending: deque[tuple[list[Example], Future[Encoded] | None]] = deque()
        with threads(max(1, torch.get_num_threads() // self._count)), ThreadPoolExecutor(self._count) as pool:
            for examples in batches:
                pending.append((examples, pool.submit(self._encode, self._collate(examples)) if examples else None))
                if len(pending) > self._count:  # one more than can be at work, so that no worker waits
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
        return finite_part(lambda some: self._encode(self._collate(some)), examples)

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
    """Write the gradient rows of these training rows, and the representations that workers take; returns their columns.

    Bad rows are passed over and stored as zeros.

    Raises:
        LossError: a loss or gradient is NaN or infinite and bad rows are not skipped, the text names them; or more than
            half of the rows are bad.
        DatasetError: a row cannot be read and bad rows are not skipped; the text names it.
    """
    parts = [rows[first : first + batch_size] for first in range(0, len(rows), batch_size)]
    read: deque[_Read] = deque()  # what is being encoded
    columns = ColumnBuffer()
    with closing(workers.encode(_examples(workers, reader, parts, bad, read), bad.skipping)) as encoded:
        for part in parts:
            try:
                found, kept = next(encoded)
            except LossError as error:
                raise error.naming(read[0].rows) from error
            batch = read.popleft()
            bad.without_finite_gradient(batch.others(kept), workers.checkpoint)
            places = np.searchsorted(part, [batch.rows[at] for at in kept]).tolist()
            whole = _whole(found, places, len(part), writer, representations)
            writer.append(whole.rows)
            if representations is not None and whole.representations is not None:
                representations.append(whole.representations)
            known = dict(zip(places, [batch.labels[at] for at in kept], strict=True))
            labels = [known.get(place) for place in range(len(part))]
            fillers = [place for place in range(len(part)) if place not in known]
            columns.append(labels, whole.predictions, whole.losses, whole.rows.norm(dim=1), fillers)
            on_batch(len(part))
    bad.refuse_many(len(rows))
    return columns


class _Read(NamedTuple):
    """The rows of a batch that are not known to be bad and could be read, and their labels."""

    rows: list[int]
    labels: list[Label | None]

    def others(self, kept: Sequence[int]) -> list[int]:
        """The rows that are not at these positions."""
        return [row for at, row in enumerate(self.rows) if at not in set(kept)]


def _examples(
    workers: RowWorkers, reader: RowReader, parts: Sequence[Sequence[int]], bad: BadRows, read: deque[_Read]
) -> Iterator[list[Example]]:
    """The examples of each batch in turn; what they are is put at the end of `read`."""
    wanted = [[row for row in part if row not in bad] for part in parts]
    for part, found in zip(wanted, reader.batches(wanted), strict=True):
        rows, examples = bad.readable(part, found)
        read.append(_Read(rows, [workers.label(example) for example in examples]))
        yield examples


def _whole(
    found: Encoded | None, places: Sequence[int], count: int, writer: ShardWriter, represented: ShardWriter | None
) -> Encoded:
    """What was encoded of a batch of `count` rows, with zeros for those that are not at `places`."""
    if found is None:
        features = None if represented is None else torch.zeros(count, represented.layout.dimensions)
        return Encoded(torch.zeros(count, writer.layout.dimensions), torch.zeros(count), None, features)
    if len(places) == count:
        return found

    def spread(values: Tensor | None) -> Tensor | None:
        if values is None:
            return None
        whole = values.new_zeros(count, *values.shape[1:])
        whole[list(places)] = values
        return whole

    return Encoded(*map(spread, found))  # type: ignore[arg-type]  # rows and losses are never None
