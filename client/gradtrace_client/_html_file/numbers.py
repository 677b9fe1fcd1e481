"""Numbers as a reader expects them."""

from __future__ import annotations


def signed(number: float) -> str:
    """Four digits, with a sign, and with separators of thousands."""
    return f"{number:+,.4g}"


def plain(number: float) -> str:
    """Four digits."""
    return f"{number:.4g}"
