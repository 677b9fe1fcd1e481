"""Small charts as inline SVG. Their sizes are attributes: the document's policy allows no inline styles."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from gradtrace_client._html_file.markup import Markup, clipped, element
from gradtrace_client._html_file.numbers import signed
from gradtrace_client._shown import Histogram

_MOST_COLUMNS = 60
_NAME_LIMIT = 200


def score_bar(score: float, scale: float) -> Markup:
    """A bar to the right of the middle for a positive score, to the left for a negative one.

    scale: the score that fills one half
    """
    length = 50 * min(abs(score) / scale, 1) if scale > 0 else 0.0
    bar = _rectangle(50 if score >= 0 else 50 - length, 0, length, 6, side(score))
    middle = _rectangle(49.8, 0, 0.4, 6, "axis")
    return _svg("score-bar", 100, 6, None, _rectangle(0, 0, 100, 6, "track"), bar, middle)


def proportion_bar(share: float) -> Markup:
    """share: between 0 and 1"""
    length = 100 * min(max(share, 0), 1)
    return _svg("proportion", 100, 6, None, _rectangle(0, 0, 100, 6, "track"), _rectangle(0, 0, length, 6, "fill"))


def share_columns(shares: Mapping[str, float], what: str) -> Markup:
    """A column up or down for each share, on a scale of their own; beyond 60, neighbours are summed.

    what: the chart shows, for those who do not see it
    """
    columns = _columns(shares)
    scale = max((abs(share) for _, share in columns), default=0) or 1.0
    width = 120 / max(len(columns), 1)
    bars = [_column(at * width, width, name, share, 14 * share / scale) for at, (name, share) in enumerate(columns)]
    told = "; ".join(f"{name} {signed(share)}" for name, share in columns[:8]) + ("; …" if len(columns) > 8 else "")
    return _svg("columns", 120, 30, f"{what}: {told}", *bars, _rectangle(0, 14.8, 120, 0.4, "axis"))


def histogram_chart(histogram: Histogram, hit_scores: Iterable[float]) -> Markup:
    """Counts on a logarithmic scale over the scores, with a tick below the axis for each hit."""
    low, high = histogram.edges[0], histogram.edges[-1]
    across = 600 / (high - low) if high > low else 0.0
    tallest = math.log1p(max(histogram.counts, default=0)) or 1.0
    bars = [
        _bin(600 * at / len(histogram.counts), 600 / len(histogram.counts), count, 100 * math.log1p(count) / tallest)
        for at, count in enumerate(histogram.counts)
    ]
    marks = [_rectangle(min(max((score - low) * across - 1, 0), 598), 103, 2, 15, side(score)) for score in hit_scores]
    zero = [_rectangle(-low * across - 0.5, 0, 1, 100, "zero")] if low <= 0 <= high else []
    axis = _rectangle(0, 100, 600, 1, "axis")
    told = f"Histogram of the scores of {sum(histogram.counts):,} rows, from {signed(low)} to {signed(high)}"
    return _svg("histogram", 600, 120, told, *bars, *zero, axis, *marks)


def side(score: float) -> str:
    return "proponent" if score >= 0 else "opponent"


def _columns(shares: Mapping[str, float]) -> Sequence[tuple[str, float]]:
    """Names with their shares, at most 60."""
    named = [(clipped(name, _NAME_LIMIT), share) for name, share in shares.items()]
    each = math.ceil(len(named) / _MOST_COLUMNS) or 1
    groups = [named[at : at + each] for at in range(0, len(named), each)]
    return [
        (group[0][0] if len(group) == 1 else f"{group[0][0]} … {group[-1][0]}", sum(share for _, share in group))
        for group in groups
    ]


def _column(x: float, width: float, name: str, share: float, height: float) -> Markup:
    bar = _rectangle(x + 0.1 * width, 15 - max(height, 0), 0.8 * width, max(abs(height), 0.3), side(share))
    return element("g", element("title", f"{name}: {signed(share)}"), bar)


def _bin(x: float, width: float, count: int, height: float) -> Markup | None:
    return _rectangle(x + 0.5, 100 - height, width - 1, height, "bin") if count else None


def _rectangle(x: float, y: float, width: float, height: float, class_: str) -> Markup:
    numbers = {"x": x, "y": y, "width": width, "height": height}
    return element("rect", class_=class_, **{name: f"{value:.2f}" for name, value in numbers.items()})


def _svg(class_: str, width: int, height: int, told: str | None, *shapes: Markup | None) -> Markup:
    """told: in place of the picture; None where the text beside it says the same"""
    reading = {"aria_hidden": "true"} if told is None else {"role": "img", "aria_label": told}
    box = {"viewBox": f"0 0 {width} {height}", "preserveAspectRatio": "none"}
    return element("svg", *shapes, class_=class_, **box, **reading)
