"""Being one of several workers of a build or an update: one of them coordinates it, the others take steps.

The coordinator is whichever worker holds the lock of the index's only writer. Where it ends before the work is done,
another takes its place and resumes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TypeVar, cast

import torch

from gradtrace.devices import pick_device
from gradtrace.errors import LockedIndexError, StoreError
from gradtrace.store.manifest import Manifest
from gradtrace.task import Task
from gradtrace_indexer.build.begin import DRAFT, Draft, steps_of_draft
from gradtrace_indexer.build.builder import Builder, PassOptions, WorkOptions
from gradtrace_indexer.build.completion import Completion
from gradtrace_indexer.generations import read_pending
from gradtrace_indexer.progress import progress_bar
from gradtrace_indexer.work.board import Board, Step, unfinished_generations
from gradtrace_indexer.work.payload import payload
from gradtrace_indexer.work.processes import run_in_processes
from gradtrace_indexer.work.ray_actors import run_in_actors
from gradtrace_indexer.work.sharing import Rank
from gradtrace_indexer.work.watching import Watch
from gradtrace_indexer.writing.files import sole_writer

_POLL_SECONDS = 0.5

T = TypeVar("T")
Run = Callable[[Task, PassOptions], T]  # the whole of a build or an update, by its only writer


def run_shared(task: Task, directory: Path, passes: WorkOptions, run: Run[T]) -> T | None:
    """Run a build or an update, alone or with others, as `passes` say. None where other processes did it all.

    Raises what `run` raises, and StoreError: worker processes cannot be started, or are killed again and again.
    """
    workers, ray, load = passes.get("workers"), passes.get("ray"), passes.get("load")
    alone = _without_workers(passes)
    if passes.get("rank") is not None:
        if ray is not None or workers is not None:
            raise StoreError("a rank is of a process that a scheduler starts: leave workers and ray out")
        return _take_part(task, directory, alone, run)
    if ray is None and workers in (None, 1):
        return run(task, alone)
    if workers is not None and workers < 1:
        raise StoreError(f"workers must be at least 1, not {workers}")
    threads = None if ray is not None else max(1, torch.get_num_threads() // (workers or 1))
    call = payload(partial(_work, load or partial(_sent, task), directory, alone, run, threads))
    with closing(Watch(directory, passes.get("progress", True))) as watch:
        if ray is None:
            run_in_processes(call, workers or 1, watch)
        else:
            is_gpu = torch.device(pick_device(passes.get("device", "auto"))).type == "cuda"
            run_in_actors(call, ray, workers, is_gpu, watch)
    return None


def _without_workers(passes: WorkOptions) -> PassOptions:
    return cast(PassOptions, {key: value for key, value in passes.items() if key not in ("workers", "ray", "load")})


def _sent(task: Task) -> Task:
    return task


def _work(
    load: Callable[[], Task],
    directory: Path,
    passes: PassOptions,
    run: Run[object],
    threads: int | None,
    rank: Rank,
) -> None:
    """A worker process, from its beginning to its end."""
    if threads is not None:
        torch.set_num_threads(threads)
    worker: PassOptions = {**passes, "rank": rank, "progress": False}
    _take_part(load(), directory, worker, run)


def _take_part(task: Task, directory: Path, passes: PassOptions, run: Run[T]) -> T:
    """`run`, as soon as no other process is the only writer of the index; until then, take steps of its work."""
    helper: Helper | None = None
    while True:
        try:
            with sole_writer(directory):  # before all is read that a run takes
                pass
            return run(task, passes)
        except LockedIndexError:
            helper = helper or Helper(task, directory, passes)
            helper.help_out()
            time.sleep(_POLL_SECONDS)


class Helper:
    """Takes steps of the work that another process coordinates."""

    def __init__(self, task: Task, directory: Path, passes: PassOptions) -> None:
        self._directory = directory
        self._builder = Builder(task, directory, **passes)
        self._known: tuple[str, Board, list[Step]] | None = None  # what was done last, and by which document
        self._left = True  # whether steps of it are

    def help_out(self) -> None:
        """Take steps of the unfinished generation until none is left to do, or nobody coordinates it."""
        for generation in unfinished_generations(self._directory):
            board = self._builder.board(generation)
            try:
                self._take_steps(board)
            except Exception:
                if board.is_coordinated:
                    raise  # else its files may have been removed, as those of a generation that is published

    def _take_steps(self, board: Board) -> None:
        plan = board.plan()
        if plan is None or not board.is_coordinated:
            return
        self._builder.follow(plan)
        pending, draft = read_pending(self._directory), board.read(DRAFT, Draft)
        if pending is not None and pending.generation == board.generation:
            self._work_off(pending.checksum, board, partial(self._steps_to_complete, pending))
        elif draft is not None:
            self._work_off(draft.model_dump_json(), board, partial(steps_of_draft, self._builder, draft=draft))

    def _steps_to_complete(self, pending: Manifest, board: Board) -> list[Step]:
        self._builder.check(pending, grown=pending.made_by == "append rows")
        return Completion(self._builder, pending, board).steps()

    def _work_off(self, document: str, board: Board, steps_of: Callable[[Board], list[Step]]) -> None:
        if self._known is None or self._known[0] != document:
            self._known, self._left = (document, board, steps_of(board)), True
        _, board, steps = self._known
        if not self._left:  # what comes next is the coordinator's
            return
        with progress_bar("index", sum(step.units for step in steps), " rows", self._builder.progress) as bar:
            board.work_off(steps, bar, until=lambda: not board.is_coordinated)
        self._left = any(board.record(step.name) is None for step in steps)
