"""The page where something is missing: labels, pictures, rows, scopes, an answer."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor, nn

import tiny
from conftest import DigitsRun, serving_when_ready
from gradtrace import Task
from gradtrace_client import Client
from gradtrace_indexer import delete_rows
from gradtrace_service.app import create_app, create_service
from gradtrace_service.http.api_keys import Scope, add_key
from gradtrace_service.indexes.hosted import Hosted
from gradtrace_service.server import serving
from gradtrace_service.settings import Settings
from page_browser import Visit


class Reconstruction(Task):
    """Without labels, predictions, pictures, or anything that can be sent."""

    def __init__(self) -> None:
        self.train = [row for row, _ in tiny.classes(60)]

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(5, 2), nn.Linear(2, 5))

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        return (model(batch) - batch).square().mean(1)


def test_rows_without_pictures_and_labels_are_shown_by_their_numbers(
    shown: Callable[..., Visit], tmp_path: Path
) -> None:
    with serving_when_ready(create_app(tiny.build(Reconstruction(), tmp_path))) as url, Client(url) as client:
        worst = client.list_examples("train", order="-loss", k=1).results[0]
        visit = shown(url, "#/ask?order=-loss")
        row = visit.page.get_by_role("listitem").first.get_by_role("link")
        row.get_by_text(re.compile("^loss ")).wait_for()
        number, _, loss = row.inner_text().split()
        assert (int(number), float(loss)) == (worst.row, pytest.approx(worst.loss, rel=0.01))
        assert visit.page.get_by_text("The task defines no render").count() == 1
        assert visit.page.get_by_role("searchbox").count() == 0
        assert visit.violations() == []
        row.click()
        assert set(visit.rows("Proponents")) == {
            hit.row for hit in client.influence(train_rows=[worst.row]).results[0].proponents
        }
        assert visit.page.get_by_text("unknown").count() == 0
        visit.go("#/clean?by=disagree")
        visit.page.get_by_role("link", name="Highest loss").wait_for()
        visit.page.get_by_label(re.compile(f"^row {worst.row}, loss")).wait_for()
        assert visit.page.get_by_text("unknown").count() == 0


@pytest.mark.parametrize("place", ["query=5&checkpoints=none", "query=99999", "train=1,2&method=hydra"])
def test_a_refused_answer_leaves_nothing_that_seems_to_load(url: str, shown: Callable[..., Visit], place: str) -> None:
    visit = shown(url, f"#/answer?{place}")
    visit.page.get_by_role("alert").wait_for()
    if "99999" not in place:
        visit.page.get_by_role("region", name="The query").get_by_role("img").first.wait_for()
    visit.page.locator(".skeleton").first.wait_for(state="detached")
    for name in ("Save as file", "Try again"):
        assert visit.page.get_by_role("button", name=name).count() == 0
    assert visit.violations() == []
    visit.go("#/answer?query=5")
    visit.page.get_by_role("button", name="Save as file").wait_for()


@pytest.mark.everyday
def test_an_answer_that_failed_can_be_asked_for_again(url: str, shown: Callable[..., Visit]) -> None:
    visit = shown(url, "")
    body = '{"type": "urn:gradtrace:problem:failure", "status": 500, "detail": "no luck"}'
    visit.page.route("**/influence", lambda route: route.fulfill(status=500, body=body))
    visit.go("#/answer?query=5")
    visit.page.get_by_role("alert").get_by_text("No luck").wait_for()
    visit.page.get_by_role("region", name="The query").get_by_role("img").wait_for()
    visit.page.locator(".skeleton").first.wait_for(state="detached")
    visit.page.unroute_all()
    visit.page.get_by_role("button", name="Try again").click()
    visit.page.get_by_role("button", name="Save as file").wait_for()


def test_nobody_waits_for_what_a_service_without_its_index_cannot_tell(url: str, shown: Callable[..., Visit]) -> None:
    visit = shown(url, "")
    body = '{"type": "urn:gradtrace:problem:index-unavailable", "status": 503, "detail": "the index was deleted"}'
    for place in ("**/influence", "**/examples/**"):
        visit.page.route(place, lambda route: route.fulfill(status=503, body=body))
    visit.go("#/answer?query=5")
    visit.page.locator(".banner").get_by_text("the index was deleted").wait_for()
    visit.page.get_by_role("button", name="Stop").click()
    visit.page.get_by_role("heading", name="Not answered").wait_for()
    visit.page.locator(".banner").wait_for(state="detached")
    assert visit.page.locator(".skeleton").count() == 0


def test_a_filter_that_fits_no_row_can_be_taken_back(url: str, shown: Callable[..., Visit]) -> None:
    visit = shown(url, "#/ask?from=train&class=3&wrong=true&text=words")
    visit.page.get_by_role("alert").get_by_text("nothing to search").wait_for()
    visit.page.get_by_role("button", name="Show all rows").click()
    visit.page.get_by_text("400 rows", exact=True).wait_for()
    visit.go("#/ask?from=train&only=7&class=9")
    visit.page.get_by_role("heading", name="No row is like this").wait_for()
    visit.page.get_by_role("button", name="Show all rows").click()
    visit.page.get_by_text("400 rows", exact=True).wait_for()


def test_a_key_that_may_only_ask_is_told_what_it_may_not(
    digits_index: DigitsRun, tmp_path: Path, shown: Callable[..., Visit]
) -> None:
    key = add_key(tmp_path / "keys", "anna", [Scope.query])
    settings = Settings(processes=0, state=tmp_path / "state.sqlite", api_key_file=tmp_path / "keys")
    hosted = Hosted("digits", digits_index.index, digits_index.task)
    with serving(create_service([hosted], settings)) as url, Client(url, api_key=key) as client:
        client.mark([3, 4], "remove")
        visit = shown(url, "#/clean?part=act")
        visit.page.get_by_label("API key").fill(key)
        visit.page.get_by_role("button", name="Sign in").click()
        visit.page.get_by_text("Deleting needs a key of scope admin").wait_for()
        assert visit.page.get_by_role("button", name=re.compile("^(Delete|Train) ")).count() == 0
        visit.go("#/operate")
        visit.page.get_by_text("The key anna is for query.").wait_for()


def test_deleted_rows_are_not_counted_as_rows_that_answer(copied_run: DigitsRun, shown: Callable[..., Visit]) -> None:
    delete_rows(copied_run.index, [1, 2, 399])
    hosted = Hosted("digits", copied_run.index, copied_run.task)
    with serving(create_service([hosted], Settings(processes=0))) as url:
        with Client(url) as client:
            assert (client.index().rows, client.index().deleted) == (400, 3)
            assert [(entry.rows, entry.deleted) for entry in client.indexes().indexes] == [(400, 3)]
        visit = shown(url, "#/overview")
        visit.page.get_by_text("397, and 3 deleted", exact=True).wait_for()
        visit.go("#/operate")
        visit.page.get_by_role("cell", name="397 (and 3 deleted)").wait_for()
        visit.go("#/ask?from=train")
        visit.page.get_by_text("397 rows", exact=True).wait_for()
