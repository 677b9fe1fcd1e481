"""How far a long piece of work has come, on stderr: a bar on a terminal; in a log, a line every ten seconds."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, TypeVar

from tqdm import tqdm

LINE_SECONDS = 10.0

T = TypeVar("T")


class _Lines:
    """A file for tqdm, which redraws its bar after carriage returns: here each state of it is a line."""

    def write(self, text: str) -> None:
        if line := text.strip():
            sys.stderr.write(line + "\n")

    def flush(self) -> None:
        sys.stderr.flush()


def progress_bar(title: str, total: int, unit: str = "", shown: bool = True) -> tqdm[Any]:
    """To be used as a context, and told with `update(n)` of every `n` units that are done."""
    return tqdm(total=total, **_settings(title, unit, shown))


def with_progress(items: Iterable[T], title: str, total: int, shown: bool = True) -> Iterable[T]:
    """The same items; each counts as done when the next one is asked for."""
    return tqdm(items, total=total, **_settings(title, "", shown))


def _settings(title: str, unit: str, shown: bool) -> dict[str, Any]:
    settings: dict[str, Any] = {"desc": title, "unit": f" {unit}" if unit else "it", "disable": not shown}
    if sys.stderr.isatty():
        return settings
    counts = "{n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}]"
    bar_format = "{desc}: {percentage:.0f}% " + counts
    return settings | {"file": _Lines(), "bar_format": bar_format, "mininterval": LINE_SECONDS, "miniters": 1}


def note(text: str) -> None:
    """A line of its own, above a bar that is on the terminal."""
    tqdm.write(text, file=sys.stderr)
