"""The card of a query, and those of the training rows that answer it."""

from __future__ import annotations

from gradtrace_client._display import label_text
from gradtrace_client._html_file.charts import proportion_bar, score_bar, share_columns, side
from gradtrace_client._html_file.examples import Payload, example_view
from gradtrace_client._html_file.markup import Markup, clipped, element
from gradtrace_client._html_file.numbers import plain, signed
from gradtrace_client._shown import ClassProbability, Example, Hit, Query

_NAME_LIMIT = 200
_MOST_LAYERS = 6
_MOST_CLASSES = 6


def query_card(query: Query, with_example: bool = True) -> Markup:
    example = example_view(query.example) if with_example else element("p", "Not shown: it is too large.")
    facts = [
        fact("Label", name_of(query.label, query.label_name)),
        fact("Prediction", _prediction(query)),
        fact("Loss", None if query.loss is None else plain(query.loss)),
        fact("Explained", element("bdi", clipped(query.target, _NAME_LIMIT))),
    ]
    told = element("div", element("dl", *facts, class_="facts"), _probabilities(query), class_="told")
    return element("div", element("div", example, told, class_="body"), class_="query card")


def hit_card(hit: Hit, rank: int, scale: float, query: Payload | None) -> Markup:
    """scale: the largest score of all cards;  query: its example, to compare with"""
    score = element("strong", signed(hit.score), class_=side(hit.score))
    percentile = None if hit.percentile is None else f"{hit.percentile:.2f} %"
    facts = [
        fact("Label", name_of(hit.label, hit.label_name)),
        fact("Prediction", _prediction(hit, hit.correct)),
        fact("Loss", None if hit.loss is None else plain(hit.loss)),
        fact("Percentile", percentile),
        fact("Near-duplicate of", None if hit.cluster in (None, hit.row) else f"row {hit.cluster}"),
    ]
    told = element(
        "div", element("dl", *facts, class_="facts"), _by_checkpoint(hit), _by_layer(hit, scale), class_="told"
    )
    return element(
        "li",
        element("h4", element("span", f"{rank}. ", class_="rank"), f"Row {hit.row}", score),
        score_bar(hit.score, scale),
        element("div", example_view(hit.example, query), told, class_="body"),
        class_="card",
    )


def fact(name: str, value: str | None) -> Markup | None:
    """A line of a list of facts, where the value is known."""
    return None if value is None else element("div", element("dt", name), element("dd", value))


def name_of(label: float | None, name: str | None) -> Markup | None:
    return None if label is None else element("bdi", clipped(label_text(label, name), _NAME_LIMIT))


def _prediction(shown: Example, correct: bool | None = None) -> Markup | None:
    """correct: False is said, in words, since a colour says nothing to some"""
    name = name_of(shown.prediction, shown.prediction_name)
    if name is None or correct is not False:
        return name
    return element("span", name, " (not its label)", class_="wrong")


def _probabilities(query: Query) -> Markup | None:
    classes = query.probabilities
    if not classes:
        return None
    rows = [_probability(probable) for probable in classes[:_MOST_CLASSES]]
    return element("table", element("caption", "Most probable classes"), element("tbody", *rows), class_="probable")


def _probability(probable: ClassProbability) -> Markup:
    return element(
        "tr",
        element("th", name_of(probable.label, probable.label_name), scope="row"),
        element("td", proportion_bar(probable.probability)),
        element("td", f"{100 * probable.probability:.1f} %"),
    )


def _by_checkpoint(hit: Hit) -> Markup | None:
    """The course of the score, where there is more than one checkpoint."""
    if len(hit.parts or {}) < 2:
        return None
    chart = share_columns(hit.parts or {}, "Share of each checkpoint")
    return element("figure", element("figcaption", "By checkpoint"), chart, class_="course")


def _by_layer(hit: Hit, scale: float) -> Markup | None:
    if not hit.layers:
        return None
    strongest = sorted(hit.layers.items(), key=lambda share: -abs(share[1]))
    rows = [_layer(name, share, scale) for name, share in strongest[:_MOST_LAYERS]]
    left_out = len(strongest) - len(rows)
    summary = "Strongest layers" + (f", of {len(strongest)}" if left_out else "")
    table = element("table", element("tbody", *rows), class_="layers")
    return element("details", element("summary", summary), table)


def _layer(name: str, share: float, scale: float) -> Markup:
    head = element("th", element("bdi", clipped(name, _NAME_LIMIT)), scope="row")
    return element("tr", head, element("td", score_bar(share, scale)), element("td", signed(share)))
