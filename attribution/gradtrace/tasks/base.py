"""The base classes of the ready-made tasks: opening the data, and the losses of classification and regression."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradtrace.errors import QueryError
from gradtrace.task import Batch, Task
from gradtrace.tasks.payload import number, shown


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
    def rows(self, inputs: Any, labels: Any) -> Any:
        """A data set of (input, label) pairs from two arrays."""

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
        label = payload.get("label")
        if label is None:
            return None
        if isinstance(label, str):
            return self._class_number(label)
        if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < self.classes:
            allowed = f"a class number from 0 to {self.classes - 1}, or a class name"
            raise QueryError(f"label {shown(label)}: give {allowed}, or leave it out")
        return label

    def _class_number(self, label: str) -> int:
        names = list(self.class_names or ())
        if label not in names:
            allowed = f"one of {', '.join(names)}" if names else "a number: this task's classes have no names"
            raise QueryError(f"label {shown(label)} is not a class of this task; give {allowed}")
        return names.index(label)


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
