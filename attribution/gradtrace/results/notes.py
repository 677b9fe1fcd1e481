"""What a result says beside its hits: why there are fewer than asked for, or why no score says anything."""

from __future__ import annotations

from gradtrace.search.scored_rows import SearchResult


def note_on_zero(kind: str, queries: int, loss: float) -> str:
    """kind: what of the query is zero, "gradient" or "representation";  loss: the query's, or the mean of several"""
    if queries > 1:
        return f"the {kind}s of these {queries} queries add up to zero at every checkpoint used, so every score is zero"
    certain = " (its loss is 0: the model is certain, saturated)" if loss == 0 and kind == "gradient" else ""
    return f"the {kind} of this query is zero at every checkpoint used{certain}, so every score is zero"


def note_on_missing(ends: SearchResult, proponents: int, opponents: int, k: int, rescored: int) -> str | None:
    """Why there are fewer than k proponents or opponents; None where there are k of each.

    rescored: rows of which full gradients were taken; 0: none
    """
    searched = f"{rescored:,} rows rescored" if rescored else f"{ends.rows_searched:,} rows searched"
    texts = []
    for count, name, sign in ((proponents, "proponents", "positive"), (opponents, "opponents", "negative")):
        if count >= k:
            continue
        if rescored or ends.exact:
            reason = f"{'no other' if count else 'none'} of the {searched} has a {sign} score"
        else:
            reason = f"the approximate search found no{' other' if count else ''} row with a {sign} score"
        texts.append(f"only {count} of {k} {name}: {reason}" if count else f"no {name}: {reason}")
    return "; ".join(texts) or None


def note_on_few_rows(ends: SearchResult, k: int) -> str | None:
    """Of scores whose sign says nothing: why there are fewer than k at either end."""
    if len(ends.top.rows) >= k:
        return None
    return f"only {len(ends.top.rows)} of {k} rows at either end: no more were searched"
