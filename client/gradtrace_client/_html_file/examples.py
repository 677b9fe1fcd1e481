"""How a document shows an example: its picture, its text with the words that the query shares, its features beside the
query's."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from typing import Any

from gradtrace_client._display import feature_text, image_address
from gradtrace_client._html_file.markup import Markup, clipped, element, joined
from gradtrace_client._html_file.numbers import signed

_TEXT_LIMIT = 4_000  # characters
_TEXT_OPEN = 600  # characters that are shown at once
_VALUE_LIMIT = 200
_MOST_FEATURES = 40
_IMAGE_LIMIT = 2 << 20  # characters of its address
_SMALL_IMAGE = 96  # pixels: below, they are shown as squares
_WORD = re.compile(r"\w+")
_COMMON_WORDS = re.compile(
    "about|after|also|been|before|being|both|could|does|each|from|have|having|here|into|just|like|more|most|only|other|"
    "over|same|should|some|such|than|that|their|them|then|there|these|they|this|those|through|very|were|what|when|"
    "where|which|while|will|with|would|your"
)

Payload = Mapping[str, Any]


def example_view(example: dict[str, Any] | None, query: Payload | None = None) -> Markup | None:
    """The example as its task renders it. query: the one to compare with, for a training row"""
    if not example:
        return None
    if isinstance(example.get("error"), str) and len(example) == 1:
        return element("p", f"Not shown: {clipped(example['error'], _VALUE_LIMIT)}", class_="missing")
    rest = {name: value for name, value in example.items() if name not in ("image", "text", "features")}
    views = [
        _picture(example),
        _text(example["text"], query) if "text" in example else None,
        _features(_mapping(example.get("features")), _mapping((query or {}).get("features"))),
        _features(rest, {name: (query or {})[name] for name in rest if name in (query or {})}),
    ]
    pictured = image_address(example) is not None and len(example) == 1
    return element("div", *views, class_="example pictured" if pictured else "example")


def shared_words(text: str, other: str) -> frozenset[str]:
    """Words of at least four letters that are in both texts, without the most common ones of English."""
    shared = {word.casefold() for word in _WORD.findall(text)} & {word.casefold() for word in _WORD.findall(other)}
    return frozenset(word for word in shared if len(word) >= 4 and not _COMMON_WORDS.fullmatch(word))


def _picture(example: dict[str, Any]) -> Markup | None:
    if "image" not in example:
        return None
    address = image_address(example)
    if address is None:
        return element("p", "Not shown: the image is not a data address.", class_="missing")
    if len(address) > _IMAGE_LIMIT:
        return element("p", f"Not shown: a picture of {len(address) / 2**20:.1f} MB.", class_="missing")
    size = _png_size(address)
    small = size is not None and max(size) < _SMALL_IMAGE
    return element("img", src=address, alt="The example's picture", class_="small" if small else None)


def _png_size(address: str) -> tuple[int, int] | None:
    """Width and height of a PNG in pixels, from its header; None for any other image."""
    head, _, data = address.partition(";base64,")
    if head != "data:image/png":
        return None
    try:
        header = base64.b64decode(data[:32], validate=True)
    except ValueError:
        return None
    return int.from_bytes(header[16:20], "big"), int.from_bytes(header[20:24], "big")


def _text(text: Any, query: Payload | None) -> Markup:
    shown = clipped(str(text), _TEXT_LIMIT)
    words = shared_words(shown, str((query or {}).get("text", "")))
    first, rest = _parts_of(shown)
    beginning = element("p", _marked(first, words), class_="text", dir="auto")
    if not rest:
        return beginning
    whole = element("p", _marked(rest, words), class_="text", dir="auto")
    return joined(beginning, element("details", element("summary", f"{len(rest):,} more characters"), whole))


def _parts_of(text: str) -> tuple[str, str]:
    """What is shown at once, up to the end of a word, and the rest of a long text."""
    if len(text) <= 2 * _TEXT_OPEN:
        return text, ""
    end = text.rfind(" ", 0, _TEXT_OPEN)
    end = _TEXT_OPEN if end < 0 else end
    return text[:end], text[end:]


def _marked(text: str, words: frozenset[str]) -> Markup:
    """The text with these words marked."""
    pieces: list[str] = []
    end = 0
    for match in _WORD.finditer(text):
        if match.group().casefold() in words:
            pieces += [text[end : match.start()], element("mark", match.group())]
            end = match.end()
    return joined(*pieces, text[end:])


def _mapping(value: Any) -> Payload:
    return value if isinstance(value, Mapping) else {}


def _features(features: Payload, of_query: Payload) -> Markup | None:
    """A table, with the differences to the query's features where it has some."""
    if not features:
        return None
    names = list(features)[:_MOST_FEATURES]
    heads = ["feature", "value", *["to the query"] * bool(of_query)]
    lines = [_feature_line(name, features[name], of_query) for name in names]
    left_out = len(features) - len(names)
    more = element("p", f"and {left_out:,} more", class_="missing") if left_out else None
    head = element("tr", *(element("th", head, scope="col") for head in heads))
    table = element("table", element("thead", head), element("tbody", *lines), class_="features")
    return joined(table, more)


def _feature_line(name: str, value: Any, of_query: Payload) -> Markup:
    cells = [
        element("th", element("bdi", clipped(name, _VALUE_LIMIT)), scope="row"),
        element("td", element("bdi", clipped(feature_text(value), _VALUE_LIMIT))),
    ]
    if of_query:
        cells.append(element("td", _difference(value, of_query[name]) if name in of_query else "", class_="difference"))
    return element("tr", *cells)


def _difference(value: Any, of_query: Any) -> str:
    """How far above the query's a number is; of anything else, what the query has in its place."""
    if value == of_query:
        return "same"
    if _is_number(value) and _is_number(of_query):
        return signed(value - of_query)
    return f"there {clipped(feature_text(of_query), _VALUE_LIMIT)}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
