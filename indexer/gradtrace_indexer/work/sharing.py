"""How the work of a build or an update is shared."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import NamedTuple

from gradtrace.errors import StoreError

# The number of a worker and how many there are, as schedulers and launchers name them in the environment.
_VARIABLES = {
    "torchrun": ("RANK", "WORLD_SIZE"),
    "a Slurm job array": ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT"),
    "srun": ("SLURM_PROCID", "SLURM_NTASKS"),
    "a Kubernetes Indexed Job": ("JOB_COMPLETION_INDEX", "JOB_COMPLETIONS"),
}


class Rank(NamedTuple):
    """Of one of the workers that share the work: its number from 0, and how many there are about.

    The numbers only say with which steps each begins: workers may come, go and be started again, and any of them alone
    does all of the work.
    """

    number: int
    world: int


def rank_of(number: str, world: int | None, environment: Mapping[str, str] = os.environ) -> Rank:
    """A worker's rank as the command line names it: its number, or "env" for what the scheduler says.

    Raises:
        StoreError: neither, or the scheduler says nothing.
    """
    if number == "env":
        return _scheduled(world, environment)
    if not number.isdecimal() or world is None or int(number) >= world:
        raise StoreError(f"--rank {number}: give --rank 0 to N-1 with --world N, or --rank env")
    return Rank(int(number), world)


def _scheduled(world: int | None, environment: Mapping[str, str]) -> Rank:
    for number_name, world_name in _VARIABLES.values():
        number, count = environment.get(number_name, ""), world or environment.get(world_name, "")
        if number.isdecimal() and str(count).isdecimal():
            return Rank(int(number) % int(count), int(count))  # a job array may begin at another number than 0
    names = "; ".join(f"{number} and {count} ({kind})" for kind, (number, count) in _VARIABLES.items())
    raise StoreError(f"--rank env: the environment has none of {names}. Give --rank N --world M instead")
