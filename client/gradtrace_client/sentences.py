"""What an answer says of its query and of how it was computed, in words, for a terminal and for a document."""

from __future__ import annotations

from gradtrace_client._shown import Answer, Distribution, Query, Result, Timing

_ROWS_NAMED = 3


def subject_text(query: Query) -> str:
    """What was explained, such as `Row 3 of the query data`."""
    if query.rows is not None:
        named = ", ".join(map(str, query.rows[:_ROWS_NAMED])) + (" ..." if len(query.rows) > _ROWS_NAMED else "")
        return f"The mean of {query.count} rows of the {query.split} data ({named})"
    if query.count > 1:
        return f"The mean of {query.count} examples"
    return "The example" if query.row is None else f"Row {query.row} of the {query.split} data"


def search_text(result: Result, answer: Answer) -> str:
    """Whether the search was exact, and how much it read."""
    kind = "exact" if answer.exact else "approximate"
    if answer.recall is not None:
        kind += f" (recall {answer.recall.top:.3f} at the top, {answer.recall.bottom:.3f} at the bottom)"
    text = f"{kind} search of {result.rows_searched:,} rows; {result.rows_touched:,} read beyond the first level"
    return text + (f"; {result.rows_rescored:,} rescored by full gradients" if result.rows_rescored else "")


def distribution_text(scores: Distribution) -> str:
    low, high = scores.quantiles["0"], scores.quantiles["100"]
    return f"scores of all rows: {low:.4g} to {high:.4g}, mean {scores.mean:.4g}, deviation {scores.std:.4g}"


def timing_text(timing: Timing) -> str:
    stages = [f"queue {timing.queue:.1f}", f"gradient {timing.gradient:.1f}", f"search {timing.search:.1f}"]
    if timing.rescore_per_row is not None:
        stages.append(f"rescoring {timing.rescore:.1f} ({timing.rescore_per_row:.2f} a row)")
    if timing.percentiles:
        stages.append(f"percentiles {timing.percentiles:.1f}")
    return f"{timing.total:.1f} ms: {', '.join(stages)}, rendering {timing.render:.1f}"
