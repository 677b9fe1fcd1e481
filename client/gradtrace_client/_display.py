"""Tables and examples as HTML for notebooks, and records as pandas frames. It knows no schema."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas

_TEXT_LIMIT = 200


def frame(records: Sequence[dict[str, Any]]) -> pandas.DataFrame:
    """A DataFrame with one line for each record.

    Raises:
        ImportError: pandas is not installed.
    """
    try:
        import pandas
    except ImportError:
        raise ImportError("to_pandas() needs pandas: pip install 'gradtrace-client[pandas]'") from None
    table: pandas.DataFrame = pandas.DataFrame(records)
    return table


def table_html(title: str, heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Cells are HTML; title and heads are text."""
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in line)}</tr>" for line in lines)
    return f"<table><caption>{escape(title)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def note_html(text: str) -> str:
    return f"<p><small>{escape(text)}</small></p>"


def strengths(scores: Sequence[float]) -> list[float]:
    """Each score divided by the largest size of any: from -1 to 1; all 0 where all are."""
    largest = max(map(abs, scores), default=0.0)
    return [score / largest if largest else 0.0 for score in scores]


def tokens_html(tokens: Sequence[str], scores: Sequence[float]) -> str:
    """A text whose tokens are the greener, or redder where they oppose, the stronger their scores are."""
    colours = {True: "0, 150, 80", False: "210, 40, 60"}
    return "".join(
        f'<span title="{score:+.4g}" style="white-space:pre-wrap;background:rgba({colours[score >= 0]}, '
        f'{0.6 * abs(strength):.2f})">{escape(token)}</span>'
        for token, score, strength in zip(tokens, scores, strengths(scores), strict=True)
    )


def example_html(example: dict[str, Any] | None) -> str:
    """An image as a thumbnail, anything else as escaped text; only `data:image/` addresses are ever put in a page."""
    image = image_address(example)
    if image is not None:
        return f'<img src="{escape(image)}" style="height:48px;image-rendering:pixelated">'
    return escape(example_text(example))


def image_address(example: dict[str, Any] | None) -> str | None:
    """The `data:image/` address of an image; None for any other address."""
    image = (example or {}).get("image")
    return image if isinstance(image, str) and image.startswith("data:image/") else None


def example_text(example: dict[str, Any] | None) -> str:
    """A rendered example in one line of at most 200 characters; an image is only named."""
    if not example:
        return ""
    if "text" in example:
        text = " ".join(str(example["text"]).split())
    elif isinstance(example.get("features"), dict):
        text = ", ".join(f"{name} {feature_text(value)}" for name, value in example["features"].items())
    elif isinstance(example.get("error"), str):
        text = f"not shown: {example['error']}"
    else:
        text = ", ".join(example)
    return text if len(text) <= _TEXT_LIMIT else text[: _TEXT_LIMIT - 1] + "…"


def feature_text(value: Any) -> str:
    """A feature's value; numbers with six digits."""
    if value is None:
        return "unknown"
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return _number_text(value) if is_number else str(value)


def _number_text(value: float) -> str:
    """Six digits, with separators of thousands."""
    return f"{value:,.6g}"


def label_text(label: float | None, name: str | None) -> str:
    """The label's name, or its number where it has none."""
    if label is None:
        return "none"
    return name if name is not None else _number_text(label)
