"""Marks of training rows and saved questions, over HTTP."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Annotated

from fastapi import APIRouter, Path, Query, Response
from fastapi.responses import StreamingResponse

from gradtrace_client.state_schemas import (
    Mark,
    MarkChange,
    MarkRequest,
    MarksAnswer,
    MarksConflict,
    MarksExportRequest,
    MarksRequest,
    SavedQuestion,
    SavedQuestions,
    SavedQuestionsRequest,
    SaveQuestionRequest,
    UndoRequest,
    UnmarkRequest,
)
from gradtrace_service.answers.labels import named_label
from gradtrace_service.engine.work import Work
from gradtrace_service.http.json_bodies import JsonRoute
from gradtrace_service.http.keeping import Keeping, Kept
from gradtrace_service.http.problems import error_responses
from gradtrace_service.http.timed_engine import Workers
from gradtrace_service.state import marks, questions
from gradtrace_service.state.data_sets import TrainingRows
from gradtrace_service.state.exports import Export, export

_PIECE = 5_000  # marks of an export that are read at a time
_READING = (422, 429, 500, 503)
_WRITING = (400, 408, 413, 422, 429, 500, 503, 507)

router = APIRouter(route_class=JsonRoute)


@router.get("/marks", responses=error_responses(*_READING))
async def list_marks(request: Annotated[MarksRequest, Query()], kept: Kept) -> MarksAnswer:
    """What people think of training rows of this index's data set."""
    return await kept.read(marks.page, await kept.rows(request.index), request)


@router.put("/marks", responses=error_responses(*_WRITING, 504) | error_responses(409, model=MarksConflict))
async def mark(request: MarkRequest, kept: Kept, engine: Workers) -> MarkChange:
    """Mark training rows, all of them or, where a mark is not as the caller expects it, none."""
    label = None
    if request.label is not None:
        label = await engine.run(Work(request.index, named_label, request.label))
    return await kept.write(marks.mark, await kept.rows(request.index), request, kept.who, label)


@router.delete("/marks", responses=error_responses(*_WRITING) | error_responses(409, model=MarksConflict))
async def unmark(request: UnmarkRequest, kept: Kept) -> MarkChange:
    """Take marks away."""
    return await kept.write(marks.unmark, await kept.rows(request.index), request, kept.who)


@router.post("/marks/undo", responses=error_responses(404, *_WRITING) | error_responses(409, model=MarksConflict))
async def undo(request: UndoRequest, kept: Kept) -> MarkChange:
    """Give the rows of a change the marks that they had before, unless somebody has changed one of them since."""
    return await kept.write(marks.undo, await kept.rows(request.index), request, kept.who)


@router.get(
    "/marks/export",
    response_class=Response,
    responses=error_responses(*_READING)
    | {200: {"content": {"text/csv": {}, "text/plain": {}, "application/vnd.apache.parquet": {}}}},
)
async def export_marks(request: Annotated[MarksExportRequest, Query()], kept: Kept) -> Response:
    """All marks as a file, ordered by row."""
    rows = await kept.rows(request.index)
    first = await kept.read(marks.after_row, rows, request.mark, -1, _PIECE)  # here, so that a failure has a status
    file = export(request.format)
    headers = {"Content-Disposition": f'attachment; filename="marks.{file.suffix}"'}
    return StreamingResponse(_pieces(kept, request, rows, first, file), 200, headers, file.media_type)


async def _pieces(
    kept: Keeping, request: MarksExportRequest, rows: TrainingRows, piece: Sequence[Mark], file: Export
) -> AsyncIterator[bytes]:
    while piece:
        yield await kept.beside(file.piece, piece)
        piece = await kept.read(marks.after_row, rows, request.mark, piece[-1].row, _PIECE)
    yield await kept.beside(file.end)


@router.get("/questions", responses=error_responses(*_READING))
async def list_questions(request: Annotated[SavedQuestionsRequest, Query()], kept: Kept) -> SavedQuestions:
    """Questions that people saved, the latest first."""
    return await kept.read(questions.page, request)


@router.post("/questions", status_code=201, responses=error_responses(409, *_WRITING))
async def save_question(request: SaveQuestionRequest, kept: Kept) -> SavedQuestion:
    """Save a question, for all who use the service."""
    return await kept.write(questions.save, request, kept.who)


@router.delete("/questions/{question}", status_code=204, responses=error_responses(404, 422, 429, 500, 503, 507))
async def delete_question(question: Annotated[int, Path(ge=0, lt=2**53)], kept: Kept) -> None:
    """Delete a saved question."""
    await kept.write(questions.delete, question)
