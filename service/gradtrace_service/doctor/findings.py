"""What a check says: one line, with the remedy where something is wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Literal, NamedTuple

State = Literal["ok", "warning", "problem"]


class Finding(NamedTuple):
    """`text` ends with the remedy where `state` is not "ok"."""

    topic: str
    state: State
    text: str


Says = Iterator[tuple[State, str]]  # what a check yields


def findings_of(checks: Iterable[tuple[str, Callable[[], Says]]]) -> Iterator[Finding]:
    """What the checks say, each under its topic. One that fails is a problem of its topic; the others still run."""
    for topic, check in checks:
        try:
            for state, text in check():
                yield Finding(topic, state, text)
        except Exception as error:  # whatever a damaged file, an odd answer or a user's task raises
            yield Finding(topic, "problem", f"it could not be checked: {type(error).__name__}: {error}")


def listed(names: Iterable[object], shown: int = 5) -> str:
    """The first names, and how many there are beside them."""
    texts = [str(name) for name in names]
    more = f" and {len(texts) - shown} more" if len(texts) > shown else ""
    return ", ".join(texts[:shown]) + more


def in_bytes(size: float) -> str:
    """For people: 1.5 GB"""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:,.1f} TB"
