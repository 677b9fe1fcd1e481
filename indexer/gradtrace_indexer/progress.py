"""How far a long piece of work has come, on stderr: a bar on a terminal; in a log, a line every ten seconds."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

LINE_SECONDS = 10.0


class _Lines:
    """A file for tqdm, which redraws its bar after carriage returns: here each state of it is a line."""

    def write(self, text: str) -> None:
        if line := text.strip():
            sys.stderr.write(line + "\n")

    def flush(self) -> None:
        sys.stderr.flush()


def progress_bar(
    title: str, total: int, unit: str = "it", shown: bool = True, items: Iterable[Any] | None = None
) -> tqdm[Any]:
    """A context that is told with `update(n)` of every `n` units that are done; or, over `items`, an iterator that
    counts each as done when the next one is asked for."""
    settings: dict[str, Any] = {}
    if not sys.stderr.isatty():
        bar_format = "{desc}: {percentage:.0f}% {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}]"
        settings = {"file": _Lines(), "bar_format": bar_format, "mininterval": LINE_SECONDS, "miniters": 1}
    return tqdm(items, total=total, desc=title, unit=unit, disable=not shown, **settings)


def note(text: str) -> None:
    """A line of its own, above a bar that is on the terminal."""
    tqdm.write(text, file=sys.stderr)
