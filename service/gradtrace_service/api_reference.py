"""Prints docs/api.md: every endpoint, with its fields and statuses, from the service's own OpenAPI schema.

python -m gradtrace_service.api_reference > docs/api.md
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from gradtrace_service.app import create_service
from gradtrace_service.settings import Settings

Schema = Mapping[str, Any]

_HEAD = """# The HTTP API

Bodies are JSON, requests and answers alike. `GET /openapi.json` is this page as a schema, and `/docs` a page to try it
out. Refusals are [problem documents](#problem) (RFC 9457, `application/problem+json`) that name the field and the
remedy. A service with API keys takes them as `Authorization: Bearer KEY` and also answers 401 and 403
([security.md](security.md)). Every answer carries the service's version as `Gradtrace-Version`: within a major version
fields are added and none change, so clients pass over those that they do not know. [client.md](client.md) describes
the SDK, [queries.md](queries.md) what the options of a query mean and cost.

This page is made by `make api` from the code.
"""
_REFERENCE = "#/components/schemas/"
_SIGNS = (
    ("minimum", "≥"),
    ("exclusiveMinimum", ">"),
    ("maximum", "≤"),
    ("exclusiveMaximum", "<"),
    ("minItems", "items ≥"),
    ("maxItems", "items ≤"),
    ("minProperties", "keys ≥"),
    ("maxLength", "characters ≤"),
)


def api_page() -> str:
    """docs/api.md."""
    # Routes do not depend on what is hosted; processes are not started, and so nothing is opened.
    openapi = create_service([], Settings(processes=1)).openapi()
    lines = [_HEAD]
    for path, operations in openapi["paths"].items():
        for verb, operation in operations.items():
            lines += [f"## {verb.upper()} {path}\n", *_operation(operation)]
    lines.append("## Schemas\n")
    for name, schema in openapi["components"]["schemas"].items():
        lines += [f"### {name}\n", *_described(schema), *_fields(schema)]
    return "\n".join(lines)


def _operation(operation: Schema) -> Iterator[str]:
    yield operation["description"] + "\n"
    if "requestBody" in operation:
        yield f"Body: {_content(operation['requestBody'])}.\n"
    if "parameters" in operation:
        yield from _table(
            ("parameter", "in", "type", "default", "meaning"),
            (
                (
                    f"`{one['name']}`",
                    one["in"],
                    _type(one["schema"]),
                    _default(one["schema"], one["required"]),
                    _meaning(one),
                )
                for one in operation["parameters"]
            ),
        )
    statuses: dict[str, list[str]] = {}
    for status, response in sorted(operation["responses"].items()):
        statuses.setdefault(_content(response), []).append(status)
    yield from _table(("status", "answer"), ((", ".join(some), answer) for answer, some in statuses.items()))


def _content(body: Schema) -> str:
    """What a body or response holds."""
    for kind, content in body.get("content", {}).items():
        if "itemSchema" in content:
            data = content["itemSchema"]["properties"]["data"]["contentSchema"]
            return f"`{kind}` of {_type(data)}"
        return _type(content["schema"]) if content.get("schema") else f"`{kind}`"
    return ""


def _described(schema: Schema) -> Iterator[str]:
    if "description" in schema:
        yield schema["description"] + "\n"


def _fields(schema: Schema) -> list[str]:
    required = schema.get("required", ())
    return _table(
        ("field", "type", "default", "meaning"),
        (
            (f"`{name}`", _type(field), _default(field, name in required), _meaning(field))
            for name, field in schema["properties"].items()
        ),
    )


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    lines = [head, ("---",) * len(head), *(tuple(cell.replace("|", "\\|") for cell in row) for row in rows)]
    return [*(f"| {' | '.join(line)} |" for line in lines), ""]


def _meaning(field: Schema) -> str:
    return " ".join(field.get("description", "").split())


def _default(schema: Schema, required: bool) -> str:
    if required:
        return "required"
    default = schema.get("default")
    default = sorted(default) if isinstance(default, list) else default  # sets have no order
    return "" if default is None else f"`{json.dumps(default)}`"


def _type(schema: Schema) -> str:
    """A type in words, with its bounds; a schema of this page as a link."""
    if "$ref" in schema:
        name = schema["$ref"].removeprefix(_REFERENCE)
        return f"[{name}](#{name.lower()})"
    if "anyOf" in schema:
        return " or ".join(_type(one) for one in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return " or ".join(f"`{json.dumps(one)}`" for one in schema.get("enum", [schema.get("const")]))
    bounds = ", ".join(f"{sign} {_number(schema[key])}" for key, sign in _SIGNS if key in schema)
    kind: str = schema.get("format", schema.get("type", "any"))
    return kind + f" ({bounds})" * bool(bounds) + _parts(schema)


def _parts(schema: Schema) -> str:
    """What an array or an object holds."""
    held = schema.get("items", schema.get("additionalProperties"))
    return f" of {_type(held)}" if isinstance(held, Mapping) else ""


def _number(bound: float) -> str:
    return "2⁵³" if bound == 2**53 else f"{bound:g}"


if __name__ == "__main__":
    print(api_page(), end="")
