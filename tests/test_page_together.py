"""The page where things go on around it: two people at once, a service that is killed, a proxy with a prefix."""

from __future__ import annotations

import re
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from conftest import DigitsRun, program, wait_until
from gradtrace_client import Client
from gradtrace_service.app import create_service
from gradtrace_service.http.api_keys import Scope, add_key
from gradtrace_service.indexes.hosted import Hosted
from gradtrace_service.server import serving
from gradtrace_service.settings import Settings
from page_browser import Visit

pytestmark = pytest.mark.everyday

PUMP_MS = 50  # in which Playwright hears what the browser says


def first_rows(visit: Visit, count: int) -> list[int]:
    buttons = visit.page.get_by_role("list", name="Rows to look at").get_by_role("button")
    buttons.nth(count - 1).wait_for()
    names = [buttons.nth(at).get_attribute("aria-label") or "" for at in range(count)]
    return [int(re.findall(r"^row ([\d,]+)", name)[0].replace(",", "")) for name in names]


def is_shown(visit: Visit, row: int, words: str) -> None:
    visit.page.get_by_label(re.compile(f"^row {row:,}, .*{words}")).wait_for()


def sign_in(visit: Visit, key: str) -> None:
    visit.page.get_by_label("API key").fill(key)
    visit.page.get_by_role("button", name="Sign in").click()


def test_two_people_mark_at_once(digits_index: DigitsRun, tmp_path: Path, shown: Callable[..., Visit]) -> None:
    keys = {name: add_key(tmp_path / "keys", name, [Scope.query]) for name in ("anna", "ben")}
    settings = Settings(processes=0, state=tmp_path / "state.sqlite", api_key_file=tmp_path / "keys")
    hosted = Hosted("digits", digits_index.index, digits_index.task)
    with serving(create_service([hosted], settings)) as url, Client(url, api_key=keys["anna"]) as client:
        anna, ben = (shown(url, "#/clean") for _ in keys)
        for visit, key in zip((anna, ben), keys.values(), strict=True):
            sign_in(visit, key)
        rows = first_rows(anna, 13)
        assert first_rows(ben, 13) == rows
        ben.page.get_by_role("list", name="Rows to look at").get_by_role("button").nth(6).click()
        for _ in range(6):
            anna.page.keyboard.press("w")
            ben.page.keyboard.press("r")
        expected = {row: ("anna", "wrong") if at < 6 else ("ben", "right") for at, row in enumerate(rows[:12])}
        for row, (who, kind) in expected.items():
            for visit in (anna, ben):
                is_shown(visit, row, f"marked {kind}.* · {who}")
        assert {mark.row: (mark.who, mark.mark) for mark in client.marks().results} == expected

        held: list[Any] = []  # what ben sends, on its way while anna marks the same row
        ben.page.route("**/marks", lambda route: held.append(route))
        ben.page.keyboard.press("x")
        while not held:
            ben.page.wait_for_timeout(PUMP_MS)
        anna.page.get_by_role("list", name="Rows to look at").get_by_role("button").nth(12).click()
        anna.page.keyboard.press("w")
        is_shown(anna, rows[12], "marked wrong.* · anna")
        held[0].continue_()
        ben.page.get_by_role("alert").get_by_text("anna has set this to wrong").wait_for()
        ben.page.get_by_role("button", name="Keep theirs").click()
        ben.page.get_by_role("alert").wait_for(state="detached")
        marks = {mark.row: (mark.who, mark.mark) for mark in client.marks().results}
        assert marks == expected | {rows[12]: ("anna", "wrong")}


def answers(address: str) -> bool:
    try:
        return httpx.get(address, timeout=60).status_code == 200
    except httpx.TransportError:
        return False


def acknowledged(visit: Visit) -> list[int]:
    """The rows of marks that the service has said are kept, as they come."""
    rows = list[int]()

    def hear(response: Any) -> None:
        if response.request.method == "PUT" and response.status == 200:
            rows.extend(response.request.post_data_json["rows"])

    visit.page.on("response", hear)
    return rows


def test_a_killed_service_loses_no_acknowledged_mark_and_the_page_goes_on(
    digits_index: DigitsRun, tmp_path: Path, shown: Callable[..., Visit]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url, state = f"http://127.0.0.1:{port}", str(tmp_path / "state.sqlite")
    words = ["-m", "gradtrace_service", "serve", str(digits_index.index), "--task", digits_index.task]
    words += ["--port", str(port), "--state", state, "--processes", "0"]
    with program(*words, stderr=subprocess.DEVNULL) as process:
        wait_until(lambda: answers(f"{url}/readyz"))
        visit = shown(url, "#/clean")
        kept = acknowledged(visit)
        first_rows(visit, 30)
        while len(kept) < 5:
            visit.page.keyboard.press("w")
            visit.page.wait_for_timeout(PUMP_MS)
        process.kill()
    visit.page.locator(".banner", has_text="It may be restarting").wait_for()
    visit.page.keyboard.press("w")
    visit.page.get_by_text("Not kept: The service cannot be reached").first.wait_for()
    before = [*kept]
    with program(*words, stderr=subprocess.DEVNULL) as process, Client(url) as client:
        wait_until(lambda: answers(f"{url}/readyz"))
        visit.page.get_by_text("The service was restarted.").wait_for()
        visit.page.locator(".banner").wait_for(state="detached")
        assert set(before) <= {mark.row for mark in client.marks("wrong").results}
        for row in before:
            is_shown(visit, row, "marked wrong")
        while len(kept) == len(before):
            visit.page.keyboard.press("r")
            visit.page.wait_for_timeout(PUMP_MS)
        is_shown(visit, kept[-1], "marked right")
        assert kept[-1] in {mark.row for mark in client.marks("right").results}
        process.kill()


PREFIX = "/team/tools"
PLACES = {
    "ask": "What should be explained?",
    "answer?query=1": "uery row 1",
    "compare": "Compare two answers",
    "overview": "Overview",
    "operate": "Operate",
    "clean": "Clean the training set",
}


class Below:
    """As a proxy does: takes the prefix away, and knows no other address."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            path = scope["path"]
            scope = scope | {"path": path.removeprefix(PREFIX) if path.startswith(PREFIX) else "/outside"}
        await self._app(scope, receive, send)


def test_every_view_works_below_the_prefix_of_a_proxy(
    digits_index: DigitsRun, tmp_path: Path, shown: Callable[..., Visit]
) -> None:
    settings = Settings(processes=0, state=tmp_path / "state.sqlite")
    app = create_service([Hosted("digits", digits_index.index, digits_index.task)], settings)
    app.add_middleware(Below)
    with serving(app) as url:
        wait_until(lambda: answers(f"{url}{PREFIX}/readyz"))
        visit = shown(f"{url}{PREFIX}", "#/ask")
        addresses, failed = list[str](), list[str]()
        visit.page.on("request", lambda request: addresses.append(request.url))
        visit.page.on("response", lambda answer: failed.append(answer.url) if answer.status >= 400 else None)
        for place, heading in PLACES.items():
            visit.go(f"#/{place}")
            visit.page.get_by_role("heading", level=1, name=heading).wait_for()
            visit.page.locator(".skeleton").first.wait_for(state="detached")
        (row,) = first_rows(visit, 1)
        visit.page.keyboard.press("x")
        is_shown(visit, row, "marked remove")
        visit.page.get_by_role("link", name=re.compile("Act on the marks")).click()
        with visit.page.expect_download() as download:
            visit.page.get_by_role("button", name="Row numbers").click()
        assert Path(download.value.path()).read_text().split() == [str(row)]
        assert [address for address in addresses if not address.startswith((f"{url}{PREFIX}/", "data:", "blob:"))] == []
        assert any(address.endswith("/events") for address in addresses)
        assert failed == []
