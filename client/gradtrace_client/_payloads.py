"""Images, arrays and files as JSON values. None of their libraries is imported: objects are known by what they do."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gradtrace_client._errors import not_sent
from gradtrace_client.problem_schemas import FieldProblem


def to_json(value: Any) -> Any:
    """`value` with everything in it that JSON has no word for replaced, where there is a plain meaning.

    A path or bytes: the file's content in base64. A PIL image: a PNG in base64. Arrays and tensors: nested lists;
    scalars of theirs: numbers. A str is never taken for a path, as it may come from somebody else.

    Raises:
        InvalidRequestError: a PIL image of a mode that PNG has not.
        OSError: a file cannot be read.
    """
    if isinstance(value, Mapping):
        return {key: to_json(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(part) for part in value]
    if isinstance(value, Path):
        value = value.read_bytes()
    if isinstance(value, bytes | bytearray):
        return base64.b64encode(value).decode("ascii")
    if hasattr(value, "getbands"):  # PIL's name for an image's channels
        return to_json(_png(value))
    return value.tolist() if hasattr(value, "tolist") else value


def _png(image: Any) -> bytes:
    buffer = io.BytesIO()
    try:
        image.save(buffer, format="PNG")
    except OSError as error:
        remedy = f"{error}; convert the image first: image.convert('RGB')"
        raise not_sent([FieldProblem(field="", detail=remedy)]) from None
    return buffer.getvalue()
