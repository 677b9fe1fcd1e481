"""The files of the page, as they are sent: compressed, and named by their content, so that browsers may keep them."""

from __future__ import annotations

import gzip
import hashlib
import posixpath
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "page"
_PRELOADED = "<!-- the modules of the first view: one by one, each would be found only in the one that imports it -->"
# Whole lines alone: what could stand in a string or a template stays.
_COMMENT = re.compile(rb"^[ \t]*(?:/\*\*(?:[^*]|\*(?!/))*\*/|//[^\n]*)[ \t]*$", re.MULTILINE)
_IMPORTED = re.compile(
    rb'^(?:import|export|\})[^"\n]*"(\.[^"\n]+\.js)";?$', re.MULTILINE
)  # not what import() reads later
_STYLESHEET = re.compile(r'<link rel="stylesheet" href="page/([^"]+)">\n')
_STYLES = "css/page.css"  # all of them, in the document's order: each request more keeps the first picture waiting
_TYPES = {
    ".css": "text/css",
    ".html": "text/html",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
    ".txt": "text/plain",
    ".json": "application/json",
}


@dataclass(frozen=True, slots=True)
class PageFile:
    content: bytes
    compressed: bytes
    media_type: str
    etag: str


@dataclass(frozen=True, slots=True)
class PageFiles:
    """start: the document at `/`;  version: of all files together;  by_path: the files that it loads"""

    start: PageFile
    version: str
    by_path: Mapping[str, PageFile]


def read_page(folder: Path = FOLDER) -> PageFiles:
    """Every file of the page. The document loads them from page/VERSION/, whose content never changes."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix in _TYPES)
    files = {path.relative_to(folder).as_posix(): _page_file(_sent(path, folder), path.suffix) for path in paths}
    document = _with_one_stylesheet(files.pop("index.html").content.decode(), files)
    version = hashlib.sha256("".join(f"{name} {file.etag}" for name, file in files.items()).encode()).hexdigest()[:16]
    modules = sorted(_imported(files, "js/app.js") - {"js/app.js"})
    preloads = "\n".join(f'<link rel="modulepreload" href="page/{name}">' for name in modules)
    # Relative to the page, which a proxy may serve below another address.
    document = document.replace(_PRELOADED, preloads).replace('"page/', f'"page/{version}/')
    return PageFiles(_page_file(document.encode(), ".html"), version, files)


def _with_one_stylesheet(document: str, files: dict[str, PageFile]) -> str:
    """The document with one stylesheet in the place of all, which takes their place in `files` too."""
    styles = [files.pop(name).content for name in _STYLESHEET.findall(document)]
    files[_STYLES] = _page_file(b"".join(styles), ".css")
    return _STYLESHEET.sub("", document).replace("</head>", f'<link rel="stylesheet" href="page/{_STYLES}">\n</head>')


def _imported(files: Mapping[str, PageFile], module: str) -> set[str]:
    """The module, and all that it and those import."""
    imported, unread = set[str](), [module]
    while unread:
        name = unread.pop()
        imported.add(name)
        found = _IMPORTED.findall(files[name].content)
        paths = (posixpath.normpath(posixpath.join(posixpath.dirname(name), path.decode())) for path in found)
        unread += [path for path in paths if path not in imported]
    return imported


def _sent(path: Path, folder: Path) -> bytes:
    """A file, the page's own modules without their comments, a seventh of the page; lines keep their numbers."""
    content = path.read_bytes()
    if path.suffix != ".js" or not path.is_relative_to(folder / "js"):
        return content
    return _COMMENT.sub(lambda comment: b"\n" * comment[0].count(b"\n"), content)


def _page_file(content: bytes, suffix: str) -> PageFile:
    etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    return PageFile(content, gzip.compress(content, mtime=0), _TYPES[suffix], etag)
