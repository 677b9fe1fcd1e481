"""How questions reach the shards, and what their failures become on the way."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from gradtrace.child_processes import portable
from gradtrace.errors import ShardLostError
from gradtrace.sharded.server import Question, ShardOpening, ShardServer

T = TypeVar("T")


class ShardTransport(ABC):
    """The shards of an open index, by number. One thread at a time may ask."""

    @abstractmethod
    def ask(self, questions: Mapping[int, Question[T]]) -> list[T]:
        """Ask some of the shards, all at once. Their answers, in the order of the questions.

        A shard that is lost meanwhile is opened again, and asked again: once.

        Raises:
            ShardLostError: it was lost again, or could not be opened.
            Exception: what a shard raised.
        """

    @abstractmethod
    def close(self) -> None:
        """End the shards; they answer nothing any more."""


@dataclass(frozen=True)
class Failure:
    """What a shard raised, in place of its answer."""

    error: Exception


def answered(server: ShardServer, question: Question[Any]) -> Any:
    """Its answer, or the Failure."""
    try:
        return question(server)
    except Exception as error:
        return Failure(portable(error))


def unless_failed(reply: Any) -> Any:
    """Raises what the shard raised."""
    if isinstance(reply, Failure):
        raise reply.error
    return reply


def lost(opening: ShardOpening, cause: str) -> ShardLostError:
    return ShardLostError(
        f"the shard with {opening} is lost: {cause}. No part of the answer is given without it; ask again later, and "
        "look at the memory and the log of the machine that it runs on"
    )
