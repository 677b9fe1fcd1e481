"""The command `gradtrace doctor`."""

from __future__ import annotations

import json
import os
import platform
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import torch
import typer

from gradtrace.errors import GradtraceError
from gradtrace.results.display import describe
from gradtrace.store.manifest_file import read_manifest
from gradtrace_indexer.cli_options import DeviceOption
from gradtrace_service.doctor import index_files, machine, service, service_metrics
from gradtrace_service.doctor.findings import Finding, State, findings_of
from gradtrace_service.doctor.service import Service

app = typer.Typer()

_COLOURS: dict[State, str] = {"ok": typer.colors.GREEN, "warning": typer.colors.YELLOW, "problem": typer.colors.RED}


@app.command()
def doctor(
    source: Annotated[str, typer.Argument(metavar="URL|INDEX", help="A service's address, or an index directory.")],
    task: Annotated[str | None, typer.Option(help="Of an index: open it with this task, and ask it.")] = None,
    checkpoints: Annotated[
        list[Path] | None, typer.Option(help="Of an index: directory of its weights, if they were moved. Repeatable.")
    ] = None,
    deep: Annotated[bool, typer.Option("--deep", help="Of an index: read every byte, however large it is.")] = False,
    device: DeviceOption = "auto",
    api_key: Annotated[str | None, typer.Option(envvar="GRADTRACE_API_KEY", help="Of a service.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Check an index or a running service, and print a report that can be passed on.

    Each line says what is right (ok), what will be trouble (warning), or what is wrong (problem), with the remedy. The
    exit code is 1 if there is a problem. Nothing is changed. docs/operations.md explains the checks.
    """
    if source.startswith(("http://", "https://")):
        findings = _of_service(source, api_key)
    else:
        findings = _of_index(Path(source), task, checkpoints or None, deep, device)
    counts = _print_json(source, findings) if as_json else _print_lines(source, findings)
    if counts["problem"]:
        raise typer.Exit(1)


def _of_index(
    directory: Path, task: str | None, checkpoints: Sequence[Path] | None, deep: bool, device: str
) -> Iterator[Finding]:
    try:
        manifest = read_manifest(directory)
    except GradtraceError as error:
        yield Finding("manifest", "problem", str(error))
        return
    yield Finding("manifest", "ok", f"format {manifest.format}, {describe(manifest)}")
    yield from findings_of(
        [
            ("unfinished", partial(index_files.unfinished, directory)),
            ("files", partial(index_files.content, directory, manifest, deep)),
            ("generations", partial(index_files.generations, directory)),
            ("stray files", partial(index_files.stray_files, directory, manifest)),
            ("weights", partial(index_files.weights, directory, manifest, checkpoints)),
            ("permissions", partial(index_files.permissions, directory, manifest)),
            ("clock", partial(index_files.clock, directory)),
            ("file system", partial(machine.file_system, directory)),
            ("disk", partial(machine.disk, directory, manifest)),
            ("descriptors", partial(machine.descriptors, manifest)),
            ("memory", partial(machine.memory, directory, manifest)),
            ("versions", partial(machine.versions, manifest)),
        ]
    )
    if task is not None:
        yield from findings_of([("task", partial(machine.task, directory, task, checkpoints, device))])


def _of_service(url: str, api_key: str | None) -> Iterator[Finding]:
    checked = Service(url, api_key)
    try:
        unreachable = checked.unreachable()
        if unreachable is not None:
            yield Finding("reachable", "problem", unreachable)
            return
        open_checks = (
            ("health", service.health),
            ("transport", service.transport),
            ("versions", service.versions),
            ("clock", service.clock),
            ("keys", service.keys),
            ("host", service.host),
            ("compression", service.compression),
        )
        yield from findings_of((topic, partial(check, checked)) for topic, check in open_checks)
        if checked.http.get("/indexes").status_code not in (401, 403):
            yield from _with_a_key(checked)
    finally:
        checked.close()


def _with_a_key(checked: Service) -> Iterator[Finding]:
    asking = (("headers", service.headers), ("indexes", service.indexes), ("latency", service.latency))
    yield from findings_of((topic, partial(check, checked)) for topic, check in asking)
    samples = service_metrics.read_metrics(checked)
    reading = (
        ("process", service_metrics.process),
        ("limits", service_metrics.limits),
        ("load", service_metrics.load),
        ("generations", service_metrics.generations),
        ("disk", service_metrics.disk),
    )
    yield from findings_of((topic, partial(check, samples)) for topic, check in reading)


def _environment(source: str) -> dict[str, str]:
    """What a reader of the report needs to know beside the findings."""
    return {
        "checked": source,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "gradtrace": version("gradtrace"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "processors": str(os.cpu_count()),
    }


def _print_lines(source: str, findings: Iterable[Finding]) -> Counter[State]:
    """Line by line, as they come: some take long."""
    for name, value in _environment(source).items():
        typer.echo(f"{name + ':':<12} {value}")
    counts: Counter[State] = Counter()
    for topic, state, text in findings:
        counts[state] += 1
        typer.echo(f"{typer.style(f'{state:<7}', fg=_COLOURS[state])}  {topic}: {text}")
    typer.echo(f"{counts['problem']} problem(s), {counts['warning']} warning(s), {counts['ok']} ok")
    return counts


def _print_json(source: str, findings: Iterable[Finding]) -> Counter[State]:
    listed = [finding._asdict() for finding in findings]
    typer.echo(json.dumps({**_environment(source), "findings": listed}, indent=2))
    return Counter(finding["state"] for finding in listed)
