"""The offline commands: build, verify, info."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gradtrace.checkpoints import load_checkpoints
from gradtrace.manifest import BasisKind, Manifest, Precision, SearcherEntry, read_manifest
from gradtrace_indexer.build import build_index
from gradtrace_indexer.task_loading import load_task
from gradtrace_indexer.verify import verify as verify_index

app = typer.Typer()

IndexArgument = Annotated[Path, typer.Argument(help="The index directory.")]


@app.command()
def build(
    task: Annotated[str, typer.Argument(help="module:attribute or path/to/file.py:attribute")],
    checkpoints: Annotated[Path, typer.Option(help="Directory with the weights and their checkpoints.json.")],
    out: Annotated[Path, typer.Option(help="The index directory; an interrupted build there is resumed.")],
    dimensions: Annotated[int, typer.Option(min=1, help="Columns kept for each checkpoint.")] = 2048,
    basis: Annotated[BasisKind, typer.Option(help="How gradients are compressed.")] = "spectral",
    precision: Annotated[Precision, typer.Option(help="Of the stored rows.")] = "float16",
    batch_size: Annotated[int, typer.Option(min=1, help="Examples a step.")] = 128,
    searcher: Annotated[
        str | None,
        typer.Option(help="progressive (exact), faiss:FACTORY such as faiss:HNSW32,SQfp16, or annoy:TREES."),
    ] = None,
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
        searcher=searcher,
        seed=seed,
        device=device,
    )
    typer.echo(f"{out}: {describe(index.manifest)}")
    if index.manifest.searcher is not None:
        typer.echo(describe_searcher(index.manifest.searcher))


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
    if manifest.searcher is not None:
        typer.echo(f"  {describe_searcher(manifest.searcher)}")
    size = sum(shard.rows.bytes for shard in manifest.shards)
    typer.echo(f"  {len(manifest.shards)} shards, {size / 1e6:,.1f} MB of rows, built with {manifest.libraries}")


def describe_searcher(entry: SearcherEntry) -> str:
    """One line on what a searcher is and finds."""
    recall = ", ".join(f"{name} {found.top:.3f} / {found.bottom:.3f}" for name, found in entry.recall.items())
    return (
        f"searcher {entry.name} ({entry.parameters}), {entry.file.bytes / 1e6:,.1f} MB, by {entry.library}; "
        f"recall@{entry.k} at the top / bottom on {entry.queries} {entry.split} rows: {recall}"
    )


def describe(manifest: Manifest) -> str:
    """One line on what an index holds."""
    state = "" if manifest.complete else "unfinished: run the build again; "
    return (
        f"{state}{manifest.rows:,} rows x {len(manifest.checkpoints)} checkpoints x {manifest.basis.dimensions} "
        f"{manifest.basis.kind} dimensions in {manifest.precision}, task {manifest.task.name}, "
        f"generation {manifest.generation}"
    )
