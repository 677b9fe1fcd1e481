"""What the numbers mean: sign and unit of the scores, part of every answer."""

from __future__ import annotations

from gradtrace.methods import METHODS

_SIGN = "Positive: a proponent, training on the row lowered what is explained. Negative: an opponent, it raised it."
_BY_WEIGHTS = {
    "learning_rate": (
        "Score: sum over checkpoints of learning rate x inner product of the gradients of row and query. To first "
        "order, how much one step of SGD on the row at each checkpoint would lower what is explained, in its own unit"
    ),
    "learning_rate_steps": (
        "Score: sum over checkpoints of learning rate x steps since the checkpoint before x inner product of the "
        "gradients of row and query. To first order, how much what is explained would have fallen, in its own unit, "
        "had every step of SGD been on the row alone"
    ),
    "equal": (
        "Score: sum over checkpoints of the inner product of the gradients of row and query. It has no unit of its "
        "own: compare the scores of one query with each other"
    ),
}
_NORMALIZED = "Score: cosine between the gradients of row and query, from -1 to 1"
_COMPRESSED = "; computed in the index's compressed coordinates"
_FULL = "; computed from full gradients, for rows that the search in the index's compressed coordinates found"
_LIMITS = ". It is no forecast of what removing the row would do."


def convention(method: str, weights: str | None = None, rescored: bool = False) -> str:
    """Sign and unit of a method's scores, in words; `weights` None stands for the method's own."""
    chosen = METHODS[method]
    unit = _NORMALIZED if chosen.normalized else _BY_WEIGHTS[weights or chosen.weights]
    return f"{_SIGN} {unit}{_FULL if rescored else _COMPRESSED}{_LIMITS}"
