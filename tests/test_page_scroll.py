"""A list of 100,000 rows in a real browser: what is fetched and drawn is what can be seen."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from torch import nn

import tiny
from conftest import serving_when_ready
from gradtrace.tasks import TabularRegression
from gradtrace_client import Client
from gradtrace_service.app import create_app
from page_browser import Visit

ROWS = 100_000
PAGE = 60  # rows that a request of the page asks for
AHEAD = 600 + 100  # pixels drawn beyond the window, and rounded
LINE = 76  # pixels of a row with the gap below it


def long_task() -> TabularRegression:
    values = np.arange(2 * ROWS, dtype=np.float32).reshape(ROWS, 2) / ROWS
    return TabularRegression(
        lambda: nn.Linear(2, 1),
        (values, values.sum(1)),
        (values[:4], values[:4].sum(1)),
        feature_names=("width", "height"),
        mean=(1.0, 1.0),
        std=(1.0, 1.0),
    )


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    index = tiny.build(long_task(), tmp_path_factory.mktemp("long"), count=1)
    with serving_when_ready(create_app(index)) as address:
        yield address


class List:
    """The list of all training rows, and the pages of it that were asked for since the last look."""

    def __init__(self, browser: Any, url: str) -> None:
        self.asked = list[int]()
        self.visit = Visit(browser, url)
        self.page = self.visit.page
        self.page.on("request", self._requested)
        self.page.get_by_role("link", name="Training set").click()
        self.row(0).wait_for()

    def _requested(self, request: Any) -> None:
        self.asked += [int(offset) // PAGE for offset in re.findall(r"/examples/train\?.*offset=(\d+)", request.url)]

    def row(self, row: int) -> Any:
        return self.page.locator(f'a[data-at="{row}"]')

    def scroll(self, row: int) -> None:
        self.page.evaluate("top => scrollTo(0, top)", row * LINE)
        self.row(row).wait_for()

    def seen(self) -> set[int]:
        """The pages of which something is within the window or just beyond it."""
        top = self.page.evaluate("-document.querySelector('[role=list].virtual').getBoundingClientRect().top")
        height = self.page.viewport_size["height"]
        first, last = max(top - AHEAD, 0) // LINE, (top + height + AHEAD) // LINE + 1
        return set(range(int(first) // PAGE, int(min(last, ROWS - 1)) // PAGE + 1))

    def taken(self) -> list[int]:
        self.page.wait_for_load_state("networkidle")
        taken, self.asked = self.asked, []
        return taken


def test_a_jump_fetches_only_where_it_ends(browser: Any, url: str) -> None:
    rows = List(browser, url)
    assert set(rows.taken()) <= rows.seen()
    for row in (50_000, 99_990, 123):
        rows.scroll(row)
        taken = rows.taken()
        assert len(taken) == len(set(taken))
        assert set(taken) <= rows.seen()
        assert row // PAGE in taken
        assert rows.page.get_by_role("listitem").count() < 60
    rows.scroll(50_000)
    assert rows.taken() == []  # they are kept
    rows.page.get_by_role("link", name=re.compile("^50,000")).wait_for()
    assert not rows.visit.complaints


def test_while_it_is_scrolled_each_page_is_fetched_once(browser: Any, url: str) -> None:
    """Rows are fetched while they come, not only once the scrolling ends."""
    rows = List(browser, url)
    seen = rows.seen()
    rows.page.mouse.move(700, 500)
    for _ in range(40):
        rows.page.mouse.wheel(0, 250)
        rows.page.wait_for_timeout(20)
        seen |= rows.seen()
    rows.page.wait_for_timeout(500)
    seen |= rows.seen()
    taken = rows.taken()
    assert len(taken) == len(set(taken))
    assert rows.seen() <= set(taken) <= set(range(max(seen) + 1))
    rows.page.locator(".virtual .skeleton").first.wait_for(state="detached")


def test_all_rows_are_reachable_in_their_order_of_influence(browser: Any, url: str) -> None:
    with Client(url) as client:
        later = client.self_influence(offset=2_000, k=1).results[0].row
        last = client.self_influence(offset=ROWS - 1, k=1).results[0].row
    visit = Visit(browser, url, "#/clean")
    visit.page.get_by_text("1–2,000 of 100,000").wait_for()  # noqa: RUF001
    visit.page.get_by_role("button", name="Next page").click()
    visit.page.get_by_role("heading", name=f"Row {later:,} 2,001 of 100,000").wait_for()
    visit.page.get_by_role("button", name="The next 2,000 rows").click()
    visit.page.get_by_text("4,001–6,000 of 100,000").wait_for()  # noqa: RUF001
    visit.go(f"#/clean?offset={ROWS - 1}")
    visit.page.get_by_role("heading", name=f"Row {last:,} 100,000 of 100,000").wait_for()
    assert visit.page.get_by_role("button", name="Next page").is_disabled()
    visit.page.get_by_role("link", name="Highest loss").click()
    visit.page.get_by_text("1–2,000 of 100,000").wait_for()  # noqa: RUF001
    assert not visit.complaints


def test_keys_lead_to_the_end_and_back(browser: Any, url: str) -> None:
    rows = List(browser, url)
    rows.row(0).focus()
    rows.page.keyboard.press("End")
    rows.page.locator(f'a[data-at="{ROWS - 1}"]:focus').wait_for()
    assert set(rows.taken()) <= {0, 1, *rows.seen()}
    rows.page.keyboard.press("Home")
    rows.page.locator('a[data-at="0"]:focus').wait_for()
    rows.page.keyboard.press("End")
    rows.page.keyboard.press("ArrowUp")  # heard, whether or not the last row is there yet
    rows.page.locator(f'a[data-at="{ROWS - 2}"]:focus').wait_for()
    assert not rows.visit.complaints
