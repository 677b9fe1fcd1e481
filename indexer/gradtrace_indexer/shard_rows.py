"""Fill one shard: fetch, differentiate, project, round, write, in batches counted from the shard's start."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from gradtrace.basis import Basis
from gradtrace.dataset import fetch
from gradtrace.encoder import GradientModel
from gradtrace.errors import GradtraceError
from gradtrace.task import Task
from gradtrace_indexer.columns import ColumnBuffer
from gradtrace_indexer.shard_writer import ShardWriter


def write_rows(
    task: Task,
    model: GradientModel,
    basis: Basis,
    rows: Sequence[int],
    batch_size: int,
    writer: ShardWriter,
    on_batch: Callable[[int], object] = lambda count: None,
) -> ColumnBuffer:
    """Write the gradient rows of these training rows; returns their columns.

    Raises:
        GradtraceError: a row cannot be read or differentiated; the text names the stretch of rows.
    """
    columns = ColumnBuffer()
    for first in range(0, len(rows), batch_size):
        part = rows[first : first + batch_size]
        try:
            examples = fetch(task.train, part)
            coordinates, losses, predictions = model.encode_and_predict(basis, model.batch(examples))
        except GradtraceError as error:
            raise type(error)(f"training rows {part[0]} to {part[-1]}: {error}") from error
        writer.append(coordinates)
        labels = [task.label(example) for example in examples]
        columns.append(labels, predictions, losses, coordinates.norm(dim=1))
        on_batch(len(examples))
    return columns
