"""What the numbers mean: sign and unit of the scores, part of every answer."""

from __future__ import annotations

from gradtrace.methods import METHODS, Options

_SIGN = "Positive: a proponent, training on the row lowered what is explained. Negative: an opponent, it raised it."
_COMPRESSED = "; computed in the index's compressed coordinates"
_FULL = "; computed from full gradients, for rows that the search in the index's compressed coordinates found"
_LIMITS = ". It is no forecast of what removing the row would do."


def convention(method: str, options: Options | None = None, rescored: bool = False) -> str:
    """Sign and unit of a method's scores, in words."""
    meaning = METHODS[method].meaning(options or Options())
    return f"{_SIGN} {meaning}{_FULL if rescored else _COMPRESSED}{_LIMITS}"
