"""The page's files: complete, unchanged copies of libraries, small, and served so that a browser loads nothing else."""

from __future__ import annotations

import gzip
import hashlib
import json
import re

import httpx
import pytest

from gradtrace_service.http.page_files import FOLDER, read_page

VENDOR = FOLDER / "vendor"
MOST_BYTES = 400_000  # of all that a browser loads, not compressed: licences are not among it
FILES = sorted(path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*") if path.suffix in (".js", ".css"))

pytestmark = pytest.mark.unit


def test_vendored_files_are_those_of_the_list() -> None:
    lines = [line.split("  ") for line in (VENDOR / "SHA256SUMS").read_text().splitlines()]
    expected = {name: digest for digest, name in lines}
    files = (path for path in VENDOR.rglob("*") if path.is_file() and path.name != "SHA256SUMS")
    assert {
        path.relative_to(VENDOR).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    } == expected


def test_vendored_libraries_are_of_the_locked_versions_and_have_their_licences() -> None:
    tools = FOLDER.parents[1] / "page_tools"
    if not tools.is_dir():
        pytest.skip("the tools of the page are only in a checkout")
    locked = json.loads((tools / "package-lock.json").read_text())["packages"]
    assert not any("resolved" in entry for entry in locked.values())  # the address of somebody's registry
    for name, entry in json.loads((VENDOR / "VERSIONS.json").read_text()).items():
        assert locked[f"node_modules/{name}"]["version"] == entry["version"]
        assert (VENDOR / "licenses" / f"{name.replace('@', '').replace('/', '-')}.txt").stat().st_size > 500


def test_the_page_is_small() -> None:
    """Without licences and lists, which no browser loads."""
    page = read_page()
    loaded = [file for file in page.by_path.values() if file.media_type not in ("text/plain", "application/json")]
    assert sum(len(file.content) for file in (page.start, *loaded)) < MOST_BYTES


@pytest.mark.parametrize("name", FILES)
def test_no_file_names_another_server_or_makes_markup_of_text(name: str) -> None:
    text = (FOLDER / name).read_text()
    if not name.startswith("vendor/"):
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text)
        assert "://" not in text.replace("http://www.w3.org/", "")
    for module in re.findall(r"""\b(?:from|import)\s*["']([^"'\s]+)["']""", text):
        assert module.startswith(".")
        assert ((FOLDER / name).parent / module).resolve().is_file()


def test_modules_are_sent_without_their_comments_on_the_same_lines() -> None:
    for name, file in read_page().by_path.items():
        if name == "css/page.css":
            continue
        source = (FOLDER / name).read_bytes()
        if not name.startswith("js/"):
            assert file.content == source
            continue
        lines = source.decode().split("\n")
        sent = file.content.decode().split("\n")
        assert len(sent) == len(lines)
        for line, left in zip(lines, sent, strict=True):
            assert left in (line, "")
            assert left or not line or line.lstrip().startswith(("//", "/**", "*"))


def test_every_module_of_the_first_views_is_loaded_in_the_first_round() -> None:
    """One that is not named in the document would only be asked for once the one that imports it is there. Ask is the
    first view; each module more keeps its pictures waiting."""
    document = read_page().start.content.decode()
    named = set(
        re.findall(r'<(?:link rel="modulepreload" href|script type="module" src)="page/[0-9a-f]+/([^"]+)"', document)
    )
    wanted, unread = set[str](), ["js/app.js"]
    while unread:
        wanted.add(name := unread.pop())
        file = FOLDER / name
        for path in re.findall(r'\b(?:from|import)\s+"([^"]+)"', file.read_text()):  # not import()
            imported = (file.parent / path).resolve()
            if imported.is_file() and (relative := imported.relative_to(FOLDER).as_posix()) not in wanted:
                unread.append(relative)
    assert named == wanted
    assert "js/views/ask.js" in named
    assert {"js/views/answer.js", "js/views/ask/own.js", "js/views/clean.js", "vendor/uplot.js"}.isdisjoint(named)


def test_stylesheets_are_sent_as_one_in_the_documents_order() -> None:
    names = re.findall(r'rel="stylesheet" href="page/([^"]+)"', (FOLDER / "index.html").read_text())
    assert sorted(names) == [name for name in FILES if name.endswith(".css")]
    page = read_page()
    sent = re.findall(r'rel="stylesheet" href="page/[0-9a-f]+/([^"]+)"', page.start.content.decode())
    assert sent == ["css/page.css"]
    assert page.by_path["css/page.css"].content.decode() == "".join((FOLDER / name).read_text() for name in names)


def test_the_page_loads_only_files_of_the_service_below_its_address(url: str) -> None:
    answer = httpx.get(url)
    policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert not re.search(r"<script>|<style|\sstyle=|\son\w+=", answer.text)
    addresses = re.findall(r'(?:src|href)="([^"]+)"', answer.text)
    assert len(addresses) > 20
    for address in addresses:
        assert not address.startswith(("/", "http"))
        file = httpx.get(f"{url}/{address}")
        assert file.status_code == 200
        if address != "docs":
            assert file.headers["cache-control"] == "public, max-age=31536000, immutable"


def test_files_are_compressed_and_not_sent_again(url: str) -> None:
    page = read_page()
    address = f"{url}/page/{page.version}/js/app.js"
    with httpx.stream("GET", address, headers={"Accept-Encoding": "gzip"}) as answer:
        assert answer.headers["content-encoding"] == "gzip"
        assert gzip.decompress(b"".join(answer.iter_raw())) == page.by_path["js/app.js"].content
    plain = httpx.get(address, headers={"Accept-Encoding": "identity"})
    assert plain.content == page.by_path["js/app.js"].content
    unchanged = httpx.get(address, headers={"If-None-Match": plain.headers["etag"]})
    assert (unchanged.status_code, unchanged.content) == (304, b"")


def test_a_file_of_another_version_is_asked_for_again(url: str) -> None:
    answer = httpx.get(f"{url}/page/{'0' * 16}/js/app.js")
    assert (answer.status_code, answer.headers["cache-control"]) == (200, "no-cache")


@pytest.mark.parametrize("name", ["nothing.js", "../page_routes.py", "..%2f..%2fapp.py", "index.html", ""])
def test_other_names_are_not_there(url: str, name: str) -> None:
    answer = httpx.get(f"{url}/page/{read_page().version}/{name}")
    assert answer.status_code == 404
