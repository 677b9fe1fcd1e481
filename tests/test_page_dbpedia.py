"""The page over real texts of fourteen classes."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import wait_until
from gradtrace_client import Client
from gradtrace_client.schemas import ExampleAnswer, Influence
from gradtrace_indexer.task_loading import load_task
from gradtrace_service.app import create_service
from gradtrace_service.indexes.hosted import Hosted
from gradtrace_service.server import serving
from gradtrace_service.settings import Settings
from page_browser import Visit, kinds, number, told
from shortened_examples import QUERIES, needs_data, trained_index

pytestmark = needs_data

TASK = f"{Path(__file__).with_name('dbpedia_task.py')}:TASK"
TEXT = "Brookfield Hall is a historic school building in the village of Brookfield Vermont. It was built in 1871."
BUILDING, SCHOOL = 6, 1


@pytest.fixture(scope="module")
def task() -> Any:
    return load_task(TASK)


@pytest.fixture(scope="module")
def url(task: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("dbpedia")
    trained_index("dbpedia", task, folder, epochs=5, batch_size=8)
    settings = Settings(processes=0, state=folder / "state.sqlite")
    with serving(create_service([Hosted("dbpedia", folder / "index", TASK)], settings)) as address:
        yield address


@pytest.fixture
def client(url: str) -> Iterator[Client]:
    """Of the service, which knows all predictions, and has no marks afterwards."""
    with Client(url) as client:
        wait_until(lambda: not client.list_examples("query", order="-loss", k=1).pending)
        yield client
        if marked := list(kinds(client)):
            client.unmark(marked)


def worst_query(client: Client) -> ExampleAnswer:
    return client.list_examples("query", correct=False, order="-loss", k=1).results[0]


# Ask


def test_rows_are_narrowed_by_words_classes_and_wrong_predictions(
    url: str, task: Any, client: Client, shown: Callable[..., Visit]
) -> None:
    visit = shown(url, "#/ask")
    texts = [task.query[row][0].lower() for row in range(QUERIES)]
    holding = [row for row, text in enumerate(texts) if "river" in text and "the" in text]
    assert 0 < len(holding) < QUERIES
    visit.page.get_by_label("Search").fill("RIVER the")
    visit.page.get_by_text(f"{len(holding)} of {QUERIES} rows").wait_for()
    listed = visit.page.get_by_role("list", name="Rows of the query set").locator(".line-row")
    wait_until(lambda: [int(row) for row in listed.all_inner_texts()] == holding)
    visit.page.get_by_label("Search").fill("")
    worst = worst_query(client)
    labelled = [row for row in range(QUERIES) if task.query[row][1] == worst.label]
    visit.page.get_by_label("Class", exact=True).select_option(worst.label_name)
    visit.page.get_by_text(f"{len(labelled)} of {QUERIES} rows").wait_for()
    visit.page.get_by_label("Wrong only").check()
    wrong = client.list_examples("query", labels=[worst.label], correct=False, k=QUERIES).results
    wait_until(lambda: [int(row) for row in listed.all_inner_texts()] == [row.row for row in wrong])
    visit.page.get_by_role("list", name="Rows of the query set").get_by_role("link").first.click()
    assert visit.rows("Proponents") == told(client, "proponents", query_rows=[wrong[0].row])
    heading = f"Query row {wrong[0].row}: {worst.label_name}, but predicted {wrong[0].prediction_name}"
    visit.page.get_by_role("heading", name=heading).wait_for()


@pytest.mark.everyday
def test_a_pasted_text_is_explained(url: str, client: Client, shown: Callable[..., Visit]) -> None:
    visit = shown(url, "#/ask?from=own", permissions=["clipboard-read", "clipboard-write"])
    visit.page.evaluate("text => navigator.clipboard.writeText(text)", TEXT)
    visit.page.get_by_label("Text", exact=True).focus()
    visit.press("Control+V")
    visit.page.get_by_label("Its label").select_option("Building")
    visit.page.get_by_role("button", name="Explain it").click()
    example = {"text": TEXT, "label": BUILDING}
    assert visit.rows("Proponents") == told(client, "proponents", example=example)
    assert visit.rows("Opponents") == told(client, "opponents", example=example)
    visit.page.get_by_role("region", name="The query").get_by_text(TEXT).wait_for()
    visit.page.get_by_text("pushed towards Building").wait_for()


# Answer


def words(text: str) -> set[str]:
    return set(re.findall(r"[^\W_]+", text.lower()))


@pytest.mark.everyday
def test_words_of_both_texts_are_marked_and_no_others(
    url: str, task: Any, client: Client, shown: Callable[..., Visit]
) -> None:
    row = worst_query(client).row
    visit = shown(url, f"#/answer?query={row}&k=20")
    rows = visit.rows("Proponents") + visit.rows("Opponents")
    assert rows == [hit for end in ("proponents", "opponents") for hit in told(client, end, query_rows=[row], k=20)]
    cards = visit.page.get_by_role("article").evaluate_all(
        "cards => cards.map(card => [...card.querySelectorAll('mark')].map(mark => mark.textContent.toLowerCase()))"
    )
    marked = [set(words_of_card) for words_of_card in cards]
    shared = [words(task.query[row][0]) & words(task.train[hit][0]) for hit in rows]
    assert any(marked)
    for seen, both in zip(marked, shared, strict=True):
        assert seen <= both
        assert {word for word in both if len(word) > 5} <= seen  # what all texts share are shorter words


def test_near_duplicates_are_folded_into_the_strongest(
    url: str, task: Any, client: Client, shown: Callable[..., Visit]
) -> None:
    answers = client.influence(query_rows=list(range(40)), k=20, include=["clusters"]).results
    row, result = max(enumerate(answers), key=lambda answer: len(folded(answer[1])))
    assert folded(result)
    visit = shown(url, f"#/answer?query={row}&k=20")
    assert visit.rows("Proponents") == [hit.row for hit in result.proponents if hit.cluster == hit.row]
    proponents = visit.page.get_by_role("region", name="Proponents", exact=True)
    for button in proponents.get_by_role("button", name=re.compile(r"^Show \d+ near-duplicate")).all():
        button.click()
    proponents.get_by_role("button", name=re.compile(r"^Show \d+ near-duplicate")).first.wait_for(state="detached")
    strongest = list(dict.fromkeys(hit.cluster for hit in result.proponents))
    families = [[hit.row for hit in result.proponents if hit.cluster == first] for first in strongest]
    assert visit.rows("Proponents") == [row for family in families for row in family]


def folded(result: Influence) -> list[int]:
    return [hit.row for hit in result.proponents if hit.cluster != hit.row]


def test_another_class_and_a_contrast_are_asked_for(url: str, client: Client, shown: Callable[..., Visit]) -> None:
    worst = worst_query(client)
    visit = shown(url, f"#/answer?query={worst.row}")
    probabilities = client.influence(query_rows=[worst.row], include=["probabilities"]).results[0].query.probabilities
    assert probabilities is not None
    bars = visit.page.get_by_label("Probabilities").get_by_role("button")
    bars.first.wait_for()
    names = bars.evaluate_all("bars => bars.map(bar => bar.querySelector('.name').textContent)")
    assert names == [probability.label_name for probability in probabilities[: len(names)]]
    visit.page.get_by_label("Explain", exact=True).select_option("class")
    visit.page.get_by_label("Why not").select_option("Building")
    visit.page.get_by_role("heading", name=f"What speaks for Building in query row {worst.row}?").wait_for()
    asked = {"query_rows": [worst.row], "target": {"label": BUILDING}}
    wait_until(lambda: visit.rows("Proponents") == told(client, "proponents", **asked))
    visit.page.get_by_label("Explain", exact=True).select_option("contrast")
    visit.page.get_by_label("Rather than").select_option("EducationalInstitution")
    heading = "What speaks for Building rather than EducationalInstitution"
    visit.page.get_by_role("heading", name=heading).wait_for()
    asked = {"query_rows": [worst.row], "target": {"label": BUILDING, "rather_than": SCHOOL}}
    wait_until(lambda: visit.rows("Proponents") == told(client, "proponents", **asked))
    assert visit.rows("Opponents") == told(client, "opponents", **asked)


def test_sums_are_told_by_class_and_by_prediction(url: str, client: Client, shown: Callable[..., Visit]) -> None:
    visit = shown(url, "#/answer?query=7")
    panel = visit.page.get_by_role("region", name="Sums of scores")
    for by in ("label", "prediction"):
        panel.get_by_label("Column of the sums").select_option(by)
        groups = client.groups(query_rows=[7], by=by).results[0].groups
        names = [group.group_name for group in groups]
        wait_until(lambda names=names: panel.locator("li .name").all_inner_texts() == names)
        sums = [number(text) for text in panel.locator("li .number").all_inner_texts()]
        assert sums == pytest.approx([group.sum for group in groups], rel=0.006, abs=6e-5)


# Compare


def test_two_queries_are_compared(url: str, client: Client, shown: Callable[..., Visit]) -> None:
    worst = worst_query(client)
    same = client.list_examples("query", labels=[worst.prediction], correct=True, k=1).results[0]
    questions = [{"query_rows": [row]} for row in (worst.row, same.row)]
    first, second = (client.influence(**question).results[0] for question in questions)
    visit = shown(url, f"#/compare?query={worst.row}&method2=tracin")
    assert visit.compared_rows("^First: ") == rows_of(first)
    form = visit.page.get_by_role("region", name="Second", exact=True)
    form.get_by_label("Row", exact=True).fill(str(same.row))
    visit.press("Enter")
    wait_until(lambda: visit.compared_rows("^Second: ") == rows_of(second))
    correlation = f"correlation {client.compare(*questions).pearson:.3f}".replace("-", "\N{MINUS SIGN}")
    visit.page.get_by_role("img", name=re.compile(f"{correlation}$")).wait_for()
    shared = sum(
        len({hit.row for hit in getattr(first, end)} & {hit.row for hit in getattr(second, end)})
        for end in ("proponents", "opponents")
    )
    wait_until(lambda: visit.page.get_by_text(re.compile("^in both")).count() == 2 * shared)


def rows_of(result: Influence) -> list[int]:
    return [hit.row for hit in (*result.proponents, *result.opponents)]


# Clean


def test_texts_that_the_model_disagrees_with_are_marked_by_quick_keys(
    url: str, client: Client, shown: Callable[..., Visit]
) -> None:
    wrong = client.list_examples("train", correct=False, order="-loss", k=6).results
    assert len(wrong) == 6
    visit = shown(url, "#/clean")
    assert visit.listed_rows(6)[:6] == [hit.row for hit in client.self_influence(k=6).results]
    visit.page.get_by_role("link", name="Disagreement").click()
    wait_until(lambda: visit.listed_rows(6)[:6] == [row.row for row in wrong])
    suggested = visit.page.get_by_role("combobox", name="Suggested label").locator("option:checked")
    wait_until(lambda: suggested.text_content() == wrong[0].prediction_name)
    visit.press("w", "r", "x", "u")
    kept = dict(zip((row.row for row in wrong), ["wrong", "right", "remove", "unsure"], strict=False))
    wait_until(lambda: kinds(client) == kept)
    labels = {mark.row: mark.label for mark in client.marks().results}
    assert labels == dict.fromkeys(kept) | {wrong[0].row: wrong[0].prediction}
    name = f"^row {wrong[0].row}, .*, marked wrong, suggested label {wrong[0].prediction_name} · "
    visit.page.get_by_label(re.compile(name)).wait_for()
    visit.press("z", "z")
    wait_until(lambda: set(kinds(client)) == {row.row for row in wrong[:2]})


# Overview


def test_the_heat_map_shows_the_mean_score_of_each_class_on_each(
    url: str, task: Any, client: Client, shown: Callable[..., Visit]
) -> None:
    labels = [task.query[row][1] for row in range(QUERIES)]
    label = next(label for label in range(14) if labels.count(label) <= 16)  # of more, the page takes some
    rows = [row for row in range(QUERIES) if labels[row] == label]
    groups = client.groups(query_rows=rows, aggregate="mean").results[0].groups
    means = {group.group: group.mean for group in groups}
    visit = shown(url, "#/overview")
    table = visit.page.get_by_role("region", name="Table of influence by class")
    line = table.get_by_role("row", name=re.compile(f"^{task.class_names[label]} "))
    line.get_by_role("link").nth(13).wait_for()
    titles = line.get_by_role("link").evaluate_all("cells => cells.map(cell => cell.title)")
    assert [number(title) for title in titles] == pytest.approx([means[train] for train in range(14)], rel=0.06)
    line.get_by_role("link").nth(BUILDING).click()
    asked = {"query_rows": rows, "aggregate": "mean", "filter": {"labels": [BUILDING]}}
    assert visit.rows("Proponents") == told(client, "proponents", **asked)


# Everybody


@pytest.mark.everyday
def test_keys_alone_lead_through_ask_answer_and_clean(url: str, client: Client, shown: Callable[..., Visit]) -> None:
    visit = shown(url, "#/ask")
    visit.page.get_by_role("listitem").first.get_by_role("link").wait_for()
    tab_to(visit, "[data-at]")
    visit.press("ArrowDown", "ArrowDown", "ArrowUp")
    visit.page.locator('[data-at="1"]:focus').wait_for()
    visit.press("Enter")
    assert visit.rows("Proponents") == told(client, "proponents", query_rows=[1])
    tab_to(visit, ".row-link")
    row = told(client, "proponents", query_rows=[1])[0]
    visit.press("Enter")
    wait_until(lambda: visit.rows("Proponents") == told(client, "proponents", train_rows=[row]))
    tab_to(visit, "header .tab[href*=clean]")
    visit.press("Enter")
    first, second = [hit.row for hit in client.self_influence(k=2).results]
    assert visit.listed_rows(2)[:2] == [first, second]
    visit.press("x")
    wait_until(lambda: kinds(client) == {first: "remove"})
    visit.page.get_by_role("heading", name=re.compile(f"^Row {second} ")).wait_for()
    tab_to(visit, ".mark-button.mark-unsure")
    visit.press("Enter")
    wait_until(lambda: kinds(client) == {first: "remove", second: "unsure"})


def tab_to(visit: Visit, selector: str, most: int = 80) -> None:
    for _ in range(most):
        visit.press("Tab")
        if visit.page.evaluate("selector => document.activeElement.matches(selector)", selector):
            return
    raise AssertionError(f"{most} tabs did not lead to {selector}")


VIEWS = {
    "ask": ".line-row",
    "ask?from=own": "textarea",
    "answer?query=7": ".hit mark",
    "compare?query=7": ".cmp-agreement canvas",
    "clean?by=disagree": ".clean-current .example-text",
    "clean?part=act": ".clean-effects",
    "overview": ".heat tbody tr:last-child a",
    "operate": ".op-table",
}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_keeps_people_out(url: str, client: Client, shown: Callable[..., Visit], scheme: str) -> None:
    client.mark([11], "remove")
    assert shown(url, "", color_scheme=scheme).violations_of(VIEWS) == {}
