"""`gradtrace check`: the report of a task's dry run, as tables on a terminal or as JSON."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gradtrace.checkpoints import load_checkpoints
from gradtrace.dry_run import BuildEstimate, TaskReport, check
from gradtrace_indexer.command_options import (
    BatchOption,
    CheckpointsOption,
    DeviceOption,
    DimensionsOption,
    PrecisionOption,
    TaskArgument,
)
from gradtrace_indexer.task_loading import load_task

app = typer.Typer()

_MOST_LAYERS = 40  # lines of a table; of longer models the first and the last layers are shown


@app.command("check")
def check_task(
    task: TaskArgument,
    checkpoints: CheckpointsOption,
    dimensions: DimensionsOption = 2048,
    precision: PrecisionOption = "int8",
    batch_size: BatchOption = 128,
    device: DeviceOption = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Try a task on a few of its rows, in seconds, before anything is built.

    Reports how each layer is differentiated and why, at whose labels the curvature is taken, what the task's hooks
    return, what a build would cost, and every problem with its remedy. The exit code is 1 if there is a problem.
    """
    loaded = load_task(task)
    report = check(
        loaded,
        load_checkpoints(checkpoints),
        dimensions=dimensions,
        precision=precision,
        batch_size=batch_size,
        device=device,
    )
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=1))
    else:
        print_report(report, Console())
    if not report.ok:
        raise typer.Exit(1)


def print_report(report: TaskReport, console: Console) -> None:
    console.print(
        f"[bold]{escape(report.task)}[/bold]: {report.rows:,} training rows, {report.checkpoints} checkpoints, "
        f"{report.parameters:,} parameters"
    )
    if report.layers:
        console.print(_layers(report))
        console.print(f"[bold]Labels of the curvature[/bold] ({report.labels}): {escape(report.law)}")
    if report.hooks:
        console.print(_hooks(report))
    if report.estimate is not None:
        console.print(_estimate(report.estimate))
    for note in report.notes:
        console.print(f"[yellow]Note:[/yellow] {escape(note)}")
    for problem in report.problems:
        console.print(f"[red]Problem:[/red] {escape(problem)}")
    if report.ok:
        console.print("[green]Ready to build.[/green]")


def _layers(report: TaskReport) -> Table:
    table = Table(title="Layers", title_justify="left")
    for name in ("layer", "type", "parameters", "path", "why"):
        table.add_column(name, justify="right" if name == "parameters" else "left", overflow="fold")
    lines = report.layers
    omitted = max(0, len(lines) - _MOST_LAYERS)
    shown = lines if not omitted else [*lines[: _MOST_LAYERS // 2], *lines[-_MOST_LAYERS // 2 :]]
    for number, line in enumerate(shown):
        if omitted and number == _MOST_LAYERS // 2:
            table.add_row(f"... {omitted} more", "", "", "", "")
        table.add_row(escape(line.name), line.kind, f"{line.parameters:,}", line.path, escape(line.reason))
    return table


def _hooks(report: TaskReport) -> Table:
    table = Table(title="What the task gives", title_justify="left")
    table.add_column("hook")
    table.add_column("on three training examples", overflow="fold")
    for hook in report.hooks:
        table.add_row(hook.hook, escape(hook.outcome), style="red" if hook.problem else None)
    return table


def _estimate(estimate: BuildEstimate) -> str:
    minutes = estimate.seconds / 60
    duration = f"{minutes:.0f} min" if minutes >= 2 else f"{estimate.seconds:.0f} s"
    return (
        f"[bold]A build[/bold] would take about {duration} ({estimate.rows_per_second:,.0f} rows a second and "
        f"checkpoint), {estimate.memory_bytes / 1e9:.1f} GB of memory and {estimate.disk_bytes / 1e6:,.0f} MB of disk"
    )
