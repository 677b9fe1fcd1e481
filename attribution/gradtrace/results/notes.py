"""What a result says beside its hits: why there are fewer than asked for, or why no score says anything."""

from __future__ import annotations

from gradtrace.search.scored_rows import SearchResult


def note_on_zero(kind: str, queries: int, loss: float) -> str:
    """kind: what of the query is zero, "gradient" or "representation";  loss: the query's, or the mean of several"""
    if queries > 1:
        return f"the {kind}s of these {queries} queries add up to zero at every checkpoint used, so every score is zero"
    certain = " (its loss is 0: the model is certain, saturated)" if loss == 0 and kind == "gradient" else ""
    return f"the {kind} of this query is zero at every checkpoint used{certain}, so every score is zero"


def note_on_missing(found: SearchResult, proponents: int, opponents: int, k: int, rescored: int) -> str | None:
    """Why there are fewer than k proponents or opponents; None where there are k of each.

    rescored: rows of which full gradients were taken; 0: none
    """
    texts = [
        _missing(count, k, name, f"{sign} score", found, rescored)
        for count, name, sign in ((proponents, "proponents", "positive"), (opponents, "opponents", "negative"))
        if count < k
    ]
    return "; ".join(texts) or None


def _missing(count: int, k: int, name: str, wanted: str, found: SearchResult, rescored: int) -> str:
    other = "no other" if count else "none"
    if rescored:
        reason = f"{other} of the {rescored:,} rows rescored has a {wanted}"
    elif found.exact:
        reason = f"{other} of the {found.rows_searched:,} rows searched has a {wanted}"
    else:
        reason = f"the approximate search found no{' other' if count else ''} row with a {wanted}"
    return f"only {count} of {k} {name}: {reason}" if count else f"no {name}: {reason}"


def note_on_few_rows(found: SearchResult, k: int) -> str | None:
    """Of scores whose sign says nothing: why there are fewer than k at either end."""
    if len(found.top.rows) >= k:
        return None
    return f"only {len(found.top.rows)} of {k} rows at either end: no more were searched"
