"""TabularClassification and TabularRegression: tasks over tables of numbers and categories."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gradtrace.errors import DatasetError, QueryError
from gradtrace.task import Batch, Example
from gradtrace.tasks.base import Classification, DataTask, Regression, TensorRows
from gradtrace.tasks.payload import check_keys, listed, number, shown

Statistic = float | npt.ArrayLike


class _Tabular(DataTask):
    """Tables of numbers and categories, with a column for each feature.

    `categories` lists the words of each categorical feature; the model sees them one-hot, after the numbers. `fill` has
    the number that replaces missing ones (None or NaN), for each feature that may have some. `mean` and `std` scale the
    numbers, in the order of `feature_names`. An example holds the unscaled row of the table: `collate` fills, scales
    and expands it.
    """

    label_type: type[int] | type[float]

    def __init__(
        self,
        model: Callable[[], nn.Module],
        train: Any,
        query: Any = None,
        *,
        feature_names: Sequence[str],
        categories: Mapping[str, Sequence[str]] | None = None,
        fill: Mapping[str, float] | None = None,
        class_names: Sequence[str] | None = None,
        mean: Statistic = 0.0,
        std: Statistic = 1.0,
    ) -> None:
        super().__init__(model, train, query, class_names=class_names)
        self.feature_names = tuple(feature_names)
        self.categories = {name: list(words) for name, words in (categories or {}).items()}
        self.fill = dict(fill or {})
        self.mean = torch.as_tensor(mean, dtype=torch.float32)
        self.std = torch.as_tensor(std, dtype=torch.float32)
        self._number_columns = [i for i, name in enumerate(self.feature_names) if name not in self.categories]
        fills = [self.fill.get(self.feature_names[column], math.nan) for column in self._number_columns]
        self._fills = torch.tensor(fills, dtype=torch.float32)

    def rows(self, inputs: Any, labels: Any) -> TensorRows:
        """Inputs are float32 [rows, features]; NaN for a missing number, categories by their number."""
        table = np.asarray(inputs, dtype=object if self.categories else np.float32)
        if table.ndim != 2 or table.shape[1] != len(self.feature_names):
            raise DatasetError(
                f"the features are of shape {list(table.shape)}; give [rows, {len(self.feature_names)}], one column a "
                "feature name"
            )
        columns = [self._column(name, column) for name, column in zip(self.feature_names, table.T, strict=True)]
        return TensorRows(torch.from_numpy(np.stack(columns, 1)), labels, "rows of features", self.label_type)

    def collate(self, examples: list[Example]) -> Batch:
        """(float32 [batch, numbers + words of all categories], int64 or float32 [batch])"""
        table = torch.stack([features for features, _ in examples])
        dtype = torch.float32 if self.label_type is float else torch.int64
        labels = torch.tensor([label for _, label in examples], dtype=dtype)
        numbers = table[:, self._number_columns]
        scaled = (torch.where(numbers.isnan(), self._fills, numbers) - self.mean) / self.std
        one_hot = [
            F.one_hot(table[:, self.feature_names.index(name)].long(), len(words)).float()
            for name, words in self.categories.items()
        ]
        return torch.cat([scaled, *one_hot], 1), labels

    def parse_input(self, payload: Mapping[str, Any]) -> Tensor:
        check_keys(payload, ("features", "label"))
        features = payload.get("features")
        if not isinstance(features, Mapping):
            raise QueryError(f'"features" is an object with a value for each of {listed(self.feature_names)}')
        known = set(self.feature_names)
        unknown = [name for name in features if name not in known]
        missing = [name for name in self.feature_names if name not in features]
        if unknown or missing:
            by_kind = {"missing": missing, "unknown": unknown}
            differences = "; ".join(f"{kind}: {listed(names)}" for kind, names in by_kind.items() if names)
            raise QueryError(f"the features do not match the task's; give each once and no other. {differences}")
        return torch.tensor([self._parsed(name, features[name]) for name in self.feature_names], dtype=torch.float32)

    def render(self, example: Example) -> dict[str, Any]:
        cells = zip(self.feature_names, example[0].cpu().numpy(), strict=True)
        return {"features": {name: self._rendered(name, value) for name, value in cells}}

    def in_memory(self, dataset: Any) -> bool:
        """Whether `table` reads any number of rows of `train` or `query` at once."""
        return isinstance(dataset, TensorRows) and isinstance(dataset.inputs, Tensor)

    def table(self, dataset: Any, rows: Sequence[int] | npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """The features of some rows of `train` or `query` as examples hold them: unscaled, NaN for a missing number,
        categories by their number. float32 [rows, features]."""
        if self.in_memory(dataset):
            table: Tensor = dataset.inputs[torch.as_tensor(rows)]
        else:
            table = torch.stack([dataset[int(row)][0] for row in rows])
        return table.cpu().float().numpy()

    def _column(self, name: str, values: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        if name in self.categories:
            codes = {word: number for number, word in enumerate(self.categories[name])}
            if unlisted := [word for word in values if word not in codes]:
                raise DatasetError(
                    f"{name} has {shown(unlisted[0])}, which its categories lack ({len(unlisted)} rows in all); list "
                    "every word, or leave those rows out"
                )
            return np.array([codes[word] for word in values], dtype=np.float32)
        column = values.astype(np.float32)  # None becomes NaN
        if not (np.isfinite(column) | (np.isnan(column) & (name in self.fill))).all():
            raise DatasetError(
                f"{name} has missing or infinite values; for missing ones give fill={{{name!r}: number}}, or leave "
                "those rows out"
            )
        return column

    def _parsed(self, name: str, value: Any) -> float:
        if name in self.categories:
            words = self.categories[name]
            if not isinstance(value, str) or value not in words:
                raise QueryError(f"feature {name} is {shown(value)}; give one of {listed(words)}")
            return words.index(value)
        if value is None and name in self.fill:
            return math.nan
        parsed = number(value)
        if parsed is None:
            remedy = "give a finite number" + (", or null where it is not known" if name in self.fill else "")
            raise QueryError(f"feature {name} is {shown(value)}; {remedy}")
        return parsed

    def _rendered(self, name: str, value: np.float32) -> float | str | None:
        if name in self.categories:
            return self.categories[name][int(value)]
        if np.isnan(value):
            return None
        return float(str(value))  # the shortest decimal of this float32: 0.1, not 0.10000000149


class TabularClassification(_Tabular, Classification):
    """Classify rows of a table by the model's [batch, classes] logits, cross-entropy loss.

        TASK = TabularClassification(
            model=make_model, train=(table, labels), feature_names=names, mean=table.mean(0), std=table.std(0)
        )

    Requests: {"features": {name: number, category, or null for a feature in `fill`}, "label": number or class name,
    optional}.
    """

    label_type = int


class TabularRegression(_Tabular, Regression):
    """Predict a number from rows of a table by the model's [batch] or [batch, 1] output, with squared error loss.

    The model's output is (prediction - label_mean) / label_std, so that networks can be trained on labels of any size.
    Labels and predictions are in the label's unit.

    Requests: as for TabularClassification, but the label is a number.
    """

    label_type = float

    def __init__(
        self,
        model: Callable[[], nn.Module],
        train: Any,
        query: Any = None,
        *,
        feature_names: Sequence[str],
        categories: Mapping[str, Sequence[str]] | None = None,
        fill: Mapping[str, float] | None = None,
        mean: Statistic = 0.0,
        std: Statistic = 1.0,
        label_mean: float = 0.0,
        label_std: float = 1.0,
    ) -> None:
        super().__init__(
            model, train, query, feature_names=feature_names, categories=categories, fill=fill, mean=mean, std=std
        )
        self.label_mean = label_mean
        self.label_std = label_std
