"""What a question may set of its method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from typing_extensions import TypedDict

from gradtrace.errors import QueryError

Weights = Literal["learning_rate", "learning_rate_steps", "equal"]
Similarity = Literal["cosine", "dot", "l2"]


class MethodOptions(TypedDict, total=False):
    """Each method takes some of these; None, as leaving it out, stands for the method's default.

    checkpoints: names of those that are used.
    weights: of the checkpoints, for the methods that sum over them: one of `Weights`.
    damping: of the curvature's inverse, relative to each layer's mean eigenvalue.
    segments: stretches of training with one curvature each.
    similarity: how representations are compared: one of `Similarity`.
    """

    checkpoints: Sequence[str] | None
    weights: str | None
    damping: float | None
    segments: int | None
    similarity: str | None


def check_options(method: str, taken: Sequence[str], options: MethodOptions) -> None:
    """Check what is set for a method that takes the options named.

    Raises:
        TypeError: no method has such an option.
        QueryError: this method does not take it, or it has no such value.
    """
    names = MethodOptions.__annotations__
    unknown = [name for name in options if name not in names]
    if unknown:
        raise TypeError(f"unknown option {unknown[0]!r}; options are {', '.join(names)}")
    foreign = [name for name, value in options.items() if value is not None and name not in taken]
    if foreign:
        raise QueryError(
            f"method {method!r} takes no {foreign[0]}: leave it out ({method!r} takes {', '.join(taken) or 'none'})"
        )
    for name, value, values in (
        ("weights", options.get("weights"), get_args(Weights)),
        ("similarity", options.get("similarity"), get_args(Similarity)),
    ):
        if value is not None and value not in values:
            raise QueryError(f"unknown {name} {value!r}; choose from {', '.join(values)}")
    damping, segments = options.get("damping"), options.get("segments")
    if damping is not None and not 0 < damping < float("inf"):
        raise QueryError(f"damping must be a number above zero, not {damping}")
    if segments is not None and segments < 1:
        raise QueryError(f"segments must be at least 1, not {segments}")
