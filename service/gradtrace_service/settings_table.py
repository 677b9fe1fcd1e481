"""Prints docs/settings.md: every setting with its flag, variable, key, type, default and meaning.

python -m gradtrace_service.settings_table > docs/settings.md
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from gradtrace_service.settings import Settings, flag_of, variable_of

_HEAD = """# Settings of the service

Each setting can be given in three ways: as a flag of `gradtrace serve`, as an environment variable, and as a key of the
TOML file that `gradtrace serve --config FILE` names. A flag goes before the environment, and that before the file. A
value that does not fit ends the program before it serves, with a line that names the setting, where it was given, the
value and what it may be; so does a key of the file that is no setting. Other `GRADTRACE_*` variables are not settings:
`GRADTRACE_DATA` tells the examples where data sets lie, `GRADTRACE_API_KEY` is what `gradtrace query` sends.

"""
_TAIL = """
A list is given by repeating the flag, in the environment with commas, and in the file as a TOML array.
[gradtrace.toml](gradtrace.toml) is a file to begin with; [operations.md](operations.md) says what to watch.

This page is made by `make settings` from `service/gradtrace_service/settings.py`.
"""
_TYPES = {str: "text", int: "integer", float: "number", bool: "true or false", Path: "path"}
_SIGNS = (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<"))  # attributes of annotated_types' bounds


def settings_page() -> str:
    """docs/settings.md."""
    lines = [f"| {' | '.join(row)} |" for row in _rows()]
    lines.insert(1, "|---" * len(next(_rows())) + "|")
    return _HEAD + "\n".join(lines) + "\n" + _TAIL


def _rows() -> Iterator[tuple[str, ...]]:
    yield "flag", "environment variable", "file key", "type", "default", "meaning"
    for name, field in Settings.model_fields.items():
        default = "" if field.default is None else f"`{json.dumps(field.default)}`"
        meaning = (field.description or "").replace("|", "\\|")
        yield f"`{flag_of(name)}`", f"`{variable_of(name)}`", f"`{name}`", _type_name(field), default, meaning


def _type_name(field: FieldInfo) -> str:
    return _name(field.annotation) + _bounds(field.metadata)


def _name(annotation: Any) -> str:
    arguments = [one for one in get_args(annotation) if one is not NoneType]
    origin = get_origin(annotation)
    if origin is Literal:
        return " or ".join(f"`{one}`" for one in arguments)
    if origin in (Union, UnionType):
        return " or ".join(map(_name, arguments))
    if origin is Annotated:
        return _name(arguments[0]) + _bounds(arguments[1:])
    if origin is list:
        return f"list of {_name(arguments[0])}s"
    return _TYPES[annotation]


def _bounds(metadata: Any) -> str:
    return "".join(f", {sign} {getattr(one, key)}" for one in metadata for key, sign in _SIGNS if hasattr(one, key))


if __name__ == "__main__":
    print(settings_page(), end="")
