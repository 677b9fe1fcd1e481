"""What a task's `render` gives, as JSON takes it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from gradtrace.errors import TaskError
from gradtrace.task import Example, Task


def rendered(task: Task, example: Example) -> dict[str, Any]:
    """`task.render(example)` in JSON values: numbers of NumPy and tensors of up to one dimension become numbers and
    lists, NaN and infinities None.

    Raises:
        TaskError: it holds what JSON has no word for, or is no object.
    """
    rendering = task.render(example)
    name = f"{type(task).__name__}.render"
    if not isinstance(rendering, Mapping):
        raise TaskError(
            f"{name} returns a {type(rendering).__name__}, not a dict such as "
            '{"image": data URL}, {"text": str} or {"features": {name: value}}'
        )
    plain: dict[str, Any] = _plain(rendering, name)
    return plain


def _plain(value: Any, place: str) -> Any:
    """place: where the value stands, such as `MyTask.render["features"][2]`; for messages."""
    if isinstance(value, np.generic | np.ndarray | Tensor):
        return _plain(_listed(value, place), place)
    if isinstance(value, str):
        return value if value.isascii() else value.encode(errors="replace").decode()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, Mapping):
        return {_key(key, place): _plain(part, f"{place}[{key!r}]") for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part, f"{place}[{at}]") for at, part in enumerate(value)]
    raise TaskError(f"{place} is {type(value).__name__}, which JSON cannot hold: {_remedy(value)}")


def _listed(value: np.generic | np.ndarray[Any, Any] | Tensor, place: str) -> Any:
    if len(value.shape) > 1:
        raise TaskError(
            f"{place} is a {type(value).__name__} of shape {list(value.shape)}: return its .tolist() where it is "
            "small, an image as a data URL, by gradtrace.tasks.payload.encode_image(uint8 [height, width, channels])"
        )
    return value.tolist()


def _key(key: Any, place: str) -> str:
    if not isinstance(key, str):
        raise TaskError(f"{place} has the key {key!r}, and keys of JSON objects are texts: use str(key)")
    return key


def _remedy(value: Any) -> str:
    if isinstance(value, bytes | bytearray):
        return "return text, such as base64.b64encode(value).decode()"
    return "return texts, numbers, lists and dicts of them"
