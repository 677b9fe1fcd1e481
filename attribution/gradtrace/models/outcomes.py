"""What a checkpoint makes of examples: its predictions and losses, without gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gradtrace.models.gradient_model import GradientModel
from gradtrace.models.queries import AT_PREDICTED, Query, query_batches, resolve_queries
from gradtrace.task import Example, Label


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of one example; None where unknown. The loss is that at the example's own label."""

    label: Label | None = None
    prediction: Label | None = None
    loss: float | None = None

    @property
    def correct(self) -> bool | None:
        """Known only where label and prediction are classes, as in an index's columns."""
        known = isinstance(self.label, int) and isinstance(self.prediction, int)
        return self.label == self.prediction if known else None


def outcomes(model: GradientModel, examples: Sequence[Example]) -> list[Outcome]:
    """One outcome for each of one or more examples.

    Raises:
        QueryError: an example has no label, and the task predicts none.
        LossError: a loss is NaN or infinite.
    """
    queries = resolve_queries(model, examples, "loss")
    losses: list[float | None] = [None] * len(queries)
    for numbers, _ in query_batches(model, queries):
        batch = model.batch([queries[number].example for number in numbers])
        for number, loss in zip(numbers, model.losses(batch).tolist(), strict=True):
            losses[number] = loss
    return [
        Outcome(query.label, query.prediction, loss if _is_loss(query) else None)
        for query, loss in zip(queries, losses, strict=True)
    ]


def _is_loss(query: Query) -> bool:
    """Whether the example's own loss is known: it has a label, or needs none."""
    return query.measure == "loss" and not query.target.endswith(AT_PREDICTED)
