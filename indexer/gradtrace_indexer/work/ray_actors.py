"""Workers that are actors of Ray (https://docs.ray.io), on as many machines as its cluster has.

An actor that is lost is started again by Ray, on whichever machine has room; a cluster that grows gets more of them.
All machines must see the index directory, the checkpoints and the data at the same paths.
"""

from __future__ import annotations

import math
import os
import time
from typing import Any

import torch

from gradtrace.errors import StoreError
from gradtrace.ray_cluster import import_ray, join
from gradtrace_indexer.work.payload import Payload
from gradtrace_indexer.work.sharing import Rank
from gradtrace_indexer.work.watching import Watch

_POLL_SECONDS = 0.5
_LOOK_SECONDS = 5.0  # between two looks at how large the cluster is
_MOST_LOSSES = 20  # of an actor


def run_in_actors(payload: Payload, address: str, count: int | None, gpu: bool, watch: Watch) -> None:
    """Have actors make the call, each with its rank, until one of them comes to its end.

    address: of the cluster, as `ray.init` takes it ("auto": the one that this machine belongs to), or "local"
    count: of actors; None: one for each CPU, or with `gpu` each GPU, also of machines that join the cluster later

    Raises:
        MissingLibraryError: Ray is not installed.
        StoreError: there is no cluster at the address.
        Exception: what a call raises.
    """
    ray = import_ray()
    is_ours = join(ray, address)
    try:
        _Actors(ray, payload, count, gpu).run(watch)
    finally:
        if is_ours:
            ray.shutdown()


class _Actors:
    def __init__(self, ray: Any, payload: Payload, count: int | None, gpu: bool) -> None:
        self._ray, self._count, self._resource = ray, count, "GPU" if gpu else "CPU"
        self._payload = ray.put(payload)
        room = {"num_gpus": 1} if gpu else {"num_cpus": 1}
        # The name of the actor's class is what Ray's dashboard shows.
        self._kind = ray.remote(max_restarts=_MOST_LOSSES, max_task_retries=_MOST_LOSSES, **room)(GradtraceWorker)
        self._actors: list[Any] = []
        self._calls: list[Any] = []

    def run(self, watch: Watch) -> None:
        looked = -math.inf
        try:
            while True:
                if time.monotonic() - looked > _LOOK_SECONDS:
                    looked = time.monotonic()
                    self._grow()
                watch.look()
                ended, self._calls = self._ray.wait(self._calls, timeout=_POLL_SECONDS)
                if any(map(self._came_to_its_end, ended)):
                    return
        finally:
            for actor in self._actors:
                self._ray.kill(actor, no_restart=True)

    def _grow(self) -> None:
        """More actors, for machines that joined the cluster."""
        room = int(self._ray.cluster_resources().get(self._resource, 0))
        for number in range(len(self._actors), self._count or max(1, room)):
            actor = self._kind.remote()
            self._actors.append(actor)
            self._calls.append(actor.work.remote(self._payload, number, self._count or max(1, room)))

    def _came_to_its_end(self, call: Any) -> bool:
        """False where the actor was lost for good, and others are left. Raises what the call raised."""
        try:
            self._ray.get(call)
            return True
        except self._ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except self._ray.exceptions.RayError as error:
            if self._calls:
                return False
            raise StoreError(
                f"all of Ray's actors were lost, each of them {_MOST_LOSSES} times and more ({error}): Ray's log says "
                "why. What is done stays, and the next run resumes"
            ) from None


class GradtraceWorker:
    """An actor: a process that keeps its models from step to step."""

    def work(self, payload: Payload, number: int, world: int) -> None:
        torch.set_num_threads(max(1, int(os.environ.get("OMP_NUM_THREADS", "1"))))
        payload.unpacked()(Rank(number, world))
