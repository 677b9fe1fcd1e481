"""The engine, for routes about an index."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from gradtrace_service.answers.passes import A, Pass, Q, joined, outdated, passes_of
from gradtrace_service.engine.engine import Engine
from gradtrace_service.engine.work import Work
from gradtrace_service.errors import FieldError
from gradtrace_service.ops.timings import server_timing, trace_stages

T = TypeVar("T")
B = TypeVar("B")


class _Choice(BaseModel):
    """A model, because it refuses unknown parameters: a misspelt one would be ignored, and the first index asked."""

    model_config = ConfigDict(extra="forbid")

    index: str | None = Field(None, max_length=64, description="Which of the service's indexes. Default: the first.")


Choice = Annotated[_Choice, Query()]


class TimedEngine:
    """The engine, for routes: puts the times of an answer into its headers and its trace."""

    def __init__(self, request: Request, response: Response) -> None:
        self._state, self._headers = request.app.state, response.headers
        self._client: str = request.state.caller

    async def run(self, work: Work[T]) -> T:
        """As `Engine.run`. Raises FieldError, too, where no index has the name: made-up names do not wait."""
        return self._timed(await self._engine.run(self._addressed(work)))

    async def run_in_passes(self, request: Q, work: Callable[[Q], Work[A]]) -> A:
        """As `run`, for a request of many queries, which is accepted, and counts, once. work: of each pass"""
        passes = passes_of(request, self._engine.settings.batch_size)
        works = [self._addressed(work(part.request)) for part in passes]
        with self._engine.accept(works[0]) as accepted:
            answers = [await _named(accepted.answer(work), part) for work, part in zip(works, passes, strict=True)]
            while behind := outdated(answers):  # a new generation was taken up in between
                for at in behind:
                    answers[at] = await _named(accepted.answer(works[at]), passes[at])
        return self._timed(joined(answers))

    async def run_both(self, first: Work[T], second: Callable[[T], Work[B]]) -> B:
        """As `run`, for a request of two works that may be of two indexes: the second is made of the first's answer.
        It is accepted, and counts, once."""
        addressed = self._addressed(first)
        with self._engine.accept(addressed) as accepted:
            return self._timed(await accepted.answer(self._addressed(second(await accepted.answer(addressed)))))

    def go_on(self, work: Work[bool]) -> None:
        """As `Background.go_on`."""
        self._state.background.go_on(replace(work, index=self._state.index_name(work.index), internal=True))

    @property
    def _engine(self) -> Engine:
        engine: Engine = self._state.engine
        return engine

    def _addressed(self, work: Work[T]) -> Work[T]:
        return replace(work, index=self._state.index_name(work.index), client=self._client)

    def _timed(self, answer: T) -> T:
        timing = getattr(answer, "timing_ms", None)
        if timing is not None:
            self._headers["Server-Timing"] = server_timing(timing)
            if self._state.tracer_provider is not None:
                trace_stages(self._state.tracer_provider, timing)
        return answer


async def _named(answer: Awaitable[A], part: Pass[Any]) -> A:
    try:
        return await answer
    except FieldError as refusal:
        raise part.named(refusal) from None


async def _timed_engine(request: Request, response: Response) -> TimedEngine:
    return TimedEngine(request, response)  # the class by itself would be called on a thread, for each request


Workers = Annotated[TimedEngine, Depends(_timed_engine)]
