"""What the numbers mean: sign and unit of the scores, part of every answer."""

from __future__ import annotations

from gradtrace.methods import METHODS, MethodOptions
from gradtrace.store.manifest import FisherEntry

_COMPRESSED = "; computed in the index's compressed coordinates"
_FULL = "; computed from full gradients, for rows that the search in the index's compressed coordinates found"
_LIMITS = " It is not a forecast of what removing the row would do."


def convention(
    method: str, options: MethodOptions | None = None, rescored: bool = False, fisher: FisherEntry | None = None
) -> str:
    """Sign and unit of a method's scores, in words. fisher: what the curvature of the index is, see its manifest"""
    scored_by = METHODS[method]
    computed = "" if not scored_by.compares_gradients else _FULL if rescored else _COMPRESSED
    curvature = f" Curvature: {fisher.sentence}." if scored_by.uses_curvature and fisher is not None else ""
    limits = "" if scored_by.forecasts else _LIMITS
    return f"{scored_by.sign}{scored_by.meaning_with(options or MethodOptions())}{computed}.{limits}{curvature}"
