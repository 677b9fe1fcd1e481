"""Numbers as a reader expects them."""

from __future__ import annotations


def signed(score: float) -> str:
    """Four digits, with a sign; the minus is as wide as the plus."""
    return f"{score:+.4g}".replace("-", "\N{MINUS SIGN}")


def plain(number: float) -> str:
    """Four digits."""
    return f"{number:.4g}".replace("-", "\N{MINUS SIGN}")
