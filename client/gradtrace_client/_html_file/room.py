"""How much of a document's size is left."""

from __future__ import annotations


class Room:
    def __init__(self, size: int) -> None:
        self._left = size  # bytes

    def take(self, html: str) -> None:
        """For what is there in any case."""
        self._left -= len(html.encode())

    def admits(self, html: str) -> bool:
        """Whether it still fits; it is counted then."""
        size = len(html.encode())
        if size > self._left:
            return False
        self._left -= size
        return True
