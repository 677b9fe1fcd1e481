"""The page at `/`, for people who would rather look: files without any data, which it asks the API for."""

from __future__ import annotations

from functools import cache

from fastapi import APIRouter, HTTPException, Request, Response

from gradtrace_service.http.page_files import PageFile, PageFiles, read_page

PREFIX = "/page/"
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_ASK_EACH_TIME = "no-cache"  # whether it has changed, by its ETag
_FOREVER = "public, max-age=31536000, immutable"

router = APIRouter(include_in_schema=False)
files = cache(read_page)


@router.get("/")
async def page(request: Request) -> Response:
    return _sent(files().start, request, _ASK_EACH_TIME)


@router.get(PREFIX + "{version}/{name:path}")
async def page_file(version: str, name: str, request: Request) -> Response:
    """A file of the page. One of another version is asked for while services of two releases share an address."""
    page: PageFiles = files()
    if name not in page.by_path:
        raise HTTPException(404)
    return _sent(page.by_path[name], request, _FOREVER if version == page.version else _ASK_EACH_TIME)


def _sent(file: PageFile, request: Request, caching: str) -> Response:
    headers = {
        "Cache-Control": caching,
        "Content-Security-Policy": _POLICY,
        "ETag": file.etag,
        "Vary": "Accept-Encoding",
    }
    if file.etag in request.headers.get("If-None-Match", ""):
        return Response(status_code=304, headers=headers)
    if "gzip" in request.headers.get("Accept-Encoding", ""):
        return Response(file.compressed, headers=headers | {"Content-Encoding": "gzip"}, media_type=file.media_type)
    return Response(file.content, headers=headers, media_type=file.media_type)
