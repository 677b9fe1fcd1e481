"""The commands that measure: against retraining, and against the clock."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from gradtrace.methods import method_named
from gradtrace.opening import open_index
from gradtrace_indexer.cli_options import DeviceOption, IndexArgument, IndexTaskOption, TaskOption, numbers
from gradtrace_indexer.evaluation import evaluate as evaluation
from gradtrace_indexer.evaluation.ground_truth import subset_outputs
from gradtrace_indexer.evaluation.retraining import Retrainings
from gradtrace_indexer.evaluation.without_rows import compare_removal
from gradtrace_indexer.held_out import held_out_rows
from gradtrace_indexer.task_loading import load_task, spec_of

app = typer.Typer()


@app.command()
def bench(
    index: IndexArgument,
    task: IndexTaskOption = None,
    k: Annotated[int, typer.Option(min=1, help="Hits at each end.")] = 10,
    queries: Annotated[int, typer.Option(min=1, help="Held-out examples to ask about.")] = 64,
    device: DeviceOption = "auto",
) -> None:
    """Measure how fast an index answers here, one query at a time and many, and what an approximate searcher misses."""
    for line in evaluation.bench(index, load_task(spec_of(index, task)), k=k, queries=queries, device=device):
        typer.echo(line)


@app.command()
def evaluate(
    index: IndexArgument,
    task: TaskOption,
    truth: Annotated[Path, typer.Option(help="Directory of trainings on random halves; what it lacks is trained.")],
    method: Annotated[list[str] | None, typer.Option(help="Repeatable; default: all that the index has.")] = None,
    subsets: Annotated[int, typer.Option(min=2, help="Random halves of the training rows.")] = 100,
    seeds: Annotated[int, typer.Option(min=1, help="Trainings on each.")] = 5,
    queries: Annotated[
        int | None, typer.Option(min=1, help="Held-out examples on which trainings are measured; default: all.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Trainings at the same time.")] = 1,
    device: DeviceOption = "auto",
) -> None:
    """Measure how well the methods predict what training on half of the rows does (linear datamodeling score).

    The task must define fit(rows, seed). Rows that are deleted from the index are in no training. Trainings are kept:
    run again after an interruption, it resumes, and other indexes of the task are measured with the same ones.
    """
    loaded = load_task(task)
    opened = open_index(index, loaded, device=device)  # what cannot be evaluated is refused before any training
    for name in method or ():
        method_named(name, opened.manifest)
    split, numbers = held_out_rows(loaded, queries, opened.present)
    retrainings = Retrainings(task, truth, queries=sorted(numbers) if queries else None, split=split, workers=workers)
    outputs = subset_outputs(retrainings, subsets, seeds, among=np.flatnonzero(opened.present))
    for line in evaluation.evaluate(opened, retrainings.examples, outputs, method or opened.methods):
        typer.echo(line)


@app.command()
def retrain(
    index: IndexArgument,
    task: TaskOption,
    without_rows: Annotated[
        Path, typer.Option(exists=True, dir_okay=False, help="A file of the training rows left out, a number a line.")
    ],
    out: Annotated[Path, typer.Option(help="Write the comparison to this file, as JSON.")],
    query_rows: Annotated[
        list[str] | None,
        typer.Option(help="Query rows that are measured: 3,17,100-199. Repeatable; default: at most 128 at random."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of both trainings.")] = 0,
    method: Annotated[list[str] | None, typer.Option(help="Repeatable; default: all that forecast.")] = None,
    checkpoints: Annotated[
        list[Path] | None, typer.Option(help="Directory of the weights, if they were moved. One for each training run.")
    ] = None,
    device: DeviceOption = "auto",
) -> None:
    """Train with all rows of an index and without some, and compare the change with what methods predict.

    The task must define fit(rows, seed). Rows that are deleted from the index are in neither training. Run again after
    an interruption, it resumes. The index is not changed.
    """
    opened = open_index(index, load_task(task), checkpoints=checkpoints or None, device=device)
    for name in method or ():
        method_named(name, opened.manifest)
    comparison = compare_removal(
        opened,
        numbers(without_rows.read_text("utf-8").split()),
        out,
        queries=numbers(query_rows) if query_rows else None,
        seed=seed,
        methods=method or None,
    )
    for line in comparison.lines():
        typer.echo(line)
