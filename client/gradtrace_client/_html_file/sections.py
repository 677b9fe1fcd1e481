"""The section of one query: its card, where its scores lie, and the hits of both ends side by side."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

from gradtrace_client._html_file.cards import hit_card, query_card
from gradtrace_client._html_file.charts import histogram_chart
from gradtrace_client._html_file.markup import Markup, clipped, element, joined
from gradtrace_client._html_file.numbers import signed
from gradtrace_client._html_file.room import Room
from gradtrace_client._shown import Answer, Distribution, Hit, Result
from gradtrace_client.sentences import distribution_text, search_text, subject_text

_TEXT_LIMIT = 2_000  # characters of a note
_BESIDE_CARDS = 400  # bytes of the section's own elements, more than they take


def result_section(answer: Answer, at: int, room: Room) -> Markup:
    """at: the position of the query among those of the answer"""
    result = answer.results[at]
    card = query_card(result.query)
    if not room.admits(card):
        card = query_card(result.query, with_example=False)
        room.take(card)
    surroundings = joined(_scores(result), _notes(result, answer))
    room.take(surroundings + " " * _BESIDE_CARDS)
    columns = _columns(result, room)
    heading = element("h2", subject_text(result.query))
    return element(
        "section", heading, card, surroundings, element("div", *columns, class_="ends"), id=f"query-{at + 1}"
    )


def _columns(result: Result, room: Room) -> list[Markup]:
    """Both ends; where there is no room for all hits, the strongest of either are in."""
    scale = max((abs(hit.score) for hit in (*result.proponents, *result.opponents)), default=0.0)
    ends: tuple[list[Markup], list[Markup]] = ([], [])
    for rank, pair in enumerate(zip_longest(result.proponents, result.opponents), 1):
        cards = [None if hit is None else hit_card(hit, rank, scale, result.query.example) for hit in pair]
        if not room.admits("".join(card for card in cards if card is not None)):
            break
        for end, card in zip(ends, cards, strict=True):
            end += [] if card is None else [card]
    titles = ("Proponents", "highest scores first"), ("Opponents", "lowest scores first")
    hits = (result.proponents, result.opponents)
    return [_column(*title, cards, len(of)) for title, cards, of in zip(titles, ends, hits, strict=True)]


def _column(title: str, meaning: str, cards: Sequence[Markup], hits: int) -> Markup:
    left_out = hits - len(cards)
    more = f"{left_out:,} more are left out, because the file would be too large." if left_out else None
    return element(
        "section",
        element("h3", title, element("small", f" {meaning}")),
        element("ol", *cards) if cards else None,
        element("p", more or "None.", class_="missing") if more or not cards else None,
        class_=title.lower(),
    )


def _scores(result: Result) -> Markup | None:
    scores = result.distribution
    if scores is None or scores.histogram is None:
        return None if scores is None else element("p", _sentence(distribution_text(scores)), class_="missing")
    return _histogram(scores, [*result.proponents, *result.opponents])


def _histogram(scores: Distribution, hits: Sequence[Hit]) -> Markup | None:
    if scores.histogram is None or not scores.histogram.counts:
        return None
    edges = scores.histogram.edges
    ends = element("p", element("span", signed(edges[0])), element("span", signed(edges[-1])), class_="ends-of-axis")
    caption = "Scores of all training rows, counted on a logarithmic scale. The ticks are the rows below."
    chart = histogram_chart(scores.histogram, [hit.score for hit in hits])
    return element("figure", element("figcaption", caption), chart, ends, class_="scores")


def _notes(result: Result, answer: Answer) -> Markup:
    note = None if result.note is None else element("p", f"Note: {clipped(result.note, _TEXT_LIMIT)}", class_="note")
    searched = f"{_sentence(search_text(result, answer))} All bars are on one scale."
    return element("div", note, element("p", searched, class_="missing"))


def _sentence(words: str) -> str:
    return f"{words[:1].upper()}{words[1:]}."
