"""Answers as tables on a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gradtrace_client.schemas import Hit, Influence, InfluenceAnswer, Label, QueryInfo


def print_answer(answer: InfluenceAnswer) -> None:
    """Each query with its proponents and opponents, then how the answer came about."""
    console = Console()
    for result in answer.results:
        console.print(f"\n[bold]{escape(_question(result.query))}[/bold]")
        if _has_words(result.query):
            console.print(escape(result.query.example_text()))
        console.print(_table("Proponents", "green", result.proponents))
        console.print(_table("Opponents", "red", result.opponents))
        console.print(_searched(result, answer.exact), style="dim")
    timing = answer.timing_ms
    console.print(
        f"{timing.total:.1f} ms: queue {timing.queue:.1f}, gradient {timing.gradient:.1f}, "
        f"search {timing.search:.1f}, rendering {timing.render:.1f}",
        style="dim",
    )
    console.print(escape(answer.convention), style="dim")


def _question(query: QueryInfo) -> str:
    where = "The example" if query.row is None else f"Row {query.row} of the {query.split} data"
    label = "without a label" if query.label is None else f"labelled {_words(query.label, query.label_name)}"
    return f"{where}, {label}, {_predicted(query)}; explained: {query.target}"


def _table(title: str, colour: str, hits: Sequence[Hit]) -> Table:
    if any(_has_words(hit) for hit in hits):
        return _table_of_words(title, colour, hits)
    table = Table(title=title, title_justify="left", title_style=colour)
    for name in ("row", "score", "label", "prediction", "loss"):
        table.add_column(name, justify="left" if name in ("label", "prediction") else "right")
    for hit in hits:
        label, prediction = _words(hit.label, hit.label_name), _words(hit.prediction, hit.prediction_name)
        loss = "" if hit.loss is None else f"{hit.loss:.3g}"
        table.add_row(str(hit.row), f"{hit.score:+.4g}", escape(label), escape(prediction), loss)
    return table


def _table_of_words(title: str, colour: str, hits: Sequence[Hit]) -> Table:
    """Label and prediction above the example: texts need the width."""
    table = Table(title=title, title_justify="left", title_style=colour)
    table.add_column("row", justify="right", no_wrap=True)
    table.add_column("score", justify="right", no_wrap=True)
    table.add_column("label, prediction and example")
    for hit in hits:
        head = f"[bold]{escape(_words(hit.label, hit.label_name))}[/bold], {escape(_predicted(hit))}"
        table.add_row(str(hit.row), f"{hit.score:+.3g}", f"{head}\n{escape(hit.example_text())}")
    return table


def _predicted(shown: Hit | QueryInfo) -> str:
    loss = "" if shown.loss is None else f" (loss {shown.loss:.3g})"
    return f"predicted {_words(shown.prediction, shown.prediction_name)}{loss}"


def _has_words(shown: Hit | QueryInfo) -> bool:
    """Whether a terminal can show the example: a text, or features by name."""
    return bool({"text", "features"} & set(shown.example or ()))


def _searched(result: Influence, exact: bool) -> str:
    kind = "exact" if exact else "approximate"
    return f"{kind} search of {result.rows_searched:,} rows; {result.rows_touched:,} read beyond the first level"


def _words(label: Label | None, name: str | None) -> str:
    if label is None:
        return "-"
    return name if name is not None else f"{label:,.6g}"
