"""Flags of commands, made from the fields of a pydantic model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo


def with_flags(
    model: type[BaseModel], names: Collection[str], panel: str | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a Typer command, in place of its **flags, a flag for each of these fields. A flag that is not given is None;
    values are for the model to check. panel: the heading over these flags in the command's help"""
    fields = ((name, field) for name, field in model.model_fields.items() if name in names)
    flags = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[
                _flag_type(field.annotation),
                typer.Option(help=_help(field), show_default=False, rich_help_panel=panel),
            ],
        )
        for name, field in fields
    ]

    def decorated(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        spelled = [
            parameter
            for parameter in signature.parameters.values()
            if parameter.kind is not inspect.Parameter.VAR_KEYWORD
        ]
        parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in spelled] + flags
        command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return command

    return decorated


def _flag_type(annotation: Any) -> Any:
    """What Typer parses."""
    if get_origin(annotation) in (Union, UnionType, Annotated):
        return _flag_type(get_args(annotation)[0])
    if get_origin(annotation) is Literal:
        return str | None
    return annotation | None


def _help(field: FieldInfo) -> str:
    has_default = not field.is_required() and field.default is not None
    return f"{field.description} (default: {field.default})" if has_default else f"{field.description}"
