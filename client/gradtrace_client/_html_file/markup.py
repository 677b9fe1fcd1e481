"""HTML that is safe because of how it is made: every text is escaped where it becomes part of an element."""

from __future__ import annotations

import re
from html import escape

_VOID = frozenset(("img", "meta"))
# What no HTML file may hold, also not escaped: controls, halves of surrogate pairs, and code points of no character.
_UNFIT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")


class Markup(str):
    """HTML, which is not escaped again."""

    __slots__ = ()


def element(tag: str, *children: str | None, **attributes: str | float | None) -> Markup:
    """An element. Children that are not Markup are text; None is left out, among attributes as well.

    attributes: `class_` stands for `class`, and other underscores for hyphens
    """
    written = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{_escaped(str(value))}"'
        for name, value in attributes.items()
        if value is not None
    )
    if tag in _VOID:
        return Markup(f"<{tag}{written}>")
    return Markup(f"<{tag}{written}>{joined(*children)}</{tag}>")


def joined(*children: str | None) -> Markup:
    return Markup("".join(child if isinstance(child, Markup) else _escaped(child) for child in children if child))


def clipped(text: str, limit: int) -> str:
    """At most so many characters, the last an ellipsis where more were there."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _escaped(text: str) -> str:
    return escape(_UNFIT.sub("\ufffd", text.replace("\r\n", "\n").replace("\r", "\n")))
