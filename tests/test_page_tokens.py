"""Tokens on the page, of a tiny language model."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

import tiny_language
from conftest import FRAMEWORK_WARNINGS
from gradtrace import load_checkpoints
from gradtrace.tasks import CausalLM
from gradtrace_client import Client
from gradtrace_indexer import build_index
from gradtrace_service.app import create_app
from gradtrace_service.server import serving
from page_browser import Visit, number

pytestmark = [*FRAMEWORK_WARNINGS, pytest.mark.usefixtures("offline")]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    home = tmp_path_factory.mktemp("language")
    tiny_language.saved(tiny_language.gpt2(340), home / "model")
    texts, queries = (tiny_language.texts(count, seed) for count, seed in ((12, 0), (3, 1)))
    rows, asked = ([{"text": text} for text in side] for side in (texts, queries))
    task = CausalLM(home / "model", rows, asked)
    index = build_index(task, load_checkpoints(home / "model"), home / "index", progress=False)
    with serving(create_app(index)) as address:
        yield address


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_card_shows_the_tokens_of_both_texts(url: str, shown: Callable[..., Visit], scheme: str) -> None:
    visit = shown(url, "#/answer?query=1", color_scheme=scheme)
    row = visit.rows("Proponents")[0]
    card = visit.page.get_by_role("region", name="Proponents", exact=True).get_by_role("article").first
    card.get_by_role("button", name="Show tokens").click()
    with Client(url) as client:
        answer = client.tokens([row], query_rows=[1])
    (result,) = answer.results
    for side, tokens, shares in (
        ("Tokens of the row", result.tokens, result.training),
        ("Tokens of the query", answer.query_tokens, result.query),
    ):
        spans = card.get_by_role("group", name=side).locator("span")
        spans.first.wait_for()
        assert spans.all_text_contents() == tokens
        told = [number(title.split()[0]) for title in spans.evaluate_all("all => all.map(span => span.title)")]
        largest = max(map(abs, shares.scores))
        assert told == pytest.approx(shares.scores, abs=0.01 * largest)
        strongest = max(range(len(tokens)), key=lambda at: abs(shares.scores[at]))
        heats = spans.evaluate_all("all => all.map(span => span.style.getPropertyValue('--heat'))")
        assert heats[strongest] == "55%"
        opposing = spans.evaluate_all("all => all.map(span => span.className === 'opposes')")
        assert opposing == [score < 0 for score in shares.scores]
    assert visit.violations() == []
    card.get_by_role("button", name="Hide tokens").click()
    card.get_by_role("group").first.wait_for(state="detached")


def test_the_tokens_of_all_cards_are_shown_at_once(url: str, shown: Callable[..., Visit]) -> None:
    visit = shown(url, "#/answer?query=1&k=3")
    cards = len(visit.rows("Proponents"))
    visit.page.get_by_label("Show the tokens of all rows").check()
    visit.page.get_by_role("group", name="Tokens of the row").nth(cards - 1).wait_for()
    visit.page.get_by_label("Show the tokens of all rows").uncheck()
    visit.page.get_by_role("group", name="Tokens of the row").first.wait_for(state="detached")
