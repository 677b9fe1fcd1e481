"""The one object that a user writes: model, training data and per-example loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from gradtrace.errors import QueryError, TaskError

Example = Any  # what task.train[i] returns
Batch = Any  # what task.collate returns
Label = int | float


class Task(ABC):
    """A model, its training data and its per-example loss. Subclass it; only `model`, `train` and `loss` are required.

    `train` is a map-style data set (`len` and integer indexing) that returns the same example for the same row every
    time: no augmentation, no shuffling. `query`, of the same kind, holds examples to ask about by number.
    `class_names` turns integer labels into words.

    `layers` chooses parameters by patterns of their names, as a shell chooses files: ["encoder.*", "!*.bias"] takes
    those of the encoder without its biases. Default: all that require a gradient.

    A task is copied for each thread that uses it: what it keeps on itself between calls (`self.logits = ...`) is right.
    What lies in globals of its module, or on its class, is shared by the copies: keep no state there.
    """

    train: Any
    query: Any = None
    class_names: Sequence[str] | None = None
    layers: Sequence[str] | None = None

    @abstractmethod
    def model(self) -> nn.Module:
        """The architecture; its weights come from the checkpoints."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The training loss of each example, without reduction. Shape [batch], floating point."""

    def measurement(self, model: nn.Module, batch: Batch) -> Tensor:
        """What is explained of a query, shape [batch]; lower is better, as for a loss (a negative margin, say).

        Default: the loss.
        """
        return self.loss(model, batch)

    def predict(self, model: nn.Module, batch: Batch) -> Tensor:
        """[batch, classes] class scores (logits or probabilities), or [batch] or [batch, 1] predicted values; of a
        classifier with one output, its logits or probabilities.

        Needed only where it is not known from the loss, because that calls none of PyTorch's loss functions, or
        examples have several outputs: for predictions in answers, for queries without a label, and for curvature
        from labels that the model would give. Leave it out where examples have several outputs.
        """
        raise NotImplementedError

    def representation(self, model: nn.Module, batch: Batch) -> Tensor:
        """The last hidden representation of each example, [batch, features] floating point.

        Default: the input of the model's last Linear layer, where that is one vector for each example. Models of
        sequences, say, define it: a mean over the tokens, or the last one's.
        """
        raise NotImplementedError

    def collate(self, examples: list[Example]) -> Batch:
        """Stack examples into a batch. Default: PyTorch's `default_collate`."""
        return default_collate(examples)

    def label(self, example: Example) -> Label | None:
        """The label of an example, None where it has none. Default: the second of an (input, label) pair."""
        if not (isinstance(example, tuple | list) and len(example) == 2):
            return None
        label = example[1]
        if isinstance(label, Tensor) and label.numel() != 1:
            return None
        value = label.item() if hasattr(label, "item") else label
        if isinstance(value, bool):
            return int(value)
        return value if isinstance(value, int | float) else None

    def with_label(self, example: Example, label: Label) -> Example:
        """The same example with another label. Default: replaces the second of an (input, label) pair."""
        if not (isinstance(example, tuple | list) and len(example) == 2):
            raise TaskError(
                f"{type(self).__name__}: the example is no (input, label) pair, so its label cannot be set; "
                "define with_label(self, example, label)"
            )
        old = self.train[0][1] if example[1] is None else example[1]  # of the kind that stacks with the others
        if isinstance(old, Tensor):
            if old.numel() != 1:
                raise TaskError(
                    f"{type(self).__name__}: labels are tensors {list(old.shape)}, which no number can replace; define "
                    "with_label(self, example, label), or no predict"
                )
            return example[0], torch.as_tensor(label, dtype=old.dtype).reshape(old.shape)
        if isinstance(old, float | np.floating):
            return example[0], type(old)(label)
        return example[0], label

    def parse(self, payload: Mapping[str, Any]) -> Example:
        """An example from the JSON object of a request; `label` in it is optional (None in the example then)."""
        raise QueryError(
            f"{type(self).__name__} takes no examples over HTTP: define parse(self, payload) -> example, "
            "or ask by query_rows or train_rows"
        )

    def render(self, example: Example) -> dict[str, Any]:
        """A JSON-able description for people: {"image": data URL}, {"text": str} or {"features": {name: value}}."""
        return {}

    def fit(self, rows: Sequence[int], seed: int) -> nn.Module:
        """Train from scratch on these rows of `train`, ascending: ground truth by retraining. The same rows and seed
        should give the same model; `seed` is in [0, 2^32)."""
        raise NotImplementedError

    @property
    def has_predict(self) -> bool:
        return type(self).predict is not Task.predict

    @property
    def has_representation(self) -> bool:
        return type(self).representation is not Task.representation

    @property
    def has_measurement(self) -> bool:
        return type(self).measurement is not Task.measurement

    @property
    def has_fit(self) -> bool:
        return type(self).fit is not Task.fit

    def label_name(self, label: Label | None) -> str | None:
        """The class name of an integer label, None where there are no names."""
        if self.class_names is None or not isinstance(label, int) or not 0 <= label < len(self.class_names):
            return None
        return self.class_names[label]
