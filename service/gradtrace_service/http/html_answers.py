"""Answers as HTML documents, for those who ask for them by their Accept header."""

from __future__ import annotations

from typing import Any

from anyio import to_thread
from fastapi import Request, Response
from fastapi.responses import HTMLResponse

from gradtrace_client.schemas import InfluenceAnswer

HTML_RESPONSE: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/html": {"schema": {"type": "string"}}}, "description": "As JSON, or as one HTML document."}
}
# The document holds what the task renders, and says itself what it may load: here, that it is not of this origin.
_POLICY = "sandbox; script-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"


def wants_html(request: Request) -> bool:
    """Whether it accepts HTML and no JSON: browsers and tools accept anything."""
    accepted = {part.partition(";")[0].strip().lower() for part in request.headers.get("accept", "").split(",")}
    return "text/html" in accepted and not accepted & {"application/json", "*/*"}


async def html_answer(answer: InfluenceAnswer, headers: Response) -> HTMLResponse:
    """The answer as a document, made beside the event loop. headers: those that the route has set"""
    response = HTMLResponse(await to_thread.run_sync(answer.to_html), headers=dict(headers.headers))
    response.headers["Content-Security-Policy"] = _POLICY
    response.headers["Content-Disposition"] = 'attachment; filename="gradtrace-answer.html"'
    return response
