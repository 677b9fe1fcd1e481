"""A real browser for tests of the page, driven by Playwright. Tests that use it are skipped where there is none."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from gradtrace_client import Client

WAIT_MS = 120_000  # generous: machines differ
NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]


@contextmanager
def started() -> Iterator[Any]:
    """A browser. Skips the test, with the reason, where Playwright or a browser is missing."""
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is installed")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=FLAGS)
        yield browser
        browser.close()


class Visit:
    """A new window at an address, which collects what the browser complains about."""

    def __init__(self, browser: Any, url: str, place: str = "", **options: Any) -> None:
        context = browser.new_context(viewport={"width": 1280, "height": 900}, reduced_motion="reduce", **options)
        self.url, self.page, self.complaints = url, context.new_page(), list[str]()
        self.page.set_default_timeout(WAIT_MS)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", self._heard)
        self.go(place)

    def _heard(self, message: Any) -> None:
        if message.type == "error" and "Failed to load resource" not in message.text:
            self.complaints.append(message.text)

    def go(self, place: str) -> None:
        self.page.goto(f"{self.url}/{place}")

    def rows(self, end: str) -> list[int]:
        """The rows of the cards of an end of the answer, once they are those of what was asked last."""
        self.page.locator('.answer > [aria-busy="false"]').wait_for()
        cards = self.page.get_by_role("region", name=end, exact=True).get_by_role("article")
        cards.first.wait_for()
        return [int(name.rpartition(" ")[2]) for name in names_of(cards)]

    def compared_rows(self, side: str) -> list[int]:
        """The rows of the hits of a region of Compare or Overview, once they are there."""
        hits = self.page.get_by_role("region", name=re.compile(side)).get_by_role("article")
        hits.first.wait_for()
        return [int(name.removeprefix("row ")) for name in names_of(hits)]

    def listed_rows(self, least: int = 1) -> list[int]:
        """The rows to look at in Clean, as far as they are drawn, once there are so many."""
        buttons = self.page.get_by_role("list", name="Rows to look at").get_by_role("button")
        buttons.nth(least - 1).wait_for()
        named = [re.findall(r"^row (\d+(?:,\d{3})*)", name)[0] for name in names_of(buttons)]
        return [int(row.replace(",", "")) for row in named]

    def press(self, *keys: str) -> None:
        for key in keys:
            self.page.keyboard.press(key)

    def violations(self) -> list[str]:
        """What axe-core finds wrong for people who cannot see or cannot use a mouse."""
        axe = pytest.importorskip("axe_playwright_python", reason="axe is not installed")
        if not self.page.evaluate("Boolean(globalThis.axe)"):
            self.page.evaluate(next(Path(axe.__file__).parent.rglob("axe.min.js")).read_text())
        found = self.page.evaluate("axe.run({resultTypes: ['violations']})")["violations"]  # others are not described
        return [f"{rule['id']}: {node['html']}" for rule in found for node in rule["nodes"]]

    def violations_of(self, views: Mapping[str, str]) -> dict[str, list[str]]:
        """By place. views: by place, a selector of what comes last there"""
        violations = {}
        for place, last in views.items():
            self.look_at(place, last)
            violations[place] = self.violations()
        return {place: wrong for place, wrong in violations.items() if wrong}

    def look_at(self, place: str, last: str) -> None:
        """Goes there, and waits until it is complete. last: a selector of what comes last there"""
        self.go(f"#/{place}")
        self.page.locator(last).first.wait_for()
        self.page.wait_for_load_state("networkidle")
        self.page.locator(".skeleton").first.wait_for(state="detached")


def names_of(elements: Any) -> list[str]:
    """What a screen reader calls them, all at the same moment."""
    return [str(name) for name in elements.evaluate_all("found => found.map(element => element.ariaLabel)")]


def number(text: str) -> float:
    """As the page writes it: +1,234.5 or 1.2e-7, with a minus sign of its own."""
    return float(text.replace("\N{MINUS SIGN}", "-").replace(",", ""))


def told(client: Client, end: str, **request: Any) -> list[int]:
    """Rows of an end, of near-duplicates the highest alone: the others are folded into its card."""
    (result,) = client.influence(**request, include=["clusters"]).results
    return [hit.row for hit in getattr(result, end) if hit.cluster == hit.row]


def kinds(client: Client) -> dict[int, str]:
    """The marks of Clean by row."""
    return {mark.row: mark.mark for mark in client.marks().results}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with started() as browser:
        yield browser


@pytest.fixture
def shown(browser: Any) -> Iterator[Callable[..., Visit]]:
    """Opens windows, each of a person of its own. Afterwards, no browser must have had anything to complain about."""
    with ExitStack() as windows:
        visits: list[Visit] = []

        def shown(url: str, place: str, **options: Any) -> Visit:
            visits.append(visit := Visit(browser, url, place, **options))
            windows.callback(visit.page.context.close)
            return visit

        yield shown
    assert [complaint for visit in visits for complaint in visit.complaints] == []
