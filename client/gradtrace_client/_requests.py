"""Arguments of calls as JSON values, checked against the request's schema."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticSerializationError

from gradtrace_client._errors import not_sent
from gradtrace_client.request_schemas import MAX_K, MAX_QUERIES
from gradtrace_client.service_schemas import FieldProblem, field_problems


def request_json(schema: type[BaseModel], **fields: Any) -> dict[str, Any]:
    """The fields of a request as JSON values, NaN as null, without those that have their default.

    Raises:
        InvalidRequestError: the fields do not fit the schema, or an example cannot be written as JSON.
        OSError: a file cannot be read.
    """
    try:
        return schema(**to_json(fields)).model_dump(mode="json", exclude_defaults=True, by_alias=True)
    except ValidationError as error:
        raise not_sent(*field_problems(error.errors())) from None
    except PydanticSerializationError as error:
        raise not_sent(FieldProblem(field="", detail=f"examples must be JSON values: {error}")) from None


def index_param(index: str | None) -> dict[str, str]:
    return {} if index is None else {"index": index}


def query_pages(
    sources: Mapping[str, Iterable[Any] | None], k: int, page: int | None, options: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """The arguments of `influence` for one page of queries after another, from the one source that is given.

    Raises:
        InvalidRequestError: none or several of the sources are given, or an argument is not one of a stream.
    """
    given = {name: iter(source) for name, source in sources.items() if source is not None}
    if len(given) != 1:
        raise not_sent(FieldProblem(field="", detail=f"give exactly one of {', '.join(sources)}"))
    if "aggregate" in options:
        raise not_sent(FieldProblem(field="aggregate", detail="is for one request: call `influence` for a mean"))
    if page is not None and page < 1:
        raise not_sent(FieldProblem(field="page", detail="must be at least 1"))
    ((name, queries),) = given.items()
    size = page or min(MAX_QUERIES, MAX_K // max(1, min(k, MAX_K)))
    while batch := list(islice(queries, size)):
        yield {name: batch, "k": k, **options}


def to_json(value: Any) -> Any:
    """`value` with everything replaced that JSON cannot express but that has a plain meaning.

    A path or bytes: the file's content in base64. A PIL image: a PNG in base64. Arrays and tensors: nested lists, and
    their scalars: numbers. A str is never taken for a path, since it may come from someone else. None of the libraries
    is imported: objects are recognised by their attributes.

    Raises:
        InvalidRequestError: a PIL image has a mode that PNG does not support.
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
    if hasattr(value, "getbands"):  # a PIL image
        return to_json(_png(value))
    return value.tolist() if hasattr(value, "tolist") else value


def _png(image: Any) -> bytes:
    buffer = io.BytesIO()
    try:
        image.save(buffer, format="PNG")
    except OSError as error:
        remedy = f"{error}; convert the image first: image.convert('RGB')"
        raise not_sent(FieldProblem(field="", detail=remedy)) from None
    return buffer.getvalue()
