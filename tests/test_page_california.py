"""The page over a table of houses: values instead of classes, features with their ranges, and a map."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import html5lib
import numpy as np
import pytest
from numpy.typing import NDArray

from conftest import wait_until
from gradtrace_client import Client
from gradtrace_client.schemas import FeaturesInput, Hit, Influence
from gradtrace_indexer import delete_rows
from gradtrace_indexer.task_loading import load_task
from gradtrace_service.app import create_service
from gradtrace_service.indexes.hosted import Hosted
from gradtrace_service.server import serving
from gradtrace_service.settings import Settings
from page_browser import Visit, kinds, number, told
from shortened_examples import QUERIES, needs_data, trained_index

pytestmark = needs_data

TASK = f"{Path(__file__).with_name('california_task.py')}:TASK"
JOB_MS = 600_000  # of a job, whose process loads PyTorch first
DELETED = (3, 5)
SAMPLE = [at * QUERIES // 128 for at in range(128)]  # of the query set: as many as a request may hold
ROUNDED = {"rel": 0.006, "abs": 6e-5}  # the page shows three digits or, of small numbers, four decimals


@pytest.fixture(scope="module")
def task() -> Any:
    return load_task(TASK)


@pytest.fixture(scope="module")
def url(task: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of a service over an index of two generations: rows were deleted from the second."""
    folder = tmp_path_factory.mktemp("california")
    trained_index("california", task, folder, epochs=8, batch_size=16)
    delete_rows(folder / "index", DELETED)
    settings = Settings(processes=0, state=folder / "state.sqlite")
    with serving(create_service([Hosted("california", folder / "index", TASK)], settings)) as address:
        yield address


@pytest.fixture
def client(url: str) -> Iterator[Client]:
    """Of the service, which has no marks afterwards."""
    with Client(url) as client:
        yield client
        if marked := list(kinds(client)):
            client.unmark(marked)


def features(task: Any, split: str, row: int) -> dict[str, float | str | None]:
    return dict(task.render(getattr(task, split)[row])["features"])


# Ask


@pytest.mark.everyday
def test_rows_are_narrowed_ordered_and_explained_by_a_click(
    url: str, task: Any, client: Client, shown: Callable[..., Visit]
) -> None:
    visit = shown(url, "#/ask")
    assert visit.page.get_by_label("Class", exact=True).count() == visit.page.get_by_label("Wrong only").count() == 0
    inland = [row for row in range(QUERIES) if features(task, "query", row)["ocean_proximity"] == "INLAND"]
    visit.page.get_by_label("Search").fill("inland")
    visit.page.get_by_text(f"{len(inland)} of {QUERIES} rows").wait_for()
    visit.page.get_by_label("Order").select_option("-loss")
    worst = client.list_examples("query", text="inland", order="-loss", k=1).results[0].row
    assert worst in inland
    first = visit.page.get_by_role("listitem").first.get_by_role("link")
    first.locator(".line-row", has_text=re.compile(f"^{worst}$")).wait_for()
    first.click()
    assert visit.rows("Proponents") == told(client, "proponents", query_rows=[worst])
    assert visit.rows("Opponents") == told(client, "opponents", query_rows=[worst])


@pytest.mark.everyday
def test_a_house_of_ones_own_is_filled_in_within_the_ranges_of_the_data(
    url: str, task: Any, client: Client, shown: Callable[..., Visit]
) -> None:
    visit = shown(url, "#/ask?from=own")
    form = client.index().input
    assert isinstance(form, FeaturesInput)
    present = client.list_examples("train", k=1_000, render=False).results
    table = [features(task, "train", row.row) for row in present]
    house: dict[str, float | str | None] = {}
    for feature in form.features:
        if feature.choices:
            assert set(feature.choices) >= {row[feature.name] for row in table}
            continue
        values = np.array([row[feature.name] for row in table if row[feature.name] is not None], dtype=float)
        field = visit.page.get_by_label(feature.name, exact=True)
        house[feature.name] = float(field.input_value())
        median = np.median(values)  # of whole numbers, the page takes one
        assert house[feature.name] == pytest.approx(np.floor(median + 0.5) if feature.integer else median)
        hint = visit.page.locator(f"[id='{field.get_attribute('aria-describedby')}']").inner_text()
        low, high = re.fullmatch("training data: (.*) to (.*)", hint).groups()  # type: ignore[union-attr]
        assert (number(low), number(high)) == pytest.approx((values.min(), values.max()), **ROUNDED)
    visit.page.get_by_label("median_income", exact=True).fill("40")
    visit.page.get_by_text("outside of the training data").wait_for()
    visit.page.get_by_label("median_income", exact=True).fill("8.5")
    visit.page.get_by_text("outside of the training data").wait_for(state="detached")
    visit.page.get_by_label("total_bedrooms", exact=True).fill("")  # not known, as of some houses
    visit.page.get_by_label("ocean_proximity").select_option("NEAR BAY")
    visit.page.get_by_label("Its label").fill("412000")
    visit.page.get_by_role("button", name="Explain it").click()
    house |= {"median_income": 8.5, "total_bedrooms": None, "ocean_proximity": "NEAR BAY"}
    example = {"features": house, "label": 412_000}
    assert visit.rows("Proponents") == told(client, "proponents", example=example)
    query = visit.page.get_by_role("region", name="The query")
    query.get_by_text("412,000").wait_for()
    query.get_by_role("button", name="Change it and ask again").click()
    assert visit.page.get_by_label("median_income", exact=True).input_value() == "8.5"


def test_training_rows_are_filtered_by_their_loss(url: str, client: Client, shown: Callable[..., Visit]) -> None:
    visit = shown(url, "#/answer?query=7")
    visit.page.get_by_text("All training rows", exact=True).click()
    visit.page.get_by_label("Loss at least").fill("0.4")
    visit.page.keyboard.press("Tab")
    expected = told(client, "opponents", query_rows=[7], filter={"where": {"loss": {"min": 0.4}}})
    assert expected != told(client, "opponents", query_rows=[7])
    wait_until(lambda: visit.rows("Opponents") == expected)
    assert visit.page.get_by_label("Explain", exact=True).count() == 0  # there is no other class


# Answer


@pytest.mark.everyday
def test_cards_tell_differences_scores_and_percentiles(
    url: str, task: Any, client: Client, shown: Callable[..., Visit]
) -> None:
    (result,) = client.influence(query_rows=[7], include=["percentiles", "clusters"]).results
    visit = shown(url, "#/answer?query=7")
    visit.page.get_by_text(re.compile("^loss .* % of rows$|lowest of all rows$")).first.wait_for()
    for end, hits in (("Proponents", result.proponents), ("Opponents", result.opponents)):
        cards = visit.page.get_by_role("region", name=end, exact=True).get_by_role("article")
        assert visit.rows(end) == [hit.row for hit in hits if hit.cluster == hit.row]
        for card, hit in zip(cards.all(), (hit for hit in hits if hit.cluster == hit.row), strict=True):
            assert number(card.locator(".score").inner_text()) == pytest.approx(hit.score, **ROUNDED)
            assert percentile_text(hit) in card.inner_text()
            cells = card.locator("table.differences tbody tr").evaluate_all(
                "rows => rows.map(row => [...row.cells].map(cell => cell.innerText.trim()))"
            )
            check_differences(cells, features(task, "train", hit.row), features(task, "query", 7))
    query = visit.page.get_by_role("region", name="The query")
    query.get_by_text(f"{task.query[7][1]:,.0f}", exact=True).wait_for()
    visit.page.get_by_text("lowered the loss").wait_for()


def percentile_text(hit: Hit) -> str:
    assert hit.percentile is not None
    if hit.percentile == 0:
        return "the lowest of all rows"
    side, share = ("above", hit.percentile) if hit.percentile >= 50 else ("below", 100 - hit.percentile)
    return f"{side} {math.floor(share * 100) / 100:.2f} % of rows"


def check_differences(cells: list[list[str]], row: dict[str, Any], query: dict[str, Any]) -> None:
    """cells: by feature, as the page shows them: its name, the row's value, and the difference to the query's"""
    assert [name for name, _, _ in cells] == list(row)
    for name, value, difference in cells:
        if row[name] == query[name]:
            assert difference == "same"
        elif isinstance(row[name], str) or None in (row[name], query[name]):
            shown = "\N{EN DASH}" if query[name] is None else query[name]
            assert difference == f"not {shown if isinstance(shown, str) else f'{shown:,g}'}"
        else:
            assert number(value) == pytest.approx(row[name], rel=1e-5)
            assert number(difference) == pytest.approx(row[name] - query[name], **ROUNDED)


PAINTED = """(chart, token) => {
    const [canvas, plot] = [chart.querySelector("canvas"), chart.querySelector(".u-over")];
    const probe = document.body.appendChild(document.createElement("i"));
    probe.style.color = `var(${token})`;
    const colour = getComputedStyle(probe).color.match(/\\d+/g).slice(0, 3).map(Number);
    probe.remove();
    const {data, width} = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
    const scale = width / canvas.clientWidth, columns = new Set();
    for (let at = 0; at < data.length; at += 4)
        if (colour.every((part, channel) => data[at + channel] === part)) columns.add((at / 4) % width);
    return [...columns].map(column => (column / scale - plot.offsetLeft) / plot.offsetWidth);
}"""  # where a colour is on a chart, from its left end at 0 to its right end at 1


def test_the_histogram_has_the_hits_marked_where_they_lie(
    url: str, client: Client, shown: Callable[..., Visit]
) -> None:
    (result,) = client.influence(query_rows=[7], include=["histogram"]).results
    assert result.distribution is not None
    assert result.distribution.histogram is not None
    edges = result.distribution.histogram.edges
    rows = sum(result.distribution.histogram.counts)
    visit = shown(url, "#/answer?query=7")
    chart = visit.page.get_by_role("img", name=re.compile(f"^Histogram of {rows} scores from "))
    chart.wait_for()
    low, high = re.findall("from (\\S+) to (\\S+);", chart.get_attribute("aria-label") or "")[0]
    assert (number(low), number(high)) == pytest.approx((edges[0], edges[-1]), **ROUNDED)
    for token, hits in (("--proponent-fill", result.proponents), ("--opponent-fill", result.opponents)):
        places = [(hit.score - edges[0]) / (edges[-1] - edges[0]) for hit in hits]
        wait_until(lambda token=token, places=places: marked(chart.evaluate(PAINTED, token), places))


def marked(painted: list[float], places: list[float], tolerance: float = 0.012) -> bool:
    """Whether the painted columns are at the places, and nowhere else."""
    away = np.abs(np.subtract.outer(painted, places))
    return bool(len(painted)) and bool((away.min(0) < tolerance).all() and (away.min(1) < tolerance).all())


def test_scores_are_summed_by_a_feature_or_a_range_of_values(
    url: str, task: Any, client: Client, shown: Callable[..., Visit]
) -> None:
    visit = shown(url, "#/answer?query=7")
    panel = visit.page.get_by_role("region", name="Sums of scores")
    choice = panel.get_by_label("Column of the sums")
    for by in ("feature:ocean_proximity", "feature:median_income", "label"):
        choice.select_option(by)
        (result,) = client.groups(query_rows=[7], by=by).results
        wait_until(lambda groups=result.groups: panel.locator("li").count() == len(groups))
        sums = [group.sum for group in result.groups]
        wait_until(lambda sums=sums: shown_sums(panel) == pytest.approx(sums, **ROUNDED))
        names = panel.locator("li .name").all_inner_texts()
        for name, group in zip(names, result.groups, strict=True):
            expected = (
                [group.group] if group.bounds is None else [pytest.approx(bound, rel=1e-5) for bound in group.bounds]
            )
            assert [name] == expected or [number(bound) for bound in name.split(" to ")] == expected
    visit = shown(url, "#/answer?query=7&sums=feature:ocean_proximity")  # as a link that was sent
    places = {features(task, "train", row)["ocean_proximity"] for row in range(400) if row not in DELETED}
    names = visit.page.get_by_role("region", name="Sums of scores").locator("li .name")
    wait_until(lambda: set(names.all_inner_texts()) == places)


def shown_sums(panel: Any) -> list[float]:
    return [number(text) for text in panel.locator("li .number").all_inner_texts()]


def test_an_answer_is_saved_as_a_file(url: str, client: Client, shown: Callable[..., Visit]) -> None:
    (result,) = client.influence(query_rows=[7]).results
    visit = shown(url, "#/answer?query=7")
    visit.rows("Proponents")
    with visit.page.expect_download() as saved:
        visit.page.get_by_role("button", name="Save as file").click()
    text = Path(saved.value.path()).read_bytes()
    document = html5lib.parse(text, namespaceHTMLElements=False)
    assert document.find(".//script") is None
    titles = ["".join(title.itertext()) for title in document.iter("h4")]
    rows = [int(row) for title in titles for row in re.findall(r"\bRow (\d+)", title)]
    assert rows == [hit.row for hit in (*result.proponents, *result.opponents)]
    assert b"median_income" in text


# Compare


def test_two_methods_are_compared_and_what_they_share_is_marked(
    url: str, client: Client, shown: Callable[..., Visit]
) -> None:
    questions = [{"query_rows": [7], "method": method} for method in ("tracin", "influence")]
    first, second = (client.influence(**question).results[0] for question in questions)
    visit = shown(url, "#/compare?query=7")
    assert visit.compared_rows("^First: tracin") == rows_of(first)
    assert visit.compared_rows("^Second: influence") == rows_of(second)
    compared = client.compare(*questions)
    name = f"Scores of {compared.rows} rows: correlation {compared.pearson:.3f}"
    visit.page.get_by_role("img", name=name).wait_for()
    shared = len(set(rows_of(first)[:10]) & set(rows_of(second)[:10]))
    shared += len(set(rows_of(first)[10:]) & set(rows_of(second)[10:]))
    assert shared
    assert visit.page.get_by_text(re.compile("^in both")).count() == 2 * shared


def rows_of(result: Influence) -> list[int]:
    return [hit.row for hit in (*result.proponents, *result.opponents)]


# Clean


def test_houses_are_marked_by_quick_keys_without_a_suggested_price_and_exported(
    url: str, client: Client, shown: Callable[..., Visit], tmp_path: Path
) -> None:
    expected = [hit.row for hit in client.self_influence(k=6).results]
    visit = shown(url, "#/clean")
    assert visit.listed_rows(6)[:6] == expected
    assert visit.page.get_by_label("Suggested label").input_value() == ""  # no value is right because it is predicted
    visit.press("w", "r", "x", "u")
    kept = dict(zip(expected, ["wrong", "right", "remove", "unsure"], strict=False))
    wait_until(lambda: kinds(client) == kept)
    visit.press("z")
    wait_until(lambda: expected[3] not in kinds(client))
    visit.page.get_by_label(re.compile(f"^row {expected[0]}, .*, marked wrong · ")).wait_for()
    assert [mark.label for mark in client.marks().results] == [None] * 3
    visit.page.get_by_role("link", name=re.compile("Act on the marks")).click()
    with visit.page.expect_download() as download:
        visit.page.get_by_role("button", name="CSV").click()
    download.value.save_as(tmp_path / "marks.csv")
    with (tmp_path / "marks.csv").open(newline="") as file:
        lines = {int(line["row"]): line["mark"] for line in csv.DictReader(file)}
    assert lines == {row: kind for row, kind in kept.items() if kind != "unsure"}


def test_what_removal_would_do_is_predicted(url: str, client: Client, shown: Callable[..., Visit]) -> None:
    rows = [hit.row for hit in client.self_influence(k=4).results]
    client.mark(rows, "remove")
    effect = client.removal(rows, query_rows=SAMPLE, method="influence")
    changes = [result.predicted_change or 0 for result in effect.results]
    visit = shown(url, "#/clean?part=act")
    region = visit.page.get_by_role("region", name="Removal")
    better = sum(change < 0 for change in changes)
    region.get_by_text(f"Without 4 rows: {better} of {len(SAMPLE)} queries would have a lower loss").wait_for()
    before, after = re.findall(r"[\d.,]+", region.locator(".change-numbers").inner_text())[:2]
    assert number(before) == pytest.approx(effect.mean.loss, **ROUNDED)
    assert number(after) == pytest.approx(effect.mean.loss + np.mean(changes), **ROUNDED)


def test_rows_are_ordered_by_harm_to_the_queries_that_are_fitted_worst(
    url: str, client: Client, shown: Callable[..., Visit]
) -> None:
    wait_until(lambda: not client.list_examples("query", k=1, order="-loss").pending)
    queries = [row.row for row in client.list_examples("query", order="-loss", k=128).results]
    harmful = client.influence(query_rows=queries, aggregate="mean", k=8).results[0].opponents
    visit = shown(url, "#/clean")
    visit.page.get_by_role("link", name="Harm to queries").click()
    visit.page.get_by_text(f"Mean over 128 query rows with the highest loss, of {QUERIES} such rows.").wait_for()
    wait_until(lambda: visit.listed_rows(8)[:8] == [hit.row for hit in harmful])
    for name in ("Label", "Harm to queries of", "Predicted as another class"):  # there is no class
        assert visit.page.get_by_label(name, exact=True).count() == 0
    visit.page.get_by_role("link", name="Highest loss").click()
    worst = [row.row for row in client.list_examples("train", order="-loss", k=8).results]
    wait_until(lambda: visit.listed_rows(8)[:8] == worst)


# Overview and Operate


@pytest.mark.everyday
def test_a_click_on_the_map_explains_the_house_that_lies_there(
    url: str, task: Any, client: Client, shown: Callable[..., Visit]
) -> None:
    places = task.train.inputs[:, :2].numpy()
    row = most_remote(places)
    visit = shown(url, "#/overview?colour=label")
    name = re.compile(r"^Map of \d+ training rows by longitude and latitude, coloured by value$")
    plot = visit.page.get_by_role("img", name=name).locator(".u-over")
    plot.scroll_into_view_if_needed()
    box = plot.bounding_box()
    share = (places[row] - places.min(0) + 0.04 * np.ptp(places, 0)) / (1.08 * np.ptp(places, 0))
    x, y = box["x"] + share[0] * box["width"], box["y"] + (1 - share[1]) * box["height"]
    visit.page.mouse.move(float(x), float(y))
    visit.page.get_by_text(f"row {row}: value {task.train[row][1]:,.0f}").wait_for()
    visit.page.mouse.click(float(x), float(y))
    assert visit.rows("Proponents") == told(client, "proponents", train_rows=[row])
    assert f"train={row}" in visit.page.url


def most_remote(places: NDArray[np.float32]) -> int:
    """The row whose nearest neighbour is furthest, in shares of the map; not one at its edge."""
    scaled = (places - places.min(0)) / np.ptp(places, 0)
    distances = np.linalg.norm(scaled[:, None] - scaled, axis=2) + np.eye(len(scaled))
    distances[(scaled < 0.05).any(1) | (scaled > 0.95).any(1)] = 0
    distances[list(DELETED)] = 0
    return int(distances.min(1).argmax())


def test_the_overview_of_values_has_no_classes(url: str, client: Client, shown: Callable[..., Visit]) -> None:
    visit = shown(url, "#/overview")
    wait_until(lambda: not client.overview().pending)
    last = client.overview().loss_by_checkpoint[-1].mean_loss
    chart = visit.page.get_by_role("img", name=re.compile("^Mean loss of the training rows"))
    chart.wait_for()
    wait_until(lambda: number(chart.get_attribute("aria-label").split(": ")[-1]) == pytest.approx(last, **ROUNDED))
    influential = client.influence(query_rows=SAMPLE, aggregate="mean", k=5).results[0]
    assert visit.compared_rows("^Most influential rows") == rows_of(influential)
    for name in ("Classes", "Influence by class"):
        assert visit.page.get_by_role("region", name=name, exact=True).count() == 0


def test_a_generation_is_rolled_back_to(url: str, client: Client, shown: Callable[..., Visit]) -> None:
    visit = shown(url, "#/operate")
    table = visit.page.get_by_role("region", name="Table of generations")
    for kept in client.generations().generations:
        current = "current " if kept.current else ""
        name = f"^{kept.generation} {current}{kept.reason} {kept.rows} {kept.checkpoints} "
        table.get_by_role("row", name=re.compile(name)).wait_for()
    before = client.index().generation
    rows = client.index().rows - client.index().deleted
    table.get_by_role("button", name="Roll back to generation 1").click()
    visit.page.get_by_role("dialog").get_by_role("button", name="Roll back", exact=True).click()
    job = visit.page.get_by_role("region", name="Jobs").get_by_role("article", name="Roll back to generation 1")
    job.get_by_text("succeeded").wait_for(timeout=JOB_MS)
    table.get_by_role("row", name=re.compile(f"^{before + 1} current roll back {rows + len(DELETED)} ")).wait_for()
    wait_until(lambda: client.index().deleted == 0)


# Everybody

VIEWS = {
    "ask": ".line-row",
    "ask?from=own": ".table-form",
    "answer?query=7": "table.differences",
    "compare?query=7": ".cmp-agreement canvas",
    "clean": ".clean-current table.features",
    "clean?part=act": ".clean-effects",
    "overview": ".ov-map canvas",
    "operate": ".op-table",
}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_keeps_people_out(url: str, client: Client, shown: Callable[..., Visit], scheme: str) -> None:
    client.mark([11], "remove")
    assert shown(url, "", color_scheme=scheme).violations_of(VIEWS) == {}
