"""The results of a task's `render`, converted to JSON values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from gradtrace.errors import TaskError
from gradtrace.task import Example, Task


def rendered(task: Task, example: Example) -> dict[str, Any]:
    """`task.render(example)` in JSON values. NumPy numbers, arrays and tensors of up to one dimension become numbers
    and lists; NaN and infinities become None.

    Raises:
        TaskError: the result is not a dict, or holds a value that JSON cannot represent.
    """
    rendering = task.render(example)
    name = f"{type(task).__name__}.render"
    if not isinstance(rendering, Mapping):
        raise TaskError(
            f"{name} returns a {type(rendering).__name__}, not a dict such as "
            '{"image": data URL}, {"text": str} or {"features": {name: value}}'
        )
    json_object: dict[str, Any] = _json_value(rendering, name)
    return json_object


def _json_value(value: Any, path: str) -> Any:
    """path: of the value, such as `MyTask.render["features"][2]`, for messages"""
    if isinstance(value, np.generic | np.ndarray | Tensor):
        if len(value.shape) > 1:
            raise TaskError(
                f"{path} is a {type(value).__name__} of shape {list(value.shape)}: return its .tolist() where it "
                "is small, an image as a data URL, by gradtrace.tasks.payload.encode_image(uint8 [height, width, "
                "channels])"
            )
        return _json_value(value.tolist(), path)
    if isinstance(value, str):
        return value if value.isascii() else value.encode(errors="replace").decode()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, Mapping):
        return {_key(key, path): _json_value(item, f"{path}[{key!r}]") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_value(item, f"{path}[{index}]") for index, item in enumerate(value)]
    binary = isinstance(value, bytes | bytearray)
    remedy = "text, such as base64.b64encode(value).decode()" if binary else "texts, numbers, lists and dicts of them"
    raise TaskError(f"{path} is {type(value).__name__}, which JSON cannot hold: return {remedy}")


def _key(key: Any, path: str) -> str:
    if not isinstance(key, str):
        raise TaskError(f"{path} has the key {key!r}, and keys of JSON objects are texts: use str(key)")
    return key
