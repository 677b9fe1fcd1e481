"""The offline commands: check, build and select, what changes an index, and what looks after it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from gradtrace import dry_run
from gradtrace.checkpoints import load_checkpoints
from gradtrace.checkpoints.checkpoints_json import INDEX_NAME
from gradtrace.checkpoints.selection import choose
from gradtrace.errors import CheckpointError
from gradtrace.results.display import describe
from gradtrace.store.manifest import Manifest
from gradtrace.store.manifest_file import read_manifest
from gradtrace.task import Task
from gradtrace_indexer import generations
from gradtrace_indexer.build.build import build_index
from gradtrace_indexer.build.builder import PassOptions, WorkOptions
from gradtrace_indexer.cli_options import (
    BasisOption,
    BatchOption,
    CheckpointsOption,
    DeviceOption,
    DimensionsOption,
    IndexArgument,
    IndexTaskOption,
    KindOfRows,
    PrecisionOption,
    RecordingOption,
    RowsFileOption,
    RunsOption,
    SearcherOption,
    SegmentsOption,
    SkipOption,
    TaskArgument,
    TaskOption,
    WorkersOption,
    named_rows,
)
from gradtrace_indexer.derived import DAMPING, add_kernels, fit_representer
from gradtrace_indexer.description import describe_searcher, details, print_report
from gradtrace_indexer.evaluation.select import explained, mean_losses, plot_selection, selection_index
from gradtrace_indexer.evaluation_cli import app as evaluation_commands
from gradtrace_indexer.task_flags import NamedTask, default_batch_size, named_task, with_model_flags
from gradtrace_indexer.task_loading import load_task, spec_of
from gradtrace_indexer.update.add_checkpoints import add_run
from gradtrace_indexer.update.compact import compact as compact_index
from gradtrace_indexer.update.rows import append_rows, delete_rows
from gradtrace_indexer.update.update import INTERVAL, run_directory, update_index, watch
from gradtrace_indexer.verify import verify as verify_index
from gradtrace_indexer.work.watching import unfinished_lines
from gradtrace_indexer.work_flags import with_work_flags, without_work_flags, work_options

app = typer.Typer()


@app.command()
@with_model_flags
def check(
    task: TaskArgument = None,
    checkpoints: CheckpointsOption = None,
    rows: KindOfRows = None,
    dimensions: DimensionsOption = None,
    precision: PrecisionOption = "int8",
    batch_size: BatchOption = None,
    device: DeviceOption = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    **flags: Any,
) -> None:
    """Try a task on a few of its rows, in seconds, before anything is built.

    Reports how each layer is differentiated and why, at whose labels the curvature is taken, what the task's hooks
    return, what a build would cost, and every problem with its remedy. The exit code is 1 if there is a problem.
    """
    named = named_task(task, flags)
    report = dry_run.check(
        named.task,
        load_checkpoints(_given_or_model(checkpoints, named)),
        rows=rows,
        dimensions=dimensions,
        precision=precision,
        batch_size=batch_size or default_batch_size(named.task),
        device=device,
    )
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=1))
    else:
        print_report(report, Console())
    if not report.ok:
        raise typer.Exit(1)


@app.command()
@with_work_flags
@with_model_flags
def build(
    out: Annotated[Path, typer.Option(help="The index directory; an interrupted build there is resumed.")],
    task: TaskArgument = None,
    checkpoints: RunsOption = None,
    rows: KindOfRows = None,
    dimensions: DimensionsOption = None,
    basis: BasisOption = None,
    precision: PrecisionOption = "int8",
    batch_size: BatchOption = None,
    searcher: SearcherOption = None,
    average_segments: SegmentsOption = None,
    seed: Annotated[int, typer.Option(help="Of sampled rows, labels and projections.")] = 0,
    recording: RecordingOption = None,
    num_workers: WorkersOption = 0,
    skip_bad_rows: SkipOption = False,
    device: DeviceOption = "auto",
    **flags: Any,
) -> None:
    """Build the index of a task's training rows, or resume an interrupted build."""
    named = named_task(task, without_work_flags(flags))
    passes = PassOptions(
        batch_size=batch_size or default_batch_size(named.task), num_workers=num_workers, device=device
    )
    for sentence in named.sentences():
        typer.echo(sentence)
    index = build_index(
        named.task,
        [load_checkpoints(run) for run in checkpoints or [_given_or_model(None, named)]],
        out,
        rows=rows,
        dimensions=dimensions,
        basis=basis,
        precision=precision,
        searcher=searcher,
        average_segments=average_segments,
        seed=seed,
        recording=recording,
        skip_bad_rows=skip_bad_rows,
        **work_options(flags, passes, named.load),
    )
    named.save(out)
    _say_what_was_built(out, index.manifest)


def _say_what_was_built(out: Path, manifest: Manifest) -> None:
    typer.echo(f"{out}: {describe(manifest)}")
    if manifest.searcher is not None:
        typer.echo(describe_searcher(manifest, manifest.searcher))


def _given_or_model(checkpoints: Path | None, named: NamedTask) -> Path:
    """The directory of the checkpoints: the one that is given, or the model's."""
    directory = checkpoints or named.checkpoints
    if directory is None:
        raise CheckpointError("name the directory of the training's checkpoints: --checkpoints")
    return directory


@app.command()
def select(
    checkpoints: Annotated[Path, typer.Argument(help="Directory of a training's checkpoints.", file_okay=False)],
    task: TaskOption,
    count: Annotated[int, typer.Option(min=1, help="How many to choose at most.")] = 5,
    rows: Annotated[int, typer.Option(min=1, help="Training rows whose mean loss is taken.")] = 1000,
    out: Annotated[str, typer.Option(help="File name of the list, in the checkpoints' directory.")] = "selected.json",
    plot: Annotated[Path | None, typer.Option(help="Draw the loss and the chosen ones to this file.")] = None,
    device: DeviceOption = "auto",
) -> None:
    """Choose the checkpoints around which the loss falls most and steadily, and list them for `build`."""
    path = checkpoints / out
    if path.suffix != ".json" or path.name in ("", INDEX_NAME) or path.parent != checkpoints:
        raise CheckpointError(f"--out {out}: give a file name that ends in .json, other than {INDEX_NAME}")
    candidates = load_checkpoints(checkpoints)
    losses = mean_losses(load_task(task), candidates, rows, device=device)
    chosen = choose(losses, count)
    for line in explained(candidates, losses, chosen):
        typer.echo(line)
    path.write_text(selection_index(candidates, chosen, checkpoints).content(), "utf-8")
    if plot is not None:
        plot_selection(candidates, losses, chosen, plot)
    typer.echo(f"{len(chosen)} of {len(candidates)} chosen; build with --checkpoints {path}")


@app.command()
@with_work_flags
def update(
    index: IndexArgument,
    task: IndexTaskOption = None,
    checkpoints: Annotated[
        Path | None,
        typer.Option(help="Directory of the training's checkpoints. Default: that of the index's last one."),
    ] = None,
    follow: Annotated[
        bool, typer.Option("--watch", help="Until Ctrl-C, add checkpoints as the training writes them.")
    ] = False,
    interval: Annotated[float, typer.Option(min=0.1, help="With --watch: seconds between two looks.")] = INTERVAL,
    run: Annotated[
        int | None, typer.Option(min=0, help="Which of the index's training runs was continued. Default: the last.")
    ] = None,
    new_run: Annotated[bool, typer.Option("--new-run", help="Add them as another run of the training.")] = False,
    batch_size: BatchOption = None,
    num_workers: WorkersOption = 0,
    device: DeviceOption = "auto",
    **flags: Any,
) -> None:
    """Bring an index up to date: rows that the task's data has grown by, checkpoints written since; or add another run.

    Only what is new is computed. Readers see the old generation until the new one is complete. Run again after an
    interruption, it resumes.
    """
    loaded, passes = _with_options(spec_of(index, task), flags, batch_size, num_workers, device)
    if new_run and (follow or run is not None):
        raise CheckpointError("--new-run adds a whole run: leave --run and --watch out, or use them once it is there")
    if follow:
        _follow(index, loaded, checkpoints or run_directory(index, read_manifest(index), run), run, interval, passes)
        return
    if new_run:
        if checkpoints is None:
            raise CheckpointError("--new-run needs --checkpoints, the directory of the run that is to be added")
        updated = add_run(index, loaded, load_checkpoints(checkpoints), **passes)
    else:
        updated = update_index(index, loaded, checkpoints, run=run, **passes)
    typer.echo(f"{index}: {describe(updated.manifest)}")


def _with_options(
    spec: str, flags: Mapping[str, Any], batch_size: int | None, num_workers: int, device: str
) -> tuple[Task, WorkOptions]:
    """The task of this name, and how its rows go through its models."""
    task = load_task(spec)
    passes = PassOptions(batch_size=batch_size or default_batch_size(task), num_workers=num_workers, device=device)
    return task, work_options(flags, passes, partial(load_task, spec))


def _follow(index: Path, task: Task, followed: Path, run: int | None, interval: float, passes: WorkOptions) -> None:
    """Add checkpoints as they appear in a directory, until Ctrl-C."""
    typer.echo(f"Watching {followed}; Ctrl-C ends it.")
    last = ""

    def report(error: CheckpointError) -> None:
        nonlocal last
        if str(error) != last:
            last = str(error)
            typer.echo(f"waiting: {error}", err=True)

    try:
        for updated in watch(index, task, followed, run=run, interval=interval, on_wait=report, **passes):
            typer.echo(f"{index}: {describe(updated.manifest)}")
    except KeyboardInterrupt:
        typer.echo("\nStopped; run it again to continue.")


@app.command()
@with_work_flags
def append(
    index: IndexArgument,
    task: IndexTaskOption = None,
    batch_size: BatchOption = None,
    num_workers: WorkersOption = 0,
    skip_bad_rows: SkipOption = False,
    device: DeviceOption = "auto",
    **flags: Any,
) -> None:
    """Index the rows that the task's training data has grown by.

    The new examples must come after the old ones: a row's number in the data set is its id, for good. Only the new rows
    are computed. Run again after an interruption, it resumes.
    """
    loaded, passes = _with_options(spec_of(index, task), flags, batch_size, num_workers, device)
    updated = append_rows(index, loaded, skip_bad_rows=skip_bad_rows, **passes)
    typer.echo(f"{index}: {describe(updated.manifest)}")


@app.command()
def delete(
    index: IndexArgument,
    rows: Annotated[list[str] | None, typer.Option(help="Numbers and ranges: 3,17,100-199. Repeatable.")] = None,
    rows_file: RowsFileOption = None,
) -> None:
    """Delete training rows: no answer names them again, and the other rows keep their numbers.

    The rows are marked; `gradtrace compact` takes them out of the files, and `gradtrace prune` removes the files that
    only earlier generations have.
    """
    typer.echo(f"{index}: {describe(delete_rows(index, named_rows(rows, rows_file, '--rows')))}")


@app.command()
def compact(index: IndexArgument) -> None:
    """Rewrite shards without deleted rows and merge small ones; answers stay the same."""
    typer.echo(f"{index}: {describe(compact_index(index))}")


@app.command()
def kernels(
    index: IndexArgument,
    damping: Annotated[float, typer.Option(help="Added to each kernel's diagonal, relative to its mean.")] = DAMPING,
    device: DeviceOption = "auto",
) -> None:
    """Compute what method `trak` needs, from the stored rows: one matrix for each checkpoint that lacks it."""
    typer.echo(f"{index}: {describe(add_kernels(index, damping=damping, device=device))}")


@app.command()
def representer(
    index: IndexArgument,
    l2: Annotated[float, typer.Option(help="Weight of the regularisation.")] = 0.003,
) -> None:
    """Refit the last layer on the index's representations, for queries with the method "representer".

    Run it again after rows or checkpoints were added or deleted.
    """
    manifest = fit_representer(index, l2=l2)
    typer.echo(f"{index}: {describe(manifest)}")
    if manifest.representer is not None:
        typer.echo(
            f"its weights are the sum of the rows' shares up to {manifest.representer.residual:.1e} of their norm"
        )


@app.command()
def rollback(
    index: IndexArgument, generation: Annotated[int, typer.Argument(help="One that `gradtrace info` lists.")]
) -> None:
    """Publish an earlier generation of an index again, as its next one."""
    typer.echo(f"{index}: {describe(generations.roll_back(index, generation))}")


@app.command()
def prune(
    index: IndexArgument,
    keep: Annotated[int, typer.Option(min=1, help="How many generations stay, including the current one.")] = 1,
) -> None:
    """Remove earlier generations, and the files that only they have."""
    generations.prune(index, keep)
    typer.echo(f"{index}: {describe(read_manifest(index))}")


@app.command()
def discard(index: IndexArgument) -> None:
    """Give up an unfinished build or update; the current generation stays as it is."""
    generations.discard(index)
    typer.echo(f"{index}: nothing unfinished is left")


@app.command()
def verify(
    index: IndexArgument,
    all_generations: Annotated[bool, typer.Option("--all", help="Also every byte of earlier generations.")] = False,
    checkpoints: Annotated[
        list[Path] | None, typer.Option(help="Directory of the weights, if they were moved. One for each training run.")
    ] = None,
) -> None:
    """Check every byte of an index and of its checkpoints' weights against its manifest; every problem is a line."""
    problems = verify_index(index, all_generations=all_generations, checkpoints=checkpoints or None)
    for problem in problems:
        typer.echo(problem)
    if problems:
        raise typer.Exit(1)
    typer.echo(f"{index} is whole")


@app.command()
def info(
    index: IndexArgument,
    tasks: Annotated[
        bool, typer.Option("--tasks", help="The steps of an unfinished build or update, and who does which.")
    ] = False,
) -> None:
    """Print what an index holds: checkpoints, shards, deleted rows, sizes, and its generations."""
    if tasks:
        for line in unfinished_lines(index):
            typer.echo(line)
        return
    for line in details(index):
        typer.echo(line)


app.registered_commands += evaluation_commands.registered_commands
