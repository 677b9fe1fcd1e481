"""Requests that are asked in one of several ways: how that is checked, and how JSON Schema says it."""

from __future__ import annotations

from pydantic import BaseModel, JsonValue

_TYPES: dict[str, JsonValue] = {"example": "object", "min": "number", "max": "number"}  # the others are lists


def require_one(request: BaseModel, sources: tuple[str, ...]) -> None:
    """Raises ValueError unless exactly one of the fields is given."""
    given = [name for name in sources if getattr(request, name) is not None]
    if len(given) != 1:
        said = " and ".join(given) if given else "none of them"
        raise ValueError(f"give exactly one of {', '.join(sources)}; the request has {said}")


def exactly_one(sources: tuple[str, ...]) -> dict[str, JsonValue]:
    """JSON Schema: one of the fields is given, and the others are null or left out."""
    return {"oneOf": [_given(name, sources) for name in sources]}


def at_least_one(sources: tuple[str, ...]) -> dict[str, JsonValue]:
    """JSON Schema: one of the fields, or several, are given."""
    return {"anyOf": [_given(name, (name,)) for name in sources]}


def _given(name: str, sources: tuple[str, ...]) -> JsonValue:
    types: dict[str, JsonValue] = {
        other: {"type": _TYPES.get(other, "array") if other == name else "null"} for other in sources
    }
    return {"required": [name], "properties": types}
