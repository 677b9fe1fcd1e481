"""Compare, Overview and Operate in a real browser; what is shown is compared with what the SDK is told."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import digits_task
from conftest import DigitsRun, wait_until
from gradtrace import Index
from gradtrace_client import Client
from gradtrace_service.app import create_service
from gradtrace_service.http.api_keys import Scope, add_key
from gradtrace_service.indexes.hosted import Hosted
from gradtrace_service.server import serving
from gradtrace_service.settings import Settings
from page_browser import Visit

JOB_MS = 600_000  # of a job, whose process loads PyTorch first


@contextmanager
def served(run: DigitsRun, folder: Path) -> Iterator[str]:
    settings = Settings(processes=0, state=folder / "state.sqlite")
    with serving(create_service([Hosted("digits", run.index, run.task)], settings)) as url:
        yield url


@pytest.fixture(scope="module")
def address(digits_index: DigitsRun, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of a service that is looked at alone."""
    with served(digits_index, tmp_path_factory.mktemp("state")) as url:
        yield url


def told(client: Client, **request: Any) -> list[int]:
    (result,) = client.influence(**request).results
    return [hit.row for hit in (*result.proponents, *result.opponents)]


@pytest.mark.everyday
def test_two_methods_are_compared_and_what_they_share_is_marked(address: str, shown: Callable[..., Visit]) -> None:
    with Client(address) as client:
        first, second = (told(client, query_rows=[0], method=method) for method in ("tracin", "influence"))
        visit = shown(address, "#/compare")
        assert visit.compared_rows("^First: tracin") == first
        assert visit.compared_rows("^Second: influence") == second
        questions = [{"query_rows": [0], "method": method} for method in ("tracin", "influence")]
        compared = client.compare(*questions)
        visit.page.get_by_role("img", name=f"Scores of 400 rows: correlation {compared.pearson:.3f}").wait_for()
        figures = visit.page.get_by_role("region", name="Agreement")
        figures.get_by_text(f"{compared.overlap.proponents} of 10").first.wait_for()
        shared = len(set(first[:10]) & set(second[:10])) + len(set(first[10:]) & set(second[10:]))
        assert visit.page.get_by_text(re.compile("^in both")).count() == 2 * shared
        visit.page.get_by_role("region", name="Second", exact=True).get_by_label("Method").select_option("cosine")
        visit.page.get_by_role("region", name="Second", exact=True).get_by_label("Row", exact=True).fill("7")
        visit.page.keyboard.press("Enter")
        wait_until(lambda: visit.compared_rows("^Second: cosine") == told(client, query_rows=[7], method="cosine"))
        linked = shown(address, visit.page.url.partition("#")[1] + visit.page.url.partition("#")[2])
        assert linked.compared_rows("^Second: cosine") == told(client, query_rows=[7], method="cosine")
        visit.page.get_by_role("link", name="Swap").click()
        wait_until(lambda: visit.compared_rows("^First: cosine") == told(client, query_rows=[7], method="cosine"))
        assert visit.compared_rows("^Second: tracin") == first


@pytest.mark.everyday
def test_the_heat_map_shows_the_mean_score_of_each_class_on_each(
    address: str, index: Index, shown: Callable[..., Visit]
) -> None:
    queries = np.array([digits_task.TASK.query[row][1] for row in range(digits_task.QUERY_ROWS)])
    rows = np.flatnonzero(queries == 3)[:16]
    assert len(rows) == (queries == 3).sum()  # else the page takes some of them
    scores = index.scores([digits_task.TASK.query[row] for row in rows]).mean(0)
    labels = np.array([digits_task.TASK.train[row][1] for row in range(digits_task.TRAIN_ROWS)])
    visit = shown(address, "#/overview")
    table = visit.page.get_by_role("region", name="Table of influence by class")
    line = table.get_by_role("row", name=re.compile("^three"))
    line.get_by_role("link").nth(9).wait_for()
    for label, cell in enumerate(line.get_by_role("link").all()):
        shown_mean = float(cell.get_attribute("title").replace("\N{MINUS SIGN}", "-").replace("+", "").replace(",", ""))
        assert shown_mean == pytest.approx(scores[labels == label].mean(), rel=0.06, abs=1e-4)
    line.get_by_role("link").nth(4).click()
    assert "labels=4" in visit.page.url
    assert f"query={','.join(map(str, rows))}" in visit.page.url


@pytest.mark.everyday
def test_the_overview_says_what_the_index_holds(address: str, shown: Callable[..., Visit]) -> None:
    with Client(address) as client:
        overview = client.overview()
        visit = shown(address, "#/overview")
        facts = visit.page.get_by_role("region", name="The index")
        facts.get_by_text("400", exact=True).wait_for()
        visit.page.get_by_role("img", name=re.compile("Losses of 400 training rows")).wait_for()
        visit.page.get_by_role("img", name=re.compile("Self-influence of 400 training rows")).wait_for()
        visit.page.get_by_role(
            "img", name=re.compile("Mean loss of the training rows. step 20: .*step 60: ")
        ).wait_for()
        classes = visit.page.get_by_role("region", name="Table of classes")
        assert classes.get_by_role("row").count() == 1 + len(overview.labels)
        influential = told(client, query_rows=list(range(60)), aggregate="mean", k=8)
        assert visit.compared_rows("Most influential rows") == influential


@pytest.mark.everyday
def test_generations_are_rolled_back_and_jobs_are_followed(
    copied_run: DigitsRun, tmp_path: Path, shown: Callable[..., Visit]
) -> None:
    with served(copied_run, tmp_path) as address, Client(address) as client:
        client.wait(client.delete_rows([1, 2, 3]))
        visit = shown(address, "#/operate")
        table = visit.page.get_by_role("region", name="Table of generations")
        table.get_by_role("row", name=re.compile("^2 current delete rows 397")).wait_for()
        table.get_by_role("button", name="Roll back to generation 1").click()
        visit.page.get_by_role("dialog").get_by_role("button", name="Roll back", exact=True).click()
        jobs = visit.page.get_by_role("region", name="Jobs")
        jobs.get_by_role("article", name="Roll back to generation 1").get_by_text("succeeded").wait_for(timeout=JOB_MS)
        table.get_by_role("row", name=re.compile("^3 current roll back 400")).wait_for()
        assert client.index().rows == 400
        visit.page.get_by_role("button", name="Bring up to date").click()
        jobs.get_by_role("article", name="Bring up to date").get_by_text("succeeded").wait_for(timeout=JOB_MS)
        metrics = visit.page.get_by_role("region", name="Metrics")
        metrics.get_by_text("/generations").wait_for()


def test_operating_needs_a_key_that_may(digits_index: DigitsRun, tmp_path: Path, shown: Callable[..., Visit]) -> None:
    keys = {scope: add_key(tmp_path / "keys", scope.value, [scope]) for scope in (Scope.query, Scope.admin)}
    both = add_key(tmp_path / "keys", "both", [Scope.query, Scope.admin])
    settings = Settings(processes=0, state=tmp_path / "state.sqlite", api_key_file=tmp_path / "keys")
    hosted = Hosted("digits", digits_index.index, digits_index.task)
    with serving(create_service([hosted], settings)) as url:
        visit = shown(url, "#/operate")
        visit.page.get_by_label("API key").fill(keys[Scope.query])
        visit.page.get_by_role("button", name="Sign in").click()
        visit.page.get_by_text("Operate needs a key of scope admin").wait_for()
        assert visit.page.get_by_role("link", name="Operate").count() == 0
        visit.page.get_by_role("button", name="Use another key").click()
        visit.page.get_by_label("API key").fill(both)
        visit.page.get_by_role("button", name="Sign in").click()
        visit.page.get_by_role("region", name="Table of generations").wait_for()
