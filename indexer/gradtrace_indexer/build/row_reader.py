"""Reading training rows in batches: in this process, or ahead of it in the worker processes of PyTorch's DataLoader."""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_convert

from gradtrace.data.dataset import fetch
from gradtrace.errors import DatasetError, StoreError
from gradtrace.task import Example
from gradtrace.user_code import user_line


class RowReader:
    """Reads rows of a map-style data set, in order.

    Rows are read again for each checkpoint: reading each once would need all checkpoints' weights, or the whole data
    set, in memory.
    """

    def __init__(self, dataset: Any, workers: int = 0) -> None:
        """workers: processes that read ahead, each with a copy of the data set; 0: read in this process.

        Raises StoreError for a negative number."""
        if workers < 0:
            raise StoreError(f"num_workers must be 0 or more, not {workers}")
        self._dataset, self._workers = dataset, workers
        self._batches: list[list[int]] = []  # the loader's batch sampler, filled before each pass
        self._loader: DataLoader[Any] | None = None

    def batches(self, batches: Sequence[Sequence[int]]) -> Iterator[list[Example | DatasetError]]:
        """The examples of each batch of rows in turn; in place of one that cannot be read, an error that tells why.

        Raises:
            DatasetError: worker processes cannot be started, died, or cannot send what they read.
        """
        if not self._workers:
            return (_read(self._dataset, rows) for rows in batches)
        return self._from_workers(batches)

    def _from_workers(self, batches: Sequence[Sequence[int]]) -> Iterator[list[Example | DatasetError]]:
        self._batches[:] = map(list, batches)
        packed = self._started()
        while True:
            try:
                content = next(packed, None)
            except (RuntimeError, OSError) as error:
                raise DatasetError(
                    f"a worker process that reads the training data ended ({str(error).splitlines()[0]}): it ran out "
                    f"of memory, out of shared memory (in a container, give it more: --shm-size) or crashed; use fewer "
                    f"workers, or {_ALONE}"
                ) from error
            if content is None:
                return
            batch = pickle.loads(content.numpy().data)
            if isinstance(batch, DatasetError):
                raise batch
            yield batch

    def _started(self) -> Iterator[Tensor]:
        """The processes stay for the next call."""
        if self._loader is None:
            self._loader = DataLoader(
                _PackedRows(self._dataset),
                batch_sampler=self._batches,
                collate_fn=default_convert,
                num_workers=self._workers,
                persistent_workers=True,
            )
        try:
            return iter(self._loader)
        except (pickle.PicklingError, TypeError, AttributeError) as error:  # where processes are not forked
            raise DatasetError(
                f"the training data cannot be sent to worker processes ({type(error).__name__}: {error}): define its "
                f"classes and functions at the top of a module, open files when a row is read, or {_ALONE}"
            ) from error


_ALONE = "read in this process (num_workers=0)"


class _PackedRows(Dataset[Any]):
    """A data set as a worker process reads it: whole batches, each packed into one tensor.

    A DataLoader sends each tensor through a file descriptor, and processes may not have enough for batches of examples.
    """

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __getitems__(self, rows: list[int]) -> Tensor:
        batch = _read(self._dataset, rows)
        try:
            return _packed(batch)
        except Exception as error:  # examples may be anything
            refusal = DatasetError(
                f"the examples of rows {rows[0]} to {rows[-1]} cannot be sent from a worker process "
                f"({type(error).__name__}: {error}): return tensors, arrays, images, numbers or text, or {_ALONE}"
            )
            return _packed(refusal)


def _read(dataset: Any, rows: Sequence[int]) -> list[Example | DatasetError]:
    try:
        return fetch(dataset, rows)
    except DatasetError as error:
        if len(rows) > 1:
            return [example for row in rows for example in _read(dataset, [row])]
        line = user_line(error)
        return [DatasetError(f"{error} ({line})" if line else str(error))]


class _Pickler(pickle.Pickler):
    """Pickles ordinary tensors as their bytes, twenty times faster than PyTorch does."""

    def reducer_override(self, value: Any) -> Any:
        if type(value) is not Tensor or value.layout != torch.strided or value.is_quantized or value.is_cuda:
            return NotImplemented
        content = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        return _tensor, (content, value.dtype, tuple(value.shape))


def _tensor(content: NDArray[np.uint8], dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(content).view(dtype).reshape(shape)


def _packed(value: Any) -> Tensor:
    """uint8 [bytes]"""
    content = io.BytesIO()
    _Pickler(content, protocol=5).dump(value)
    return torch.frombuffer(bytearray(content.getbuffer()), dtype=torch.uint8)
