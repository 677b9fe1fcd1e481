"""Classification and regression from tables of numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from gradtrace.errors import DatasetError, QueryError
from gradtrace.task import Batch, Example
from gradtrace.tasks.base import Classification, DataTask, Regression
from gradtrace.tasks.payload import check_keys, number, shown

Column = float | npt.ArrayLike


class TableRows:
    """Data set over features [rows, features] and labels [rows]."""

    def __init__(self, features: Any, labels: Any, label_type: type[int] | type[float], names: Sequence[str]) -> None:
        table = np.asarray(features, dtype=np.float32)
        if table.ndim != 2 or table.shape[1] != len(names):
            raise DatasetError(
                f"the features are of shape {list(table.shape)}; give [rows, {len(names)}], one column a feature name"
            )
        bad = [name for name, column in zip(names, table.T, strict=True) if not np.isfinite(column).all()]
        if bad:
            raise DatasetError(
                f"{', '.join(bad)} has missing or infinite values; fill them in, or leave those rows out"
            )
        self.features = torch.from_numpy(table.copy())
        self.labels = [label_type(label) for label in np.asarray(labels)]
        if len(table) != len(self.labels):
            raise DatasetError(
                f"there are {len(table)} rows of features and {len(self.labels)} labels; give one label for each row"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> tuple[Tensor, int | float]:
        return self.features[row], self.labels[row]

    def __getitems__(self, rows: Sequence[int]) -> list[tuple[Tensor, int | float]]:
        """Several rows at once, as PyTorch's loader asks for them."""
        features = self.features[torch.as_tensor(rows)]
        return list(zip(features.unbind(), [self.labels[row] for row in rows], strict=True))


class _Tabular(DataTask):
    """Examples hold the raw numbers, float32 [features]; `collate` scales a batch to (features - mean) / std."""

    label_type: type[int] | type[float]

    def __init__(
        self,
        model: Callable[[], nn.Module],
        train: Any,
        query: Any = None,
        *,
        feature_names: Sequence[str],
        class_names: Sequence[str] | None = None,
        mean: Column = 0.0,
        std: Column = 1.0,
    ) -> None:
        super().__init__(model, train, query, class_names=class_names)
        self.feature_names = tuple(feature_names)
        self.mean = torch.as_tensor(mean, dtype=torch.float32)
        self.std = torch.as_tensor(std, dtype=torch.float32)

    def rows(self, inputs: Any, labels: Any) -> TableRows:
        return TableRows(inputs, labels, self.label_type, self.feature_names)

    def collate(self, examples: list[Example]) -> Batch:
        """(float32 [batch, features], int64 or float32 [batch])"""
        features = torch.stack([features for features, _ in examples])
        labels = torch.tensor(
            [label for _, label in examples], dtype=torch.float32 if self.label_type is float else torch.int64
        )
        return (features - self.mean) / self.std, labels

    def parse_input(self, payload: Mapping[str, Any]) -> Tensor:
        check_keys(payload, ("features", "label"))
        features = payload.get("features")
        if not isinstance(features, Mapping):
            raise QueryError(f'"features" is an object with a number for each of {", ".join(self.feature_names)}')
        unknown = [str(name) for name in features if name not in self.feature_names]
        missing = [name for name in self.feature_names if name not in features]
        if unknown or missing:
            parts = [
                f"{kind}: {', '.join(names[:10])}"
                for kind, names in (("missing", missing), ("unknown", unknown))
                if names
            ]
            raise QueryError(f"the features do not match the task's; give each once and no other. {'; '.join(parts)}")
        return torch.tensor([_number(name, features[name]) for name in self.feature_names], dtype=torch.float32)

    def render(self, example: Example) -> dict[str, Any]:
        # The shortest decimal that is the same float32: 0.1, not 0.10000000149.
        values = [float(str(value)) for value in example[0].cpu().numpy()]
        return {"features": dict(zip(self.feature_names, values, strict=True))}


class TabularClassification(_Tabular, Classification):
    """Classify rows of a table by the model's [batch, classes] logits, cross-entropy loss.

        TASK = TabularClassification(
            model=make_model, train=(table, labels), feature_names=names, mean=table.mean(0), std=table.std(0)
        )

    Requests: {"features": {name: number, ...}, "label": number or class name, optional}.
    """

    label_type = int


class TabularRegression(_Tabular, Regression):
    """Predict a number from rows of a table by the model's [batch] or [batch, 1] output, squared error.

    Constructed as TabularClassification is. Requests: {"features": {name: number, ...}, "label": number, optional}.
    """

    label_type = float


def _number(name: str, value: Any) -> float:
    found = number(value)
    if found is None:
        raise QueryError(f"feature {name} is {shown(value)}; give a finite number")
    return found
