"""Commands about API keys."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gradtrace_service.http.api_keys import Scope, add_key

app = typer.Typer(help="API keys of a service.", no_args_is_help=True)


@app.callback()
def keys() -> None:
    """API keys of a service; docs/security.md explains them."""


@app.command()
def new(
    scope: Annotated[list[Scope], typer.Option(help="What it is for. Repeatable.")],
    name: Annotated[str, typer.Option(help="Its name in logs and refusals; not a secret.")],
    file: Annotated[Path, typer.Option(help="File of keys, as for `serve --api-key-file`; created if missing.")],
) -> None:
    """Make a key: it is printed, this once, and its hash is added to the file.

    A service that uses the file takes the key at once. To revoke a key, delete its line.
    """
    typer.echo(add_key(file, name, scope))
    typer.echo(f"Keep it now: {file} holds only its hash.", err=True)
