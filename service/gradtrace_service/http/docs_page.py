"""The page at /docs, on which the API can be tried: Swagger UI, whose files the package fastapi-offline holds, so that
the page needs nothing from other servers."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files

from fastapi import APIRouter, HTTPException, Response
from fastapi.openapi.docs import get_swagger_ui_html

_TYPES = {"swagger-ui-bundle.js": "text/javascript", "swagger-ui.css": "text/css", "favicon.png": "image/png"}
PAGES = frozenset(("/docs", *(f"/docs/{name}" for name in _TYPES)))

router = APIRouter(include_in_schema=False)


def _page() -> Response:
    # Addresses relative to the page, which a proxy may serve below another one.
    script, style, icon = (f"docs/{name}" for name in _TYPES)
    page = get_swagger_ui_html(
        openapi_url="openapi.json",
        title="Gradtrace: the API",
        swagger_js_url=script,
        swagger_css_url=style,
        swagger_favicon_url=icon,
    )
    page.headers["Content-Security-Policy"] = _policy(bytes(page.body).decode())
    return page


def _policy(page: str) -> str:
    """What a browser may load for the page: files of the service, and the one script within the page, by its hash."""
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        f"default-src 'none'; connect-src 'self'; img-src 'self' data:; script-src 'self' 'sha256-{digest}'; "
        "style-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
    )


@router.get("/docs")
def docs() -> Response:
    return _page()


@router.get("/docs/{name}")
def docs_file(name: str) -> Response:
    if name not in _TYPES:
        raise HTTPException(404)
    content = (files("fastapi_offline") / "static" / name).read_bytes()
    return Response(content, media_type=_TYPES[name], headers={"Cache-Control": "public, max-age=86400"})
