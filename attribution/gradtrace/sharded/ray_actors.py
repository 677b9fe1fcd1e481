"""Shards that are actors of a Ray cluster (https://docs.ray.io), each on a machine with the index at the same path: on
shared storage, or in a copy."""

from __future__ import annotations

import pickle
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch

from gradtrace.child_processes import portable
from gradtrace.ray_cluster import import_ray, join
from gradtrace.sharded.server import Question, ShardOpening, ShardServer
from gradtrace.sharded.transport import Failure, ShardTransport, answered, lost, unless_failed

T = TypeVar("T")

_RESTARTS = -1  # of an actor: as often as need be
_REPEATS = 1  # of a question whose actor was lost


class RayShards(ShardTransport):
    """An actor for each shard, spread over the machines. Ray starts a lost one again, wherever there is room, and asks
    it again."""

    def __init__(self, openings: Sequence[ShardOpening], address: str) -> None:
        """address: of the cluster, as `ray.init` takes it; "local": one of this machine, started for this process

        Raises:
            MissingLibraryError: Ray is not installed.
            StoreError: there is no cluster at the address.
            Exception: what a shard raises that cannot be opened.
        """
        self._ray, self._openings = import_ray(), openings
        join(self._ray, address)
        options = {"max_restarts": _RESTARTS, "max_task_retries": _REPEATS, "scheduling_strategy": "SPREAD"}
        actor = self._ray.remote(_Actor).options(**options)
        self._actors = [actor.remote(opening) for opening in openings]
        self._finalizer = weakref.finalize(self, _kill, self._ray, self._actors)
        try:
            self.ask(dict.fromkeys(range(len(openings)), _is_open))
        except BaseException:
            self.close()
            raise

    def ask(self, questions: Mapping[int, Question[T]]) -> list[T]:
        replies = {number: self._actors[number].answer.remote(question) for number, question in questions.items()}
        answers = [self._awaited(number, reply) for number, reply in replies.items()]
        return [unless_failed(answer) for answer in answers]

    def _awaited(self, number: int, reply: Any) -> Any:
        try:
            return pickle.loads(self._ray.get(reply))
        except self._ray.exceptions.RayError as error:
            raise lost(self._openings[number], f"its actor ended, and again when asked anew ({error})") from None

    def close(self) -> None:
        self._finalizer()


class _Actor:
    """The actor. One whose rows cannot be opened answers by what is wrong: Ray would only say that it ended."""

    def __init__(self, opening: ShardOpening) -> None:
        torch.set_num_threads(opening.threads)
        try:
            self._server: ShardServer | Exception = ShardServer(opening)
        except Exception as error:
            self._server = error

    def answer(self, question: Question[Any]) -> bytes:
        """Pickled here: what Ray unpickles are arrays that cannot be written to."""
        server = self._server
        return pickle.dumps(Failure(portable(server)) if isinstance(server, Exception) else answered(server, question))


def _is_open(server: ShardServer) -> bool:
    return True


def _kill(ray: Any, actors: Sequence[Any]) -> None:
    if ray.is_initialized():
        for actor in actors:
            ray.kill(actor)
