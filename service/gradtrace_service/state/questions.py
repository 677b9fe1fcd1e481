"""Saved questions: addresses of the page, with a title. They are shared by all who use the service."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Any

from gradtrace_client.state_schemas import SavedQuestion, SavedQuestions, SavedQuestionsRequest, SaveQuestionRequest
from gradtrace_service.errors import FieldError, NoSuchQuestionError

_MOST = 10_000
_COLUMNS = "id, title, address, note, who, time"


class TooManyQuestionsError(FieldError):
    """As many are kept as may be."""

    status, kind = 409, "conflict"

    def __init__(self) -> None:
        super().__init__("title", f"{_MOST:,} questions are saved already; delete some by DELETE /questions/{{id}}")


def save(connection: sqlite3.Connection, request: SaveQuestionRequest, who: str | None) -> SavedQuestion:
    """Raises TooManyQuestionsError."""
    if _count(connection) >= _MOST:
        raise TooManyQuestionsError
    now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
    inserted = connection.execute(
        "INSERT INTO questions (title, address, note, who, time) VALUES (?, ?, ?, ?, ?)",
        (request.title, request.address, request.note, who, now),
    )
    query = f"SELECT {_COLUMNS} FROM questions WHERE id = ?"
    return _question(connection.execute(query, (inserted.lastrowid,)).fetchone())


def page(connection: sqlite3.Connection, request: SavedQuestionsRequest) -> SavedQuestions:
    query = f"SELECT {_COLUMNS} FROM questions ORDER BY id DESC LIMIT ? OFFSET ?"
    results = [_question(record) for record in connection.execute(query, (request.k, request.offset))]
    return SavedQuestions(total=_count(connection), results=results)


def delete(connection: sqlite3.Connection, question: int) -> None:
    """Raises NoSuchQuestionError."""
    if not connection.execute("DELETE FROM questions WHERE id = ?", (question,)).rowcount:
        raise NoSuchQuestionError(question)


def revision(connection: sqlite3.Connection) -> tuple[int, int]:
    """Another value whenever questions were saved or deleted."""
    (latest,) = connection.execute("SELECT coalesce(max(id), 0) FROM questions").fetchone()
    return _count(connection), latest


def _count(connection: sqlite3.Connection) -> int:
    (count,) = connection.execute("SELECT count(*) FROM questions").fetchone()
    return int(count)


def _question(record: Sequence[Any]) -> SavedQuestion:
    return SavedQuestion(**dict(zip(SavedQuestion.model_fields, record, strict=True)))
