"""Writes docs/settings.md and docs/api.md: `make reference`.

Pydantic and FastAPI describe the settings and the API as JSON schemas; the templates beside this file lay them out.
"""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader

from gradtrace_service.app import create_service
from gradtrace_service.settings import Settings

DOCS = Path(__file__).parents[1]


def pages() -> dict[Path, str]:
    """The text of each page, by its file."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    # Routes do not depend on what is hosted; with `processes`, which are not started, no index is opened.
    schemas = {
        "api.md": create_service([], Settings(processes=1)).openapi(),
        "settings.md": Settings.model_json_schema(),
    }
    return {DOCS / name: environment.get_template(f"{name}.jinja").render(schema) for name, schema in schemas.items()}


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text)
