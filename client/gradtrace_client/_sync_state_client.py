# Generated from _async_state_client.py by generate_sync_client.py: edit that file and run `make client`.
# ruff: noqa: RUF100, UP028
"""The calls about what people keep in a service."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import httpx
from httpx_sse import connect_sse

from gradtrace_client._requests import request_json
from gradtrace_client._responses import Answer, Verb, checked, failed_request
from gradtrace_client.state_schemas import (
    ExportFormat,
    MarkChange,
    MarkKind,
    MarkRequest,
    MarksAnswer,
    MarksExportRequest,
    MarksRequest,
    SavedQuestion,
    SavedQuestions,
    SavedQuestionsRequest,
    SaveQuestionRequest,
    ServiceEvent,
    UndoRequest,
    UnmarkRequest,
    WhoAmI,
)


class StateClient(ABC):
    """Marks, saved questions and events. The subclass sends requests."""

    _http: httpx.Client

    @abstractmethod
    def _send(
        self, verb: Verb, path: str, schema: type[Answer], *, repeatable: bool = True, **content: Any
    ) -> Answer: ...

    @abstractmethod
    def _response(self, verb: Verb, path: str, *, repeatable: bool = True, **content: Any) -> httpx.Response: ...

    def marks(
        self,
        mark: MarkKind | None = None,
        *,
        rows: Sequence[int] | None = None,
        offset: int = 0,
        k: int = 100,
        index: str | None = None,
    ) -> MarksAnswer:
        """One page of the marks of training rows, ordered by row, and how many of each kind there are.

        Args:
            mark: Only these.
            rows: Only those of these rows.
            offset: Marks skipped before the first.
            k: Marks in the answer.
        """
        params = request_json(MarksRequest, mark=mark, rows=rows, offset=offset, k=k, index=index)
        return self._send("GET", "/marks", MarksAnswer, params=params)

    def mark(
        self,
        rows: Sequence[int],
        mark: MarkKind,
        *,
        label: float | str | None = None,
        note: str | None = None,
        expected: Mapping[int, int] | None = None,
        index: str | None = None,
    ) -> MarkChange:
        """Mark at most 2,000 training rows. ConflictError if others have changed one of `expected` since.

        Args:
            label: The label that is suggested: a number or a class name.
            expected: By row, the version of its mark that you have seen, 0 for none. Others' marks are then not
                overwritten.
        """
        versions = None if expected is None else {str(row): version for row, version in expected.items()}
        body = request_json(MarkRequest, rows=rows, mark=mark, label=label, note=note, expected=versions, index=index)
        return self._send("PUT", "/marks", MarkChange, repeatable=False, json=body)

    def unmark(
        self, rows: Sequence[int], *, expected: Mapping[int, int] | None = None, index: str | None = None
    ) -> MarkChange:
        """Take marks away. `expected` as for `mark`."""
        versions = None if expected is None else {str(row): version for row, version in expected.items()}
        body = request_json(UnmarkRequest, rows=rows, expected=versions, index=index)
        return self._send("DELETE", "/marks", MarkChange, repeatable=False, json=body)

    def undo_marks(self, change: MarkChange | int, *, index: str | None = None) -> MarkChange:
        """Give the rows of a change the marks that they had before. The answer can be undone, too.

        ConflictError if somebody has changed one of them since, NotFoundError if there is no such change.
        """
        number = change.change if isinstance(change, MarkChange) else change
        body = request_json(UndoRequest, change=number, index=index)
        return self._send("POST", "/marks/undo", MarkChange, repeatable=False, json=body)

    def export_marks(
        self, file_format: ExportFormat = "csv", *, mark: MarkKind | None = None, index: str | None = None
    ) -> bytes:
        """All marks as the bytes of a file. `rows`: text, with the number of a row in each line."""
        params = request_json(MarksExportRequest, format=file_format, mark=mark, index=index)
        response = self._response("GET", "/marks/export", params=params)
        return response.content

    def questions(self, *, offset: int = 0, k: int = 100) -> SavedQuestions:
        """One page of the saved questions, the latest first."""
        params = request_json(SavedQuestionsRequest, offset=offset, k=k)
        return self._send("GET", "/questions", SavedQuestions, params=params)

    def save_question(self, title: str, address: str, *, note: str | None = None) -> SavedQuestion:
        """Save a question for all who use the service. address: of the page, from its `?` or `#` on"""
        body = request_json(SaveQuestionRequest, title=title, address=address, note=note)
        return self._send("POST", "/questions", SavedQuestion, repeatable=False, json=body)

    def delete_question(self, question: SavedQuestion | int) -> None:
        """Delete a saved question; NotFoundError if there is none."""
        number = question if isinstance(question, int) else question.id
        self._response("DELETE", f"/questions/{number:d}", repeatable=False)

    def whoami(self) -> WhoAmI:
        """What the service knows of this client: its key's name, and what it may do."""
        return self._send("GET", "/whoami", WhoAmI)

    def events(self) -> Iterator[ServiceEvent]:
        """What changes from now on: marks, questions, jobs, generations. Ends with the service."""
        try:
            with connect_sse(self._http, "GET", "/events") as source:
                if source.response.is_error:
                    source.response.read()
                checked(source.response)
                for event in source.iter_sse():
                    yield ServiceEvent.model_validate_json(event.data)
        except httpx.RequestError as error:
            raise failed_request(error) from error
