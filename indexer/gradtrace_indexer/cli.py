"""The offline commands: build, select, verify, info."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gradtrace.checkpoint_index import INDEX_NAME
from gradtrace.checkpoints import load_checkpoints
from gradtrace.errors import CheckpointError
from gradtrace.manifest import BasisKind, Manifest, Precision, read_manifest
from gradtrace.selection import choose
from gradtrace_indexer.build import build_index
from gradtrace_indexer.select import explained, mean_losses, plot_selection, selection_index
from gradtrace_indexer.task_loading import load_task
from gradtrace_indexer.verify import verify as verify_index

app = typer.Typer()

IndexArgument = Annotated[Path, typer.Argument(help="The index directory.")]


@app.command()
def build(
    task: Annotated[str, typer.Argument(help="module:attribute or path/to/file.py:attribute")],
    checkpoints: Annotated[
        Path, typer.Option(help="Directory of a training's checkpoints, or a list that `select` wrote.")
    ],
    out: Annotated[Path, typer.Option(help="The index directory; an interrupted build there is resumed.")],
    dimensions: Annotated[int, typer.Option(min=1, help="Columns kept for each checkpoint.")] = 2048,
    basis: Annotated[BasisKind, typer.Option(help="How gradients are compressed.")] = "spectral",
    precision: Annotated[Precision, typer.Option(help="Of the stored rows.")] = "float16",
    batch_size: Annotated[int, typer.Option(min=1, help="Examples a step.")] = 128,
    seed: Annotated[int, typer.Option(help="Of sampled rows, labels and projections.")] = 0,
    device: Annotated[str, typer.Option(help='"auto", "cpu", "cuda", "cuda:1" ...')] = "auto",
) -> None:
    """Build the index of a task's training rows, or resume an interrupted build."""
    index = build_index(
        load_task(task),
        load_checkpoints(checkpoints),
        out,
        dimensions=dimensions,
        basis=basis,
        precision=precision,
        batch_size=batch_size,
        seed=seed,
        device=device,
    )
    typer.echo(f"{out}: {describe(index.manifest)}")


@app.command()
def select(
    checkpoints: Annotated[Path, typer.Argument(help="Directory of a training's checkpoints.", file_okay=False)],
    task: Annotated[str, typer.Option(help="module:attribute or path/to/file.py:attribute")],
    count: Annotated[int, typer.Option(min=1, help="How many to choose at most.")] = 5,
    rows: Annotated[int, typer.Option(min=1, help="Training rows whose mean loss is taken.")] = 1000,
    out: Annotated[str, typer.Option(help="File name of the list, in the checkpoints' directory.")] = "selected.json",
    plot: Annotated[Path | None, typer.Option(help="Draw the loss and the chosen ones to this file.")] = None,
    device: Annotated[str, typer.Option(help='"auto", "cpu", "cuda", "cuda:1" ...')] = "auto",
) -> None:
    """Choose the checkpoints around which the loss falls most and steadily, and list them for `build`."""
    path = checkpoints / out
    if path.suffix != ".json" or path.name in ("", INDEX_NAME) or path.parent != checkpoints:
        raise CheckpointError(f"--out {out}: give a file name that ends in .json, other than {INDEX_NAME}")
    found = load_checkpoints(checkpoints)
    losses = mean_losses(load_task(task), found, rows, device=device)
    chosen = choose(losses, count)
    for line in explained(found, losses, chosen):
        typer.echo(line)
    path.write_text(selection_index(found, chosen, checkpoints).content(), "utf-8")
    if plot is not None:
        plot_selection(found, losses, chosen, plot)
    typer.echo(f"{len(chosen)} of {len(found)} chosen; build with --checkpoints {path}")


@app.command()
def verify(index: IndexArgument) -> None:
    """Check every byte of an index against its manifest."""
    problems = verify_index(index)
    for problem in problems:
        typer.echo(problem)
    if problems:
        raise typer.Exit(1)
    typer.echo(f"{index} is whole")


@app.command()
def info(index: IndexArgument) -> None:
    """Say what an index holds."""
    manifest = read_manifest(index)
    typer.echo(describe(manifest))
    for checkpoint in manifest.checkpoints:
        typer.echo(f"  {checkpoint.name}: step {checkpoint.step}, learning rate {checkpoint.learning_rate:g}")
    size = sum(shard.rows.bytes for shard in manifest.shards)
    typer.echo(f"  {len(manifest.shards)} shards, {size / 1e6:,.1f} MB of rows, built with {manifest.libraries}")


def describe(manifest: Manifest) -> str:
    """One line on what an index holds."""
    state = "" if manifest.complete else "unfinished: run the build again; "
    return (
        f"{state}{manifest.rows:,} rows x {len(manifest.checkpoints)} checkpoints x {manifest.basis.dimensions} "
        f"{manifest.basis.kind} dimensions in {manifest.precision}, task {manifest.task.name}, "
        f"generation {manifest.generation}"
    )
