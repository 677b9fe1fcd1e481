"""Arguments and options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gradtrace.store.manifest import Precision

TASK = "module:attribute or path/to/file.py:attribute"
TaskArgument = Annotated[str, typer.Argument(help=TASK)]
TaskOption = Annotated[str, typer.Option(help=TASK)]
IndexArgument = Annotated[Path, typer.Argument(help="The index directory.")]
CheckpointsOption = Annotated[Path, typer.Option(help="Directory of a training's checkpoints, or a list by `select`.")]
DimensionsOption = Annotated[int, typer.Option(min=1, help="Columns kept for each checkpoint.")]
PrecisionOption = Annotated[Precision, typer.Option(help="Of the stored rows: 2, 1 or half a byte a value.")]
BatchOption = Annotated[int, typer.Option(min=1, help="Examples a step.")]
DeviceOption = Annotated[str, typer.Option(help='"auto", "cpu", "cuda", "cuda:1" ...')]
WorkersOption = Annotated[int, typer.Option(min=0, help="Processes that read the training data ahead. 0: none.")]
SkipOption = Annotated[
    bool,
    typer.Option("--skip-bad-rows", help="Mark rows that cannot be read or have no finite gradient; do not stop."),
]
