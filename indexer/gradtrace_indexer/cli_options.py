"""Arguments and options that several commands take, and how rows are named on the command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from gradtrace.errors import QueryError
from gradtrace.sparse.defaults import RowsOption
from gradtrace.store.manifest import Precision

_TASK = "module:attribute or path/to/file.py:attribute"
_OR_FILE = f"{_TASK}. Not needed for an index that was built by --model."
TaskArgument = Annotated[str | None, typer.Argument(help=_TASK, show_default=False)]
TaskOption = Annotated[str, typer.Option(help=_TASK)]
IndexTaskOption = Annotated[str | None, typer.Option("--task", help=_OR_FILE, show_default=False)]
IndexArgument = Annotated[Path, typer.Argument(help="The index directory.")]
CheckpointsOption = Annotated[
    Path | None,
    typer.Option(help="Directory of a training's checkpoints, or a list by `select`. With --model not needed."),
]
DenseBasis = Literal["gauss-newton", "spectral", "two-sided", "gaussian", "rademacher", "none"]
BasisOption = Annotated[
    DenseBasis | None,
    typer.Option(help="How dense rows are compressed: docs/methods.md. Default: gauss-newton.", show_default=False),
]
KindOfRows = Annotated[
    RowsOption | None,
    typer.Option(
        help="dense: all in one basis; sparse: each in the strongest weights of its own. Default: sparse for models of "
        "tokens.",
        show_default=False,
    ),
]
DimensionsOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Values that a row keeps for each checkpoint. Default: 2048, of sparse rows 1024.",
        show_default=False,
    ),
]
PrecisionOption = Annotated[Precision, typer.Option(help="Of the stored rows: 2, 1 or half a byte a value.")]
BatchOption = Annotated[
    int | None,
    typer.Option(
        min=1, help="Examples a step. Default: 128; with --model fewer, if rows are long.", show_default=False
    ),
]
DeviceOption = Annotated[str, typer.Option(help='"auto", "cpu", "cuda", "cuda:1" ...')]
WorkersOption = Annotated[int, typer.Option(min=0, help="Processes that read the training data ahead. 0: none.")]
SkipOption = Annotated[
    bool,
    typer.Option("--skip-bad-rows", help="Mark rows that cannot be read or have no finite gradient; do not stop."),
]
RunsOption = Annotated[
    list[Path] | None,
    typer.Option(
        help="Directory of a training's checkpoints, or a list by `select`. Repeatable, for runs with other seeds. "
        "With --model not needed."
    ),
]
SearcherOption = Annotated[
    str | None, typer.Option(help="progressive (exact), faiss:FACTORY such as faiss:HNSW32,SQfp16, or annoy:TREES.")
]
SegmentsOption = Annotated[
    int | None, typer.Option(min=1, help="Index averaged weights of so many segments, for fast-source.")
]
RowsFileOption = Annotated[
    Path | None, typer.Option(exists=True, dir_okay=False, help="A file of such numbers, one a line.")
]
RecordingOption = Annotated[
    Path | None, typer.Option(help="Directory of an InfluenceRecorder: its basis, and method hydra.")
]


def named_rows(rows: Sequence[str] | None, file: Path | None, option: str) -> list[int]:
    """The rows that an option or its file names."""
    if (not rows) == (file is None):
        raise QueryError(f"give the rows by {option} or by {option}-file, the name of a file with a number a line")
    return numbers(rows or [] if file is None else file.read_text("utf-8").split())


def numbers(texts: Sequence[str]) -> list[int]:
    """["3,17", "100-199"] -> 3, 17, 100, 101, ... 199."""
    rows: list[int] = []
    for part in (part.strip() for text in texts for part in text.split(",")):
        first, dash, last = part.partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or (dash and int(first) > int(last)):
            raise QueryError(f"{part!r} names no rows; write numbers and ranges, such as 3,17,100-199")
        rows += range(int(first), int(last or first) + 1)
    return rows
