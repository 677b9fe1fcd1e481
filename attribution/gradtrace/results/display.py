"""Tables of results: as text, as HTML for notebooks, and as DataFrames. Whatever comes from data is escaped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from gradtrace.errors import MissingLibraryError
from gradtrace.store.manifest import Manifest
from gradtrace.task import Label, Task

if TYPE_CHECKING:
    import pandas

_TEXT_LIMIT = 200  # characters of an example


def frame(records: Sequence[Mapping[str, Any]]) -> pandas.DataFrame:
    """A DataFrame with a line for each record.

    Raises:
        MissingLibraryError: pandas is not installed.
    """
    try:
        import pandas
    except ImportError as error:
        raise MissingLibraryError("pandas", "pandas") from error
    table: pandas.DataFrame = pandas.DataFrame(records)
    return table


def table_text(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Columns of text, aligned on the right."""
    table = [heads, *lines]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    aligned = ("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in table)
    return "\n".join(line.rstrip() for line in aligned)


def table_html(title: str, heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Cells are HTML; title and heads are text."""
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in line)}</tr>" for line in lines)
    return f"<table><caption>{escape(title)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def tokens_html(tokens: Sequence[str], scores: Sequence[float]) -> str:
    """A text whose tokens are the greener, or redder where they oppose, the stronger their scores are."""
    largest = max(map(abs, scores), default=0.0) or 1.0
    colours = {True: "0, 150, 80", False: "210, 40, 60"}
    return "".join(
        f'<span title="{score:+.4g}" style="white-space:pre-wrap;background:rgba({colours[score >= 0]}, '
        f'{0.6 * abs(score) / largest:.2f})">{escape(token)}</span>'
        for token, score in zip(tokens, scores, strict=True)
    )


def label_text(label: Label | None, task: Task | None) -> str:
    """A label in words: its class name, if it has one."""
    if label is None:
        return "none"
    name = None if task is None else task.label_name(label)
    return name if name is not None else f"{label:,.6g}"


def training_example_html(task: Task, row: int) -> str:
    """A training row as the task renders it; if that fails, the error."""
    try:
        return example_html(task.render(task.train[row]))
    except Exception as error:  # whatever the user's code raises: a notebook shows the rest
        return escape(f"not shown: {type(error).__name__}: {error}"[:_TEXT_LIMIT])


def example_html(rendered: Mapping[str, Any]) -> str:
    """An image as a thumbnail, anything else as text; only `data:image/` addresses are ever put in a page."""
    image = rendered.get("image")
    if isinstance(image, str) and image.startswith("data:image/"):
        return f'<img src="{escape(image)}" style="height:48px;image-rendering:pixelated">'
    text = " ".join(str(rendered.get("text", "")).split())
    if isinstance(rendered.get("features"), Mapping):
        text = ", ".join(f"{name} {value}" for name, value in rendered["features"].items())
    return escape(text if len(text) <= _TEXT_LIMIT else text[: _TEXT_LIMIT - 1] + "…")


def describe(manifest: Manifest) -> str:
    """One line on what a generation holds."""
    deleted = 0 if manifest.deleted is None else manifest.deleted.bytes // 8
    runs = len(manifest.basis.files)
    checkpoints = f"{len(manifest.checkpoints)} checkpoints" + (f" of {runs} runs" if runs > 1 else "")
    return (
        f"{manifest.rows - deleted:,} rows x {checkpoints} x {manifest.basis.dimensions} "
        f"{manifest.basis.kind} dimensions in {manifest.precision}, task {manifest.task.name}, "
        f"generation {manifest.generation}"
    )
