"""Task: the object that a user writes, with the model, the training data and the per-example loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from gradtrace.errors import QueryError, TaskError

Example = Any  # what task.train[i] returns
Batch = Any  # what task.collate returns
Label = int | float


class Explained(NamedTuple):
    """What is explained of a query.

    examples: one; or two, of which the difference of the measurements is explained, the first's minus the second's
    words: after the measurement's name, as in "loss" + " of 'Paris'"
    """

    examples: tuple[Example, ...]
    words: str = ""


class Task(ABC):
    """A model, its training data and its per-example loss. Subclass it; only `model`, `train` and `loss` are required.

    `train` is a map-style data set (`len` and integer indexing) that returns the same example for a row every time,
    without augmentation or shuffling. `query`, of the same kind, holds examples to ask about by number. `class_names`
    are the names of the integer labels 0, 1, ...

    `layers` chooses parameters by patterns of their names, as in a shell: ["encoder.*", "!*.bias"] are the encoder's
    parameters without its biases. Default: all that require a gradient.

    Each thread uses its own copy of the task, so attributes may keep state between calls (`self.logits = ...`). The
    copies share the class and the globals of the task's module: keep no state there.
    """

    train: Any
    query: Any = None
    class_names: Sequence[str] | None = None
    layers: Sequence[str] | None = None

    @abstractmethod
    def model(self) -> nn.Module:
        """The model; its weights are replaced by those of the checkpoints."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The training loss of each example, not reduced. Floating point [batch]."""

    def measurement(self, model: nn.Module, batch: Batch) -> Tensor:
        """The quantity of a query that is explained, floating point [batch]. Like a loss, lower is better (to explain a
        margin, return the negative margin). Default: the loss."""
        return self.loss(model, batch)

    def explained(self, example: Example) -> Explained:
        """What is explained of a query: its measurement or, for a contrast, by how much that exceeds another example's.
        Default: the example's measurement."""
        return Explained((example,))

    def predict(self, model: nn.Module, batch: Batch) -> Tensor:
        """The model's predictions: [batch, classes] class scores (logits or probabilities); or [batch] or [batch, 1]
        predicted values, or a binary classifier's logits or probabilities.

        They are used in answers, for queries without a label, and for the Fisher information with labels from the
        model. Define it only if the loss does not tell them, because it calls none of PyTorch's loss functions. Leave
        it out if examples have several outputs.
        """
        raise NotImplementedError

    def representation(self, model: nn.Module, batch: Batch) -> Tensor:
        """The last hidden representation of each example, floating point [batch, features].

        Default: the input of the model's last Linear layer, if that is one vector for each example. For models of
        sequences define it: the mean over the tokens, for example, or the last token's.
        """
        raise NotImplementedError

    def collate(self, examples: list[Example]) -> Batch:
        """Stack examples into a batch. Default: PyTorch's `default_collate`."""
        return default_collate(examples)

    def parts(self, examples: Sequence[Example]) -> list[list[int]]:
        """The positions of the examples that go through the model together, in parts, the largest examples first.
        Define it where padding costs much. Default: all together."""
        return [list(range(len(examples)))]

    def label(self, example: Example) -> Label | None:
        """The label of an example, None if it has none. Default: the second element of an (input, label) pair."""
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
        """The example with another label. Default: replaces the second element of an (input, label) pair."""
        if not (isinstance(example, tuple | list) and len(example) == 2):
            raise TaskError(
                f"{type(self).__name__}: the example is not an (input, label) pair, so its label cannot be set; "
                "define with_label(self, example, label)"
            )
        current = self.train[0][1] if example[1] is None else example[1]  # the type tells what stacks into a batch
        if isinstance(current, Tensor):
            if current.numel() != 1:
                raise TaskError(
                    f"{type(self).__name__}: labels are tensors {list(current.shape)}, which no number can replace; "
                    "define with_label(self, example, label), or no predict"
                )
            return example[0], torch.as_tensor(label, dtype=current.dtype).reshape(current.shape)
        if isinstance(current, float | np.floating):
            return example[0], type(current)(label)
        return example[0], label

    def parse(self, payload: Mapping[str, Any]) -> Example:
        """The example of a request's JSON object. If it has no "label", the example's label is None."""
        raise QueryError(
            f"{type(self).__name__} takes no examples over HTTP: define parse(self, payload) -> example, "
            "or ask by query_rows or train_rows"
        )

    def render(self, example: Example) -> dict[str, Any]:
        """How to show the example, as JSON: {"image": data URL}, {"text": str} or {"features": {name: value}}."""
        return {}

    def tokens(self, example: Example) -> Sequence[str] | Sequence[Sequence[str]]:
        """The texts of an example's tokens, one for each position of the model's layers, without padding; joined, they
        read as the text. A model whose layers run over several sequences has a list for each, of different lengths.

        Define it to be told which tokens a score comes from (`Index.token_scores`).
        """
        raise NotImplementedError

    def fit(self, rows: Sequence[int], seed: int) -> nn.Module:
        """Train a new model on these rows of `train`, ascending, for ground truth by retraining.

        The same rows and seed should give the same model. `seed` is in [0, 2^32).
        """
        raise NotImplementedError

    @property
    def has_label(self) -> bool:
        return type(self).label is not Task.label

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
    def has_tokens(self) -> bool:
        return type(self).tokens is not Task.tokens

    @property
    def has_fit(self) -> bool:
        return type(self).fit is not Task.fit

    def label_name(self, label: Label | None) -> str | None:
        """The class name of an integer label; None if it has none."""
        if self.class_names is None or not isinstance(label, int) or not 0 <= label < len(self.class_names):
            return None
        return self.class_names[label]
