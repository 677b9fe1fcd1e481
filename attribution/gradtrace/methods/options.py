"""What a request may set of its method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal, get_args

from gradtrace.errors import QueryError

Weights = Literal["learning_rate", "learning_rate_steps", "equal"]
Similarity = Literal["cosine", "dot", "l2"]


@dataclass(frozen=True, slots=True)
class Options:
    """None stands for the method's default.

    checkpoints: names of those that are used
    weights: of the checkpoints, for the methods that sum over them by a weight
    damping: of the curvature's inverse, relative to each layer's mean eigenvalue
    segments: stretches of training with one curvature each
    similarity: how representations are compared
    """

    checkpoints: Sequence[str] | None = None
    weights: str | None = None
    damping: float | None = None
    segments: int | None = None
    similarity: str | None = None

    def check(self, method: str, taken: Sequence[str]) -> None:
        """Raises QueryError for an option that the method does not take, or a value that no option has."""
        given = [field.name for field in fields(self) if getattr(self, field.name) is not None]
        foreign = [name for name in given if name not in taken]
        if foreign:
            raise QueryError(
                f"method {method!r} takes no {foreign[0]}: leave it out ({method!r} takes {', '.join(taken) or 'none'})"
            )
        for name, known in (("weights", Weights), ("similarity", Similarity)):
            value = getattr(self, name)
            if value is not None and value not in get_args(known):
                raise QueryError(f"unknown {name} {value!r}; choose from {', '.join(get_args(known))}")
        if self.damping is not None and not 0 < self.damping < float("inf"):
            raise QueryError(f"damping must be a number above zero, not {self.damping}")
        if self.segments is not None and self.segments < 1:
            raise QueryError(f"segments must be at least 1, not {self.segments}")
