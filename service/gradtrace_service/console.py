"""Answers as tables on a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.color import Color
from rich.console import Console
from rich.markup import escape
from rich.style import Style
from rich.table import Table
from rich.text import Text

from gradtrace_client.schemas import ClassProbability, Hit, InfluenceAnswer, Label, QueryInfo
from gradtrace_client.sentences import distribution_text, search_text, subject_text, timing_text
from gradtrace_client.token_schemas import TokensAnswer, TokenShares

_SHOWN = 3  # layers of a hit, and classes
_FAINT = 0.2  # of the strongest token's score: weaker tokens are not marked


def print_answer(answer: InfluenceAnswer) -> None:
    """Print each query with its proponents and opponents, then how the answer was computed."""
    console = Console()
    for result in answer.results:
        console.print(f"\n[bold]{escape(_question(result.query))}[/bold]")
        if _has_text(result.query):
            console.print(escape(result.query.example_text()))
        if result.query.probabilities:
            console.print(escape(_probabilities(result.query.probabilities)))
        for title, colour, hits in (("Proponents", "green", result.proponents), ("Opponents", "red", result.opponents)):
            if hits:
                console.print(_table(title, colour, hits))
        if result.note is not None:
            console.print(escape(f"Note: {result.note}"), style="yellow")
        console.print(search_text(result, answer), style="dim")
        if result.distribution is not None:
            console.print(distribution_text(result.distribution), style="dim")
    console.print(timing_text(answer.timing_ms), style="dim")
    console.print(escape(answer.convention), style="dim")
    if not answer.index.verified:
        console.print("The index was opened without comparing the checksums of its rows.", style="yellow")


def print_tokens(answer: TokensAnswer) -> None:
    """Print the text of each row, and that of the query for it: tokens are the brighter, the stronger their scores;
    green where they make the row a proponent, red where an opponent. Without colours, strong ones have a sign."""
    console = Console()
    for result in answer.results:
        console.print(f"\n[bold]row {result.row}, score {result.score:+.4g}[/bold]")
        for side, tokens, shares in answer.sides(result):
            console.print(f"{side}, {shares.elsewhere:+.3g} elsewhere", style="dim")
            console.print(_lit(tokens, shares, console.color_system is not None))


def _lit(tokens: Sequence[str], shares: TokenShares, coloured: bool) -> Text:
    text = Text()
    for token, strength in zip(tokens, shares.strengths(), strict=True):
        if abs(strength) < _FAINT or not token.strip():
            text.append(token)
        elif coloured:
            text.append(token, _light(strength))
        else:
            text.append(_signed(token, "+" if strength > 0 else "-"))
    return text


def _light(strength: float) -> Style:
    """strength: from -1 to 1"""
    brightness = round(60 + 160 * abs(strength))
    background = Color.from_rgb(0, brightness, 0) if strength > 0 else Color.from_rgb(brightness, 0, 0)
    is_bright_green = strength > 0 and brightness > 140  # the eye sees green brighter than red
    return Style(color="black" if is_bright_green else "white", bgcolor=background.name)


def _signed(token: str, sign: str) -> str:
    """A token within signs, after the spaces that it begins with: ` cat` as ` {+cat+}`."""
    word = token.strip()
    return token.replace(word, f"{{{sign}{word}{sign}}}", 1)


def _question(query: QueryInfo) -> str:
    if query.count > 1:
        return f"{subject_text(query)}{_loss(query)}; explained: {query.target}"
    label = "without a label" if query.label is None else f"labelled {_label(query.label, query.label_name)}"
    return f"{subject_text(query)}, {label}, {_predicted(query)}; explained: {query.target}"


def _probabilities(classes: Sequence[ClassProbability]) -> str:
    shown = (f"{_label(entry.label, entry.label_name)} {entry.probability:.3g}" for entry in classes[:_SHOWN])
    return f"Probabilities: {', '.join(shown)}{' ...' * (len(classes) > _SHOWN)}"


def _table(title: str, colour: str, hits: Sequence[Hit]) -> Table:
    """Percentiles and layers get a column each if the hits carry them."""
    if any(_has_text(hit) for hit in hits):
        return _text_table(title, colour, hits)
    table = Table(title=title, title_justify="left", title_style=colour)
    with_percentiles, with_layers = (
        any(getattr(hit, name) is not None for hit in hits) for name in ("percentile", "layers")
    )
    more = ["percentile"] * with_percentiles + ["strongest layers"] * with_layers
    for name in ("row", "score", "label", "prediction", "loss", *more):
        table.add_column(name, justify="left" if name in ("label", "prediction", "strongest layers") else "right")
    for hit in hits:
        label, prediction = _label(hit.label, hit.label_name), _label(hit.prediction, hit.prediction_name)
        loss = "" if hit.loss is None else f"{hit.loss:.3g}"
        cells = [str(hit.row), f"{hit.score:+.4g}", escape(label), escape(prediction), loss]
        cells += [f"{hit.percentile or 0:.2f} %"] * with_percentiles + [escape(_layers(hit))] * with_layers
        table.add_row(*cells)
    return table


def _layers(hit: Hit) -> str:
    strongest = sorted((hit.layers or {}).items(), key=lambda item: -abs(item[1]))[:_SHOWN]
    return ", ".join(f"{name} {share:+.3g}" for name, share in strongest)


def _text_table(title: str, colour: str, hits: Sequence[Hit]) -> Table:
    """Label and prediction stand above the example, since texts need the width."""
    table = Table(title=title, title_justify="left", title_style=colour)
    table.add_column("row", justify="right", no_wrap=True)
    table.add_column("score", justify="right", no_wrap=True)
    table.add_column("label, prediction and example")
    for hit in hits:
        head = f"[bold]{escape(_label(hit.label, hit.label_name))}[/bold], {escape(_predicted(hit))}"
        head += "" if hit.percentile is None else f", percentile {hit.percentile:.4g}"
        head += f"\n{escape(_layers(hit))}" if hit.layers else ""
        table.add_row(str(hit.row), f"{hit.score:+.3g}", f"{head}\n{escape(hit.example_text())}")
    return table


def _predicted(shown: Hit | QueryInfo) -> str:
    return f"predicted {_label(shown.prediction, shown.prediction_name)}{_loss(shown)}"


def _loss(shown: Hit | QueryInfo) -> str:
    return "" if shown.loss is None else f" (loss {shown.loss:.3g})"


def _has_text(shown: Hit | QueryInfo) -> bool:
    """Whether a terminal can show the example: a text, or features by name."""
    return bool({"text", "features"} & set(shown.example or ()))


def _label(label: Label | None, name: str | None) -> str:
    if label is None:
        return "-"
    return name if name is not None else f"{label:,.6g}"
