"""Clean in a real browser: rows in their orders, marks by keys and of several people, and what is done with them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.parquet
import pytest

import digits_task
from conftest import DigitsRun, wait_until
from gradtrace_client import Client
from gradtrace_service.app import create_service
from gradtrace_service.http.api_keys import Scope, add_key
from gradtrace_service.indexes.hosted import Hosted
from gradtrace_service.server import serving
from gradtrace_service.settings import Settings
from page_browser import Visit, kinds

JOB_MS = 600_000  # of a job, whose process loads PyTorch first

SCRIPT = "<img src=x onerror=harmed=1><script>harmed=1</script>"


@pytest.fixture
def address(copied_run: DigitsRun, tmp_path: Path) -> Iterator[str]:
    """Of a service over an index of its own, whose task can be trained."""
    hosted = Hosted("digits", copied_run.index, f"{digits_task.__file__}:RETRAINED")
    with serving(create_service([hosted], Settings(processes=0, state=tmp_path / "state.sqlite"))) as url:
        yield url


@pytest.mark.everyday
def test_rows_are_marked_by_quick_keys_and_undone(address: str, shown: Callable[..., Visit]) -> None:
    with Client(address) as client:
        first = [hit.row for hit in client.self_influence(k=6).results]
        visit = shown(address, "#/clean")
        assert visit.listed_rows(6)[:6] == first
        visit.press("w", "r", "u", "j", "x")
        expected = dict(zip(first, ["wrong", "right", "unsure", None, "remove"], strict=False))
        wait_until(lambda: kinds(client) == {row: kind for row, kind in expected.items() if kind})
        visit.press("z")
        wait_until(lambda: first[4] not in kinds(client))
        visit.page.get_by_text("3 of the first 200 rows marked").wait_for()
        visit.press("k", "k", "k", "k")
        assert f"row={first[0]}" in visit.page.url
        visit.page.get_by_role("button", name="Clear").click()
        wait_until(lambda: first[0] not in kinds(client))
        visit.page.get_by_label("Quick keys").uncheck()
        visit.press("x")
        visit.page.get_by_role("button", name="Remove").click()
        wait_until(lambda: kinds(client).get(first[0]) == "remove")


@pytest.mark.everyday
def test_the_prediction_is_suggested_and_a_note_is_shown_as_text(address: str, shown: Callable[..., Visit]) -> None:
    with Client(address) as client:
        worst = client.list_examples("train", correct=False, order="-loss", k=1).results[0]
        visit = shown(address, "#/clean?by=disagree")
        assert visit.listed_rows()[0] == worst.row
        visit.press("w")
        wait_until(lambda: kinds(client) == {worst.row: "wrong"})
        assert client.marks().results[0].label == worst.prediction
        visit.go(f"#/clean?by=disagree&row={worst.row}")
        visit.page.get_by_role("heading", name=f"Row {worst.row}").wait_for()
        visit.page.get_by_role("textbox", name="Note").fill(SCRIPT)
        visit.page.get_by_role("textbox", name="Note").press("Enter")
        wait_until(lambda: client.marks().results[0].note == SCRIPT)
        visit.page.get_by_role("combobox", name="Suggested label").select_option("three")
        wait_until(lambda: client.marks().results[0].label == 3)
        visit.page.get_by_text("suggested label three").first.wait_for()
        visit.press("u")
        wait_until(lambda: kinds(client) == {worst.row: "unsure"})
        assert (client.marks().results[0].label, client.marks().results[0].note) == (3, SCRIPT)
        assert visit.page.evaluate("globalThis.harmed") is None


def test_quick_keys_end_where_they_should(address: str, shown: Callable[..., Visit]) -> None:
    """Rows that were passed are given the focus after the next key is pressed: they must not take the place back."""
    with Client(address) as client:
        visit = shown(address, "#/clean")
        rows = visit.listed_rows(15)
        visit.page.get_by_role("list", name="Rows to look at").get_by_role("button").first.click()
        visit.press(*"jjjjjjjjjjjj", "w")
        wait_until(lambda: kinds(client) == {rows[12]: "wrong"})
        visit.press(*"kkkkkkkkkkkkk", "x")
        wait_until(lambda: kinds(client) == {rows[12]: "wrong", rows[0]: "remove"})


def test_quick_keys_go_on_after_a_field(address: str, shown: Callable[..., Visit]) -> None:
    """A note ends with Enter; labels that are stepped through by keys end with Escape."""
    with Client(address) as client:
        visit = shown(address, "#/clean")
        first, second, *_ = visit.listed_rows(6)
        visit.page.get_by_role("textbox", name="Note").fill("faint")
        visit.press("Enter", "w")
        wait_until(lambda: {mark.row: (mark.mark, mark.note) for mark in client.marks().results}[first][0] == "wrong")
        assert client.marks().results[0].note == "faint"
        visit.page.get_by_role("heading", name=f"Row {second}").wait_for()
        field = visit.page.get_by_role("combobox", name="Suggested label")
        field.select_option("three")
        wait_until(lambda: second in kinds(client))
        field.focus()
        visit.press("ArrowDown", "ArrowDown")
        wait_until(lambda: client.marks(rows=[second]).results[0].label == 5)
        assert field.evaluate("field => field === document.activeElement")
        visit.press("Escape", "x")
        wait_until(lambda: kinds(client) == {first: "wrong", second: "remove"})


def test_rows_are_ordered_by_harm_to_a_class_of_wrong_queries(address: str, shown: Callable[..., Visit]) -> None:
    with Client(address) as client:
        wrong = client.list_examples("query", correct=False, order="-loss", k=128).results
        queries = [row.row for row in wrong]
        harmful = client.influence(query_rows=queries, aggregate="mean", k=8).results[0].opponents
        visit = shown(address, "#/clean")
        visit.page.get_by_role("link", name="Harm to queries").click()
        visit.page.get_by_text(f"Mean over {len(queries)} query rows that are predicted wrongly.").wait_for()
        assert visit.listed_rows(8)[:8] == [hit.row for hit in harmful]
        visit.page.get_by_label("Harm to queries of").select_option(wrong[0].label_name)
        of_class = [row.row for row in wrong if row.label == wrong[0].label]
        harmful = client.influence(query_rows=of_class, aggregate="mean", k=3).results[0].opponents
        visit.page.get_by_text(re.compile(f"Mean over {len(of_class)} query rows? that are|that is")).first.wait_for()
        wait_until(lambda: visit.listed_rows(3)[:3] == [hit.row for hit in harmful])


def test_two_people_see_each_others_marks_and_no_mark_is_overwritten_unseen(
    digits_index: DigitsRun, tmp_path: Path, shown: Callable[..., Visit]
) -> None:
    keys = {name: add_key(tmp_path / "keys", name, [Scope.query]) for name in ("anna", "ben")}
    settings = Settings(processes=0, state=tmp_path / "state.sqlite", api_key_file=tmp_path / "keys")
    hosted = Hosted("digits", digits_index.index, digits_index.task)
    with serving(create_service([hosted], settings)) as url, Client(url, api_key=keys["ben"]) as ben:
        first, second = (hit.row for hit in ben.self_influence(k=2).results)
        visit = shown(url, "#/clean")
        visit.page.get_by_label("API key").fill(keys["anna"])
        visit.page.get_by_role("button", name="Sign in").click()
        visit.listed_rows(2)
        ben.mark([second], "unsure")
        visit.page.get_by_label("Marked last").get_by_text(re.compile("^ben · ")).wait_for()
        visit.page.get_by_label(re.compile(f"row {second}, .*marked unsure · ben")).wait_for()

        visit.page.route("**/events", lambda route: route.abort())  # from here on she does not see what he does
        visit.go("#/ask")
        visit.go("#/clean")
        visit.page.get_by_label(re.compile(f"row {second}, .*marked unsure · ben")).wait_for()
        ben.mark([first], "right")
        visit.press("w")
        visit.page.get_by_role("alert").get_by_text("ben has set this to right").wait_for()
        assert kinds(ben)[first] == "right"
        visit.page.get_by_role("button", name="Set mine").click()
        wait_until(lambda: kinds(ben)[first] == "wrong")
        assert {mark.row: mark.who for mark in ben.marks().results} == {first: "anna", second: "ben"}


def test_marks_are_exported_removed_and_retrained_without(
    address: str, shown: Callable[..., Visit], tmp_path: Path
) -> None:
    rows = [11, 25, 240]
    with Client(address) as client:
        client.mark(rows, "remove")
        client.mark([77], "wrong", label="two")
        visit = shown(address, "#/clean?part=act")
        files = {}
        for name, ending in (("CSV", "csv"), ("Parquet", "parquet"), ("Row numbers", "txt")):
            with visit.page.expect_download() as download:
                visit.page.get_by_role("button", name=name).click()
            files[ending] = tmp_path / f"marks.{ending}"
            download.value.save_as(files[ending])
        assert [line.split(",")[0] for line in files["csv"].read_text().splitlines()] == [
            "row",
            "11",
            "25",
            "77",
            "240",
        ]
        assert pyarrow.parquet.read_table(files["parquet"])["row"].to_pylist() == [11, 25, 77, 240]
        assert files["txt"].read_text().split() == ["11", "25", "77", "240"]

        region = visit.page.get_by_role("region", name="Removal")
        region.get_by_label("Predicted by").select_option("influence")
        region.get_by_text(re.compile(r"Without 3 rows: \d+ of 60 queries")).wait_for()
        mean = client.removal(rows, query_rows=list(range(60)), method="influence").mean
        assert mean.predicted_change is not None
        region.get_by_text("lower" if mean.predicted_change < 0 else "higher").first.wait_for()

        training = visit.page.get_by_role("region", name="Retraining")
        training.get_by_role("button", name="Train without 3 rows").click()
        training.get_by_text("Measured, accuracy").wait_for(timeout=JOB_MS)
        training.get_by_text("Predicted by influence, mean loss").wait_for()
        training.get_by_text("Measured, mean loss").wait_for()

        deletion = visit.page.get_by_role("region", name="Deletion")
        deletion.get_by_role("button", name="Delete 3 rows").click()
        visit.page.get_by_role("dialog").get_by_role("button", name="Delete", exact=True).click()
        deletion.get_by_text("succeeded").wait_for(timeout=JOB_MS)
        wait_until(lambda: client.index().generation == 2)
        assert client.generations().generations[0].rows == 397
        deletion.get_by_role("button", name="Clear the marks of these 3 rows").click()
        wait_until(lambda: kinds(client) == {77: "wrong"})
