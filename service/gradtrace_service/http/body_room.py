"""Limits on what request bodies hold, each and all together."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from starlette.exceptions import HTTPException

SMALL_BYTES = 64 << 10  # the limit where requests need no more; such bodies are taken whatever others hold
MAX_VALUES = 2**20  # commas of a body: pixels as numbers, rows of a filter
MAX_CONTAINERS = 2**18  # opening brackets, and colons: each list, object or key costs ten times a number
_VALUE_BYTES = 32  # memory of a value once it is read
_BODIES = 4  # as many of the largest size are held at once
_BUSY = "too many large requests are being answered; send this one again later"


@dataclass(slots=True)
class Contents:
    """What has arrived of a body, counted before it is read: reading a hostile one may take a hundred times longer.

    Marks inside texts count as well, which only texts of megabytes notice.

    caller: who sends it, as `Access` names them
    """

    caller: str
    size: int = 0
    values: int = 0
    containers: int = 0

    def add(self, piece: bytes) -> None:
        self.size += len(piece)
        self.values += piece.count(b",")
        self.containers += max(piece.count(b"[") + piece.count(b"{"), piece.count(b":"))

    @property
    def memory(self) -> int:
        return self.size + _VALUE_BYTES * self.values

    @property
    def room(self) -> int:
        """Bytes that it takes of the room: small bodies need none, and there are only as many as connections."""
        return self.memory if self.memory > SMALL_BYTES else 0


class BodyRoom:
    """Memory for the bodies of requests that are being answered. One caller holds half of it at most.

    max_bytes: of the paths in `large`; others take SMALL_BYTES at most
    """

    def __init__(self, max_bytes: int, large: frozenset[str]) -> None:
        self._max_bytes, self._large = max_bytes, large
        values = _VALUE_BYTES * MAX_VALUES
        self._most = max(_BODIES * max_bytes + values, 2 * (max_bytes + values))  # half of it has room for any body
        self._by_caller = Counter[str]()

    def max_bytes(self, path: str) -> int:
        return self._max_bytes if path in self._large else min(self._max_bytes, SMALL_BYTES)

    def take(self, contents: Contents, piece: bytes) -> None:
        """Make room for a piece of a body.

        Raises:
            HTTPException: there is none (503), or the body holds more values than it may (413).
        """
        before = contents.room
        contents.add(piece)
        self._by_caller[contents.caller] += contents.room - before
        if contents.values > MAX_VALUES or contents.containers > MAX_CONTAINERS:
            raise HTTPException(
                413,
                f"the body holds more than {MAX_VALUES:,} values, or {MAX_CONTAINERS:,} lists, objects or keys; send "
                "fewer at a time, and images as PNG files in base64",
            )
        full = self._by_caller.total() > self._most or self._by_caller[contents.caller] > self._most // 2
        if full and contents.room:
            raise HTTPException(503, _BUSY, {"Retry-After": "1"})

    def give_back(self, contents: Contents) -> None:
        """The request is answered."""
        self._by_caller[contents.caller] -= contents.room
        if not self._by_caller[contents.caller]:
            del self._by_caller[contents.caller]
