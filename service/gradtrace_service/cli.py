"""The one command line, put together from each room's commands.

The application and its server are imported by the commands that serve: FastAPI and uvicorn take a third of a second,
and every job of a service is a command that needs neither.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from gradtrace.errors import GradtraceError, LockedIndexError, QueryError
from gradtrace.user_code import user_line
from gradtrace_client import Client, ClientError, InfluenceAnswer, TokensAnswer
from gradtrace_client.request_schemas import MAX_TOKEN_ROWS, SOURCES, InfluenceRequest, TokensRequest
from gradtrace_indexer.cli import app as indexer_commands
from gradtrace_indexer.flags import with_flags
from gradtrace_indexer.task_loading import spec_of
from gradtrace_service.console import print_answer, print_tokens
from gradtrace_service.demo import Dataset, run_demo
from gradtrace_service.doctor.command import app as doctor_command
from gradtrace_service.engine.work import is_out_of_memory
from gradtrace_service.http.api_keys import Scope, add_key
from gradtrace_service.indexes.hosted import Hosted, hosted
from gradtrace_service.listeners import host_of, inherited
from gradtrace_service.settings import Settings, read_settings

_MORE_MEMORY = "give the machine or container more, or lower --batch-size or --num-workers where the command has them"
_INTERRUPTED = 130  # exit code after Ctrl-C, as shells count it

app = typer.Typer(
    help="Which training examples made this model predict that?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.registered_commands += [*indexer_commands.registered_commands, *doctor_command.registered_commands]
key_commands = typer.Typer(help="API keys of a service; docs/security.md explains them.", no_args_is_help=True)
app.add_typer(key_commands, name="key")

HostOption = Annotated[str, typer.Option(help="Address to listen on.")]
PortOption = Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")]

SourceArgument = Annotated[
    str, typer.Argument(help="A service's http:// address, or an index directory (then with --task, if it needs one).")
]
TaskOption = Annotated[str | None, typer.Option(help="For an index directory: module:attribute or file.py:attribute.")]
QueryRowOption = Annotated[list[int] | None, typer.Option(help="Row of the task's query data. Repeatable.")]
TrainRowOption = Annotated[list[int] | None, typer.Option(help="Row of the training data. Repeatable.")]
ExampleOption = Annotated[str | None, typer.Option(help="An example as JSON, in the task's own form.")]
ImageOption = Annotated[Path | None, typer.Option(exists=True, dir_okay=False, help="A PNG or JPEG as the example.")]
LabelOption = Annotated[str | None, typer.Option(help="The label of --image: a number or a class name.")]
PromptOption = Annotated[str | None, typer.Option(help="Of a language model; with --completion.")]
CompletionOption = Annotated[str | None, typer.Option(help="What a language model wrote, or might have written.")]
OnlyOption = Annotated[str | None, typer.Option(help="With --completion: only these of its words are explained.")]
CheckpointOption = Annotated[list[str] | None, typer.Option(help="Only these checkpoints. Repeatable.")]
FilterOption = Annotated[
    str | None, typer.Option("--filter", help="Which training rows may be found, as JSON: see the examples above.")
]
IncludeOption = Annotated[
    list[str] | None,
    typer.Option(
        help='"layers": scores by layer; "percentiles": where scores stand among all; "histogram": of all scores, and '
        '"clusters": near-duplicates among hits, with --json; "probabilities": of the classes. Repeatable.'
    ),
]
TargetLabelOption = Annotated[
    str | None, typer.Option(help="Explain the loss at this label: a number or a class name. Why not a dog?")
]
RatherThanOption = Annotated[
    str | None,
    typer.Option(
        help="With --target-label: explain the loss there minus that at this label; with --completion: minus that of "
        "this completion."
    ),
]
TargetOption = Annotated[
    str | None, typer.Option(help='"loss": explain the loss even where the task defines another measurement.')
]
KeyOption = Annotated[str | None, typer.Option(envvar="GRADTRACE_API_KEY")]
HtmlOption = Annotated[
    Path | None, typer.Option(dir_okay=False, help="Write the answer into this file, as an HTML document to send on.")
]
TokensOption = Annotated[
    bool,
    typer.Option("--tokens", help="Show which tokens scores come from, in the hits' texts and in the query's."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the whole answer as JSON.")]

# Fields of a request that need a flag of another kind.
_SPELLED = {"index", *SOURCES, "checkpoints", "target", "filter", "include"}

_QUERY_HELP = """Ask which training rows made the model predict that.

docs/queries.md describes every option, with its cost. Examples, with U for http://127.0.0.1:8000:

\b
  gradtrace query U --query-row 3 --k 5
  gradtrace query runs/1/index --task my_task.py:MyTask --train-row 17
  gradtrace query U --image cat.png --label cat --rescore
  gradtrace query U --query-row 3 --include layers --include percentiles
  gradtrace query U --query-row 3 --target-label dog --rather-than cat
  gradtrace query U --prompt "Capital of France?" --completion " Paris" --rather-than " Rome"
  gradtrace query U --query-row 3 --query-row 8 --aggregate mean
  gradtrace query U --query-row 3 --tokens
  gradtrace query U --query-row 3 --html why.html
  gradtrace query U --query-row 3 --filter '{"labels": ["cat", 5]}'
  gradtrace query U --query-row 3 --filter '{"where": {"loss": {"min": 1}}}'
"""


def main() -> None:
    """Run the command line. Gradtrace's errors and those of the user's code end it with one line and exit code 1, or
    EX_TEMPFAIL for an index that is locked; only defects show a traceback."""
    try:
        app()
    except Exception as error:
        if is_out_of_memory(error):
            text = f"memory ran out ({type(error).__name__}: {error}); {_MORE_MEMORY}"
        elif isinstance(error, GradtraceError | ClientError | OSError):
            text = str(error)
        elif user_line(error) is None:
            raise
        else:
            text = f"{type(error).__name__}: {error}"
        _end(text, error, os.EX_TEMPFAIL if isinstance(error, LockedIndexError) else 1)
    except SystemExit as ending:
        if ending.code == _INTERRUPTED:
            typer.echo("interrupted; run a build, update or evaluation again to resume it", err=True)
        raise


def _end(text: str, error: Exception, code: int) -> NoReturn:
    """Print an error in one line, with the line of the user's code that it came from, and exit."""
    line = user_line(error)
    typer.secho(f"error: {text}" + (f" ({line})" if line else ""), fg=typer.colors.RED, err=True)
    sys.exit(code)


@app.callback(invoke_without_command=True)
def program(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the versions of Gradtrace and PyTorch.")] = False,
) -> None:
    """Which training examples made this model predict that?"""
    if version:
        versions = {name: metadata.version(name) for name in ("gradtrace", "torch")}
        typer.echo(f"gradtrace {versions['gradtrace']} (torch {versions['torch']}, Python {platform.python_version()})")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(2)


@app.command()
@with_flags(Settings, Settings.model_fields)
def serve(
    indexes: Annotated[list[str], typer.Argument(metavar="INDEX...", help="Index directories, or NAME=DIRECTORY.")],
    task: Annotated[
        list[str] | None,
        typer.Option(
            help="module:attribute or path/to/file.py:attribute; one for each index, or one for all. Not needed for "
            "indexes that were built by --model."
        ),
    ] = None,
    config: Annotated[Path | None, typer.Option(exists=True, dir_okay=False, help="A TOML file of settings.")] = None,
    **flags: Any,
) -> None:
    """Serve indexes over HTTP until Ctrl-C.

    Requests choose an index by `index`; the default is the first. Its name is the directory's, unless NAME= gives one.
    New generations of an index are taken up while serving. docs/settings.md explains the settings.
    """
    from gradtrace_service.app import create_service
    from gradtrace_service.server import (
        answer_local_names_alone,
        refuse_public,
        refuse_taken,
        refuse_too_few_descriptors,
        serve_until_told,
    )

    settings = read_settings(config, **flags)
    local = settings.api_key_file is None and not settings.insecure
    listener = None if settings.fd is None else inherited(settings.fd)
    host = settings.host if listener is None else host_of(listener)
    if local:
        refuse_public(host)
    if listener is None:
        refuse_taken(host, settings.port)
    refuse_too_few_descriptors(settings.max_connections)
    gc.freeze()  # what was imported is never garbage; a full collection held up the event loop for 0.15 s
    app = create_service(hosted(indexes, task or [], settings), settings)
    if local:
        answer_local_names_alone(app, host)
    serve_until_told(app, settings, listener)


@app.command(help=_QUERY_HELP)
@with_flags(InfluenceRequest, InfluenceRequest.model_fields.keys() - _SPELLED)
def query(
    source: SourceArgument,
    task: TaskOption = None,
    query_row: QueryRowOption = None,
    train_row: TrainRowOption = None,
    example: ExampleOption = None,
    image: ImageOption = None,
    label: LabelOption = None,
    prompt: PromptOption = None,
    completion: CompletionOption = None,
    only: OnlyOption = None,
    checkpoint: CheckpointOption = None,
    row_filter: FilterOption = None,
    include: IncludeOption = None,
    target: TargetOption = None,
    target_label: TargetLabelOption = None,
    rather_than: RatherThanOption = None,
    api_key: KeyOption = None,
    tokens: TokensOption = False,
    html: HtmlOption = None,
    as_json: JsonOption = False,
    **flags: Any,
) -> None:
    """Ask a service or an index, and print the answer."""
    fields = {
        "example": _payload(example, image, label, _text(prompt, completion, only, rather_than)),
        "query_rows": query_row,
        "train_rows": train_row,
        "checkpoints": checkpoint,
        "filter": None if row_filter is None else _json_object("--filter", row_filter),
        "target": _target(target, target_label, rather_than if completion is None else None),
        "include": ["parts", "examples", *(include or ())],
        **flags,
    }
    # Options that may be repeated come as an empty list where they are not given.
    given = {name: value for name, value in fields.items() if value not in (None, [])}
    if tokens and len([*(query_row or ()), *(train_row or ())]) > 1:
        raise QueryError("--tokens shows those of one query: give one row")
    with _asked(source, task, api_key) as client:
        answer = client.influence(**given)
        by_token = _tokens(client, answer, given) if tokens else None
    if html is not None:
        html.write_text(answer.to_html(), encoding="utf-8")
        typer.echo(f"wrote {html}", err=True)
    if as_json:
        typer.echo(_json(answer, by_token))
        return
    if html is None:
        print_answer(answer)
    if by_token is not None:
        print_tokens(by_token)


@app.command()
def demo(
    dataset: Dataset = Dataset.digits,
    once: Annotated[bool, typer.Option("--once", help="End after the answer.")] = False,
    host: HostOption = "127.0.0.1",
    port: PortOption = 8000,
    out: Annotated[Path | None, typer.Option(help="Where checkpoints and index go. Default: runs/DATASET.")] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Listen on an address that other machines reach.")
    ] = False,
) -> None:
    """Train on real data, build an index, serve it, and ask it why a test example is predicted as it is."""
    from gradtrace_service.server import refuse_public, refuse_taken

    if not insecure:
        refuse_public(host)
    refuse_taken(host, port)
    run_demo(dataset, out or Path("runs") / dataset.value, host=host, port=port, once=once)


@key_commands.command()
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


def _tokens(client: Client, answer: InfluenceAnswer, fields: dict[str, Any]) -> TokensAnswer:
    """Those of the hits of an answer about one query, in the order of the hits."""
    (result,) = answer.results
    rows = [hit.row for hit in [*result.proponents, *result.opponents]]
    if not rows:
        raise QueryError("there are no hits whose tokens could be shown")
    asked = {name: value for name, value in fields.items() if name in TokensRequest.model_fields}
    answers = [client.tokens(rows[at : at + MAX_TOKEN_ROWS], **asked) for at in range(0, len(rows), MAX_TOKEN_ROWS)]
    return answers[0].model_copy(update={"results": [tokens for part in answers for tokens in part.results]})


@contextmanager
def _asked(source: str, task: str | None, api_key: str | None) -> Iterator[Client]:
    """A client of the service, or of one that is started for an index directory."""
    if source.startswith(("http://", "https://")):
        with Client(source, api_key) as client:
            yield client
        return
    index = Path(source)
    if task is None and not index.exists():
        raise QueryError(f"{source} is not an http:// address, and there is no such index directory")
    from gradtrace_service.app import create_app
    from gradtrace_service.server import serving

    # By a service of its own, so that answers and messages are the same as over the network.
    with serving(create_app(Hosted("", index, spec_of(index, task)).open_or_say_why())) as url, Client(url) as client:
        yield client


def _json(answer: InfluenceAnswer, by_token: TokensAnswer | None) -> str:
    if by_token is None:
        return answer.model_dump_json(indent=2)
    return json.dumps(answer.model_dump(mode="json") | {"tokens": by_token.model_dump(mode="json")}, indent=2)


def _text(
    prompt: str | None, completion: str | None, only: str | None, rather_than: str | None
) -> dict[str, Any] | None:
    """An example of a language model."""
    if completion is None:
        if prompt is not None or only is not None:
            raise QueryError("--prompt and --only belong to --completion; a text alone is --example '{\"text\": ...}'")
        return None
    fields = {"prompt": prompt or "", "completion": completion, "only": only, "rather_than": rather_than}
    return {name: value for name, value in fields.items() if value is not None}


def _payload(
    example: str | None, image: Path | None, label: str | None, text: dict[str, Any] | None
) -> dict[str, Any] | None:
    if sum(given is not None for given in (example, image, text)) > 1:
        raise QueryError("give one of --example, --image and --completion")
    if text is not None:
        return text
    if image is None:
        if label is not None:
            raise QueryError("--label belongs to --image; in --example the label is part of the JSON")
        return None if example is None else _json_object("--example", example)
    payload: dict[str, Any] = {"image": image}
    if label is not None:
        payload["label"] = _number_or_name(label)
    return payload


def _target(target: str | None, label: str | None, rather_than: str | None) -> str | dict[str, Any] | None:
    if label is None:
        if rather_than is not None:
            raise QueryError("--rather-than belongs to --target-label, whose loss is compared with")
        return target
    if target is not None:
        raise QueryError("give --target or --target-label, not both")
    fields = {"label": label, "rather_than": rather_than}
    return {name: _number_or_name(value) for name, value in fields.items() if value is not None}


def _number_or_name(label: str) -> float | str:
    try:
        return float(label) if "." in label else int(label)
    except ValueError:
        return label


def _json_object(option: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise QueryError(f"{option} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise QueryError(f"{option} must be a JSON object, such as '{{...}}'")
    return value
