"""The base classes of the ready-made tasks: their data, and the losses of classification and regression."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradtrace.errors import DatasetError, QueryError
from gradtrace.task import Batch, Task
from gradtrace.tasks.payload import listed, number, shown

VARIABLE = "GRADTRACE_DATA"


def data_file(name: str) -> Path:
    """The path of a file in the directory that the environment variable GRADTRACE_DATA names.

    Raises:
        DatasetError: the variable is not set, or the file is missing.
    """
    directory = os.environ.get(VARIABLE)
    if directory and (Path(directory) / name).is_file():
        return Path(directory) / name
    problem = f"is not in {directory}" if directory else "is needed"
    raise DatasetError(f"{name} {problem}; set {VARIABLE} to the directory that holds it")


class Rows:
    """A data set of (input, label) pairs.

    labels: converted to `label_type`.  noun: what the inputs are, in the plural, for messages
    """

    def __init__(self, inputs: Any, labels: Any, noun: str, label_type: type[int] | type[float] = int) -> None:
        self.inputs = inputs
        self.labels = [label_type(label) for label in np.asarray(labels)]
        if len(inputs) != len(self.labels):
            raise DatasetError(f"there are {len(inputs)} {noun} and {len(self.labels)} labels; give one label for each")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> tuple[Any, int | float]:
        return self.inputs[row], self.labels[row]


class TensorRows(Rows):
    """Rows of a tensor [rows, ...], or of what is indexed like one."""

    def __getitems__(self, rows: Sequence[int]) -> list[tuple[Tensor, int | float]]:
        """Several rows at once, as PyTorch's loader asks for them."""
        inputs = self.inputs[torch.as_tensor(rows)]
        return list(zip(inputs.unbind(), [self.labels[row] for row in rows], strict=True))


class DataTask(Task):
    """A task of a model factory and data.

    `train` and `query` are each a map-style data set of (input, label) pairs, a pair of arrays (inputs, labels), or a
    function without arguments that returns either and is called once, when the data is first used.
    """

    def __init__(
        self,
        model: Callable[[], nn.Module],
        train: Any,
        query: Any = None,
        *,
        class_names: Sequence[str] | None = None,
    ) -> None:
        self._model = model
        self._train = train
        self._query = query
        self.class_names = class_names

    def model(self) -> nn.Module:
        return self._model()

    @cached_property
    def train(self) -> Any:
        return self._open(self._train)

    @cached_property
    def query(self) -> Any:
        return None if self._query is None else self._open(self._query)

    @abstractmethod
    def rows(self, inputs: Any, labels: Any) -> Rows:
        """The data set of two arrays."""

    @abstractmethod
    def parse_input(self, payload: Mapping[str, Any]) -> Any:
        """The input in a request, without its label. Raises QueryError for an invalid one."""

    @abstractmethod
    def parse_label(self, payload: Mapping[str, Any]) -> int | float | None:
        """The label in a request, None if it has none. Raises QueryError for an invalid one."""

    def parse(self, payload: Mapping[str, Any]) -> tuple[Any, int | float | None]:
        return self.parse_input(payload), self.parse_label(payload)

    def _open(self, source: Any) -> Any:
        source = source() if callable(source) else source
        return self.rows(*source) if isinstance(source, tuple) and len(source) == 2 else source


class Classification(DataTask):
    """Cross-entropy of the model's [batch, classes] logits.

    It is computed in float64: for examples with p near 1, float32 rounds the loss to zero and changes the direction of
    the gradient, which `trak` divides by 1 - p.
    """

    def predict(self, model: nn.Module, batch: Batch) -> Tensor:
        return run(model, batch)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(self.predict(model, batch).double(), batch[1], reduction="none").float()

    @cached_property
    def classes(self) -> int:
        """The number of class names; without names, the number of the model's outputs for the first training row."""
        if self.class_names is not None:
            return len(self.class_names)
        with torch.no_grad():
            return int(self.predict(self.model().eval(), self.collate([self.train[0]])).shape[1])

    def parse_label(self, payload: Mapping[str, Any]) -> int | None:
        label, names = payload.get("label"), list(self.class_names or ())
        if isinstance(label, str) and label in names:
            return names.index(label)
        if label is None:
            return None
        if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < self.classes:
            return label
        named = f"one of {listed(names)}" if names else "no name: this task's classes have no names"
        raise QueryError(f"label {shown(label)}: give a class number from 0 to {self.classes - 1}, or {named}")


class Regression(DataTask):
    """Squared error of the model's [batch] or [batch, 1] output, of (label - label_mean) / label_std."""

    label_mean = 0.0
    label_std = 1.0

    def predict(self, model: nn.Module, batch: Batch) -> Tensor:
        return run(model, batch).reshape(len(batch[1])) * self.label_std + self.label_mean

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        labels: Tensor = batch[1]
        return ((self.predict(model, batch) - labels) / self.label_std).square()

    def parse_label(self, payload: Mapping[str, Any]) -> float | None:
        label = payload.get("label")
        value = number(label)
        if value is None and label is not None:
            raise QueryError(f"label {shown(label)}: give a finite number, or leave it out")
        return value


def run(model: nn.Module, batch: Batch) -> Tensor:
    """The model's output for a batch (inputs, labels). A tuple of inputs is passed as several arguments."""
    inputs = batch[0]
    output: Tensor = model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    return output
