"""Fill one shard: fetch, differentiate, project, round, write, in batches counted from the shard's start."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from queue import SimpleQueue

import torch

from gradtrace.basis import Basis
from gradtrace.dataset import fetch
from gradtrace.devices import threads
from gradtrace.encoder import Encoded, GradientModel
from gradtrace.errors import LossError
from gradtrace.task import Batch, Label, Task
from gradtrace_indexer.columns import ColumnBuffer
from gradtrace_indexer.shard_writer import ShardWriter


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
        self.collate, self.label = models[0].batch, models[0].label

    def encode(self, batches: Iterator[Batch]) -> Generator[Encoded]:
        pending: deque[Future[Encoded]] = deque()
        with threads(max(1, torch.get_num_threads() // self._count)), ThreadPoolExecutor(self._count) as pool:
            for batch in batches:
                pending.append(pool.submit(self._encode, batch))
                if len(pending) > self._count:  # one more than can be at work, so that no worker waits
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()

    def _encode(self, batch: Batch) -> Encoded:
        model = self._models.get()
        try:
            return model.encode_and_predict(self._basis, batch, self._represent)
        finally:
            self._models.put(model)


def write_rows(
    task: Task,
    workers: RowWorkers,
    rows: Sequence[int],
    batch_size: int,
    writer: ShardWriter,
    on_batch: Callable[[int], object],
    representations: ShardWriter | None = None,
) -> ColumnBuffer:
    """Write the gradient rows of these training rows, and the representations that workers take; returns their columns.

    Raises:
        LossError: a loss or gradient is NaN or infinite; the text names the rows.
        DatasetError: a row cannot be read; the text names it.
    """
    labels: deque[list[Label | None]] = deque()
    columns = ColumnBuffer()

    def batches() -> Iterator[Batch]:
        for first in range(0, len(rows), batch_size):
            examples = fetch(task.train, rows[first : first + batch_size])
            labels.append([workers.label(example) for example in examples])
            yield workers.collate(examples)

    done = 0
    try:
        with closing(workers.encode(batches())) as encoded:
            for coordinates, losses, predictions, represented in encoded:
                writer.append(coordinates)
                if representations is not None and represented is not None:
                    representations.append(represented)
                columns.append(labels.popleft(), predictions, losses, coordinates.norm(dim=1))
                done += len(coordinates)
                on_batch(len(coordinates))
    except LossError as error:
        raise error.naming(rows[done : done + batch_size]) from error
    return columns
