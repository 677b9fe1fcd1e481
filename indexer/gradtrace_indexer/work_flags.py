"""The flags of commands that say who does the work."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pydantic import BaseModel, Field

from gradtrace.errors import StoreError
from gradtrace.task import Task
from gradtrace_indexer.build.builder import PassOptions, WorkOptions
from gradtrace_indexer.flags import with_flags
from gradtrace_indexer.work.sharing import rank_of


class _WorkFlags(BaseModel):
    workers: int | None = Field(
        None, description="Processes of this machine that share the work; with --ray, actors. Default: this process."
    )
    ray: str | None = Field(
        None, description="Have actors of a Ray cluster do it: auto, an address, or local for this machine alone."
    )
    rank: str | None = Field(
        None,
        description="This process is worker N of --world, which a scheduler starts; env: as Slurm, Kubernetes or "
        "torchrun say.",
    )
    world: int | None = Field(None, description="With --rank: how many workers there are about.")


def with_work_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Give a Typer command, in place of its **flags, those that `work_options` takes."""
    return with_flags(_WorkFlags, _WorkFlags.model_fields, panel="Sharing the work: docs/scaling.md")(command)


def work_options(flags: Mapping[str, Any], passes: PassOptions, load: Callable[[], Task]) -> WorkOptions:
    """
    Raises:
        StoreError: flags that do not go together.
    """
    workers, ray, rank, world = (flags.get(name) for name in _WorkFlags.model_fields)
    if rank is None and world is not None:
        raise StoreError("--world goes with --rank")
    ranked = None if rank is None else rank_of(rank, world)
    return WorkOptions(**passes, workers=workers, ray=ray, rank=ranked, load=load)


def without_work_flags(flags: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in flags.items() if name not in _WorkFlags.model_fields}
