"""What is kept of an answer in a real browser: folded copies, its link, its file, and questions that people save."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import html5lib
import pytest
import torch
from torch import nn

import tiny
from conftest import DigitsRun, serving_when_ready
from gradtrace.tasks import TextClassification, Vocabulary
from gradtrace_client import Client
from gradtrace_service.app import create_app, create_service
from gradtrace_service.http.api_keys import Scope, add_key
from gradtrace_service.indexes.hosted import Hosted
from gradtrace_service.settings import Settings
from page_browser import Visit

TEXTS = (
    "amber beech cedar",
    "delta ether flint",
    "gravel heather indigo",
    "jasper kelp lemon",
    "maple nettle olive",
    "pine quartz reed",
)
COPIES = 3  # of each text, TEXTS rows apart


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.classifier = nn.Embedding(40, 4), nn.Linear(4, 2, bias=False)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.classifier((self.words(ids) * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))


def copies_task() -> TextClassification:
    texts = list(TEXTS * COPIES)
    vocabulary, labels = Vocabulary(texts, 40), [row % len(TEXTS) % 2 for row in range(len(texts))]
    return TextClassification(
        Words,
        (texts, labels),
        (texts[:2], labels[:2]),
        vocabulary_size=40,
        encode=lambda text: vocabulary.encode(text, 5),
        class_names=("even", "odd"),
    )


def test_copies_are_folded_into_the_strongest(browser: Any, tmp_path: Path) -> None:
    with serving_when_ready(create_app(tiny.build(copies_task(), tmp_path))) as url, Client(url) as client:
        (result,) = client.influence(query_rows=[0], k=18).results
        visit = Visit(browser, url, "#/answer?query=0&k=18")
        for end, hits in (("Proponents", result.proponents), ("Opponents", result.opponents)):
            families = dict[int, list[int]]()
            for hit in hits:
                families.setdefault(hit.row % len(TEXTS), []).append(hit.row)
            assert visit.rows(end) == [rows[0] for rows in families.values()]
            for rows in families.values():
                assert len(rows) == COPIES
            region = visit.page.get_by_role("region", name=end, exact=True)
            region.get_by_role("button", name="Show 2 near-duplicates").first.click()
            first, *others = families.values()
            assert visit.rows(end) == first + [rows[0] for rows in others]
            region.get_by_role("button", name="Fold 2 near-duplicates").click()
            assert visit.rows(end) == [rows[0] for rows in families.values()]
        assert visit.violations() == []
        assert not visit.complaints


@pytest.mark.everyday
def test_an_answer_is_saved_as_a_file(browser: Any, url: str, client: Client) -> None:
    visit = Visit(browser, url, "#/answer?query=5&k=7&method=cosine")
    visit.rows("Proponents")
    (result,) = client.influence(query_rows=[5], k=7, method="cosine").results
    with visit.page.expect_download() as saved:
        visit.page.get_by_role("button", name="Save as file").click()
    assert re.fullmatch(r"[\w-]*query-row-5[\w-]*\.html", saved.value.suggested_filename)
    document = html5lib.parse(Path(saved.value.path()).read_bytes(), namespaceHTMLElements=False)
    assert document.find(".//script") is None
    titles = ["".join(title.itertext()) for title in document.iter("h4")]
    told = [int(number) for title in titles for number in re.findall(r"\bRow (\d+)", title)]
    assert told == [hit.row for hit in (*result.proponents, *result.opponents)]
    assert not visit.complaints


def test_a_link_is_copied_or_shown_to_be_copied(browser: Any, url: str) -> None:
    visit = Visit(browser, url, "#/answer?query=5&method=cosine", permissions=["clipboard-read", "clipboard-write"])
    rows = visit.rows("Proponents")
    visit.page.get_by_role("button", name="Copy link").click()
    visit.page.get_by_text("The link is copied").wait_for()
    copied = visit.page.evaluate("navigator.clipboard.readText()")
    assert copied == f"{url}/#/answer?query=5&method=cosine"
    visit.page.evaluate("Object.defineProperty(navigator, 'clipboard', {value: undefined})")  # as it is without TLS
    visit.page.get_by_role("button", name="Copy link").click()
    assert visit.page.get_by_label("Link", exact=True).input_value() == copied
    other = Visit(browser, url, copied.removeprefix(f"{url}/"))
    assert other.rows("Proponents") == rows
    assert not visit.complaints


def signed_in(browser: Any, url: str, place: str, key: str) -> Visit:
    visit = Visit(browser, url, place)
    visit.page.get_by_label("API key").fill(key)
    visit.page.get_by_role("button", name="Sign in").click()
    return visit


def test_a_question_is_saved_for_all_and_deleted(browser: Any, digits_index: DigitsRun, tmp_path: Path) -> None:
    ada, bo = (add_key(tmp_path / "keys", name, [Scope.query]) for name in ("ada", "bo"))
    settings = Settings(processes=0, state=tmp_path / "state.sqlite", api_key_file=tmp_path / "keys")
    hosted = Hosted("digits", digits_index.index, digits_index.task)
    with serving_when_ready(create_service([hosted], settings)) as url, Client(url, api_key=ada) as client:
        other = signed_in(browser, url, "#/ask?from=saved", bo)
        other.page.get_by_role("heading", name="No question is saved").wait_for()
        visit = signed_in(browser, url, "#/answer?query=5&method=cosine", ada)
        rows = visit.rows("Proponents")
        visit.page.get_by_role("button", name="Save question").click()
        assert "query row 5" in visit.page.get_by_label("Title").input_value()
        visit.page.get_by_label("Title").fill("A five, or is it?")
        visit.page.get_by_label("Note").fill("Look at the first row")
        visit.page.get_by_role("button", name="Save", exact=True).click()
        visit.page.get_by_text("The question is saved").wait_for()
        (question,) = client.questions().results
        assert (question.title, question.note, question.who) == ("A five, or is it?", "Look at the first row", "ada")
        line = other.page.get_by_role("list", name="Saved questions").get_by_role("listitem")
        line.get_by_text("ada").wait_for()  # without a reload
        line.get_by_text("Look at the first row").wait_for()
        assert other.violations() == []
        line.get_by_role("link", name="A five, or is it?").click()
        assert other.rows("Proponents") == rows
        other.page.go_back()
        other.page.get_by_role("button", name="Delete A five, or is it?").click()
        other.page.get_by_role("dialog").get_by_role("button", name="Delete", exact=True).click()
        other.page.get_by_role("heading", name="No question is saved").wait_for()
        assert client.questions().total == 0
        assert not visit.complaints + other.complaints
