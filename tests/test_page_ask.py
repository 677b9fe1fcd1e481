"""Ask and Answer in a real browser; what is shown is compared with what the SDK is told."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import tiny
from conftest import DigitsRun, serving_when_ready
from gradtrace.tasks import TabularRegression, TextClassification, Vocabulary
from gradtrace_client import Client
from gradtrace_service.app import create_app
from gradtrace_service.http.api_keys import Scope, add_key
from gradtrace_service.server import serving
from gradtrace_service.settings import Settings
from page_browser import Visit, told

SCRIPT = '<img src=x onerror="window.harmed=1"><script>window.harmed=1</script>'


@pytest.fixture
def visit(browser: Any, url: str) -> Iterator[Visit]:
    """Of the service over the digits. Afterwards, the browser must have had nothing to complain about."""
    visit = Visit(browser, url)
    yield visit
    visit.page.context.close()
    assert not visit.complaints


@pytest.mark.everyday
def test_a_click_on_an_example_shows_both_ends_of_its_answer(visit: Visit, client: Client) -> None:
    visit.page.get_by_role("listitem").nth(7).get_by_role("link").click()
    assert visit.rows("Proponents") == told(client, "proponents", query_rows=[7])
    assert visit.rows("Opponents") == told(client, "opponents", query_rows=[7])
    label = client.influence(query_rows=[7]).results[0].query.label_name
    visit.page.get_by_text(f"pushed towards {label}").wait_for()
    visit.page.get_by_role("img", name=re.compile("Histogram of 400 scores")).wait_for()
    cards = len(told(client, "proponents", query_rows=[7])) + len(told(client, "opponents", query_rows=[7]))
    assert visit.page.get_by_role("img", name=re.compile("Score by checkpoint: ")).count() == cards
    visit.page.get_by_role("img", name=re.compile("Score by layer: ")).first.wait_for()
    assert visit.page.get_by_label("Sums of scores").get_by_role("listitem").count() == 10
    visit.page.get_by_text("More about the score").click()
    visit.page.get_by_text("Positive: a proponent").first.wait_for()


@pytest.mark.everyday
def test_keys_alone_lead_from_an_example_to_its_answer(visit: Visit, client: Client) -> None:
    page = visit.page
    page.get_by_role("listitem").first.get_by_role("link").wait_for()
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.matches('[data-at]')"):
            break
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.locator('[data-at="2"]:focus').wait_for()
    page.keyboard.press("Enter")
    assert visit.rows("Proponents") == told(client, "proponents", query_rows=[2])


def test_a_link_shows_the_same_and_the_back_button_leads_back(browser: Any, visit: Visit, client: Client) -> None:
    visit.page.get_by_role("listitem").nth(3).get_by_role("link").click()
    visit.page.get_by_label("Method").select_option("cosine")
    visit.page.get_by_label("Rows at each end").select_option("5")
    expected = told(client, "proponents", query_rows=[3], method="cosine", k=5)
    visit.page.get_by_role("article").nth(10).wait_for(state="detached")
    assert visit.rows("Proponents") == expected
    other = Visit(browser, visit.url, "#" + visit.page.url.partition("#")[2])
    assert other.rows("Proponents") == expected
    visit.page.go_back()
    visit.page.get_by_role("heading", name="What should be explained?").wait_for()


def test_lists_are_narrowed_by_class_and_wrong_predictions(visit: Visit, client: Client) -> None:
    page = visit.page
    page.get_by_role("link", name="Training set").click()
    page.get_by_label("Class", exact=True).select_option("three")
    expected = client.list_examples("train", labels=[3], k=1000)
    page.get_by_text(f"{expected.rows_total} of 400 rows").wait_for()
    page.get_by_label("Wrong only").check()
    wrong = client.list_examples("train", labels=[3], correct=False, k=1000)
    if wrong.rows_total:
        page.get_by_text(f"{wrong.rows_total} of 400 rows").wait_for()
    else:
        page.get_by_role("heading", name="No row is like this").wait_for()
        page.get_by_role("button", name="Show all rows").click()
        page.get_by_text("400 rows", exact=True).wait_for()


def test_several_rows_are_explained_as_their_mean(visit: Visit, client: Client) -> None:
    page = visit.page
    page.get_by_role("button", name="Choose several").click()
    for at in (1, 4, 6):
        page.get_by_role("listitem").nth(at).get_by_role("button").click()
    page.get_by_text("3 rows chosen").wait_for()
    page.get_by_role("link", name="Explain their mean").click()
    assert visit.rows("Proponents") == told(client, "proponents", query_rows=[1, 4, 6], aggregate="mean")
    page.get_by_role("heading", name="The mean of 3 rows").wait_for()


def test_another_class_and_a_contrast_are_asked_for(visit: Visit, client: Client) -> None:
    visit.go("#/answer?query=5")
    visit.rows("Proponents")
    visit.page.get_by_label("Probabilities").get_by_role("button").nth(1).click()
    (label,) = re.findall(r"target=(\d+)", visit.page.url)
    visit.page.get_by_text(re.compile(r"^What speaks for \w+ in query row 5\?$")).wait_for()
    assert visit.rows("Proponents") == told(client, "proponents", query_rows=[5], target={"label": int(label)})
    visit.page.get_by_label("Explain").select_option("contrast")
    visit.page.get_by_label("Why", exact=True).select_option("4")
    visit.page.get_by_label("Rather than").select_option("9")
    visit.page.get_by_role("heading", name="What speaks for four rather than nine").wait_for()
    contrast = {"label": 4, "rather_than": 9}
    assert visit.rows("Opponents") == told(client, "opponents", query_rows=[5], target=contrast)


def test_training_rows_are_filtered_and_checkpoints_chosen(visit: Visit, client: Client) -> None:
    visit.go("#/answer?query=5")
    visit.rows("Proponents")
    visit.page.get_by_text("All 3 checkpoints").click()
    visit.page.get_by_role("group", name="Checkpoints").get_by_role("checkbox").first.uncheck()
    visit.page.get_by_text("All training rows", exact=True).click()
    visit.page.get_by_label("Label", exact=True).select_option("five")
    visit.page.get_by_role("button", name="Remove five").wait_for()
    visit.page.get_by_text("of 400 rows read").wait_for(state="detached")
    names = [checkpoint.name for checkpoint in client.index().checkpoints][1:]
    expected = told(client, "proponents", query_rows=[5], checkpoints=names, filter={"labels": [5]})
    assert visit.rows("Proponents") == expected


@pytest.mark.everyday
def test_a_picture_of_ones_own_is_given_or_drawn(visit: Visit, tmp_path: Path) -> None:
    page = visit.page
    page.get_by_role("link", name="Your own").click()
    Image.fromarray(np.tile(np.arange(40, dtype=np.uint8) * 6, (60, 1))).save(tmp_path / "picture.png")
    page.get_by_label("Picture file").set_input_files(tmp_path / "picture.png")
    preview = page.get_by_role("img", name="the picture at the model's size")
    preview.wait_for()
    assert preview.evaluate("image => image.decode().then(() => image.naturalWidth)") == 8
    page.get_by_label("Picture file").set_input_files(
        {"name": "a.png", "mimeType": "image/png", "buffer": b"no picture"}
    )
    page.get_by_text("is not a picture that the browser can read").wait_for()
    box = page.get_by_role("application").bounding_box()
    page.mouse.move(box["x"] + 128, box["y"] + 30)
    page.mouse.down()
    page.mouse.move(box["x"] + 120, box["y"] + 220, steps=8)
    page.mouse.up()
    page.get_by_label("Its label").select_option("one")
    page.get_by_role("button", name="Explain it").click()
    assert visit.rows("Proponents")
    page.get_by_role("heading", name=re.compile("[Yy]our own example")).wait_for()
    page.get_by_role("button", name="Change it and ask again").click()
    preview.wait_for()


def test_rows_are_asked_for_beside_the_details_of_the_index_and_once(visit: Visit) -> None:
    page, asked, held = visit.page, list[str](), list[Any]()
    page.get_by_role("listitem").first.get_by_role("link").wait_for()
    page.on("request", lambda request: asked.append(request.url))
    page.route(re.compile(r"/index$"), lambda route: held.append(route))
    with page.expect_request(re.compile("/examples/query")):
        page.reload()
    assert not page.get_by_role("listitem").count()
    while not held:
        page.wait_for_timeout(20)
    held.pop().continue_()
    page.get_by_role("listitem").first.get_by_role("link").wait_for()
    page.wait_for_load_state("networkidle")
    assert sum("/examples/query?offset=0&" in url for url in asked) == 1


def test_only_visible_rows_are_drawn_and_fetched(visit: Visit) -> None:
    asked = list[str]()
    visit.page.on("request", lambda request: asked.append(request.url))
    visit.page.get_by_role("link", name="Training set").click()
    visit.page.get_by_text("400 rows", exact=True).wait_for()
    assert visit.page.get_by_role("listitem").count() < 250
    visit.page.keyboard.press("End")
    visit.page.evaluate("scrollTo(0, document.body.scrollHeight)")
    visit.page.get_by_role("img", name="row 399", exact=True).wait_for()
    offsets = {int(offset) for url in asked for offset in re.findall(r"offset=(\d+)", url)}
    assert max(offsets) == 360


@pytest.mark.everyday
def test_a_key_is_asked_for_and_kept_out_of_the_address(browser: Any, digits_index: DigitsRun, tmp_path: Path) -> None:
    key = add_key(tmp_path / "keys", "reader", [Scope.query])
    with serving_when_ready(create_app(digits_index.open(), Settings(api_key_file=tmp_path / "keys"))) as url:
        visit = Visit(browser, url)
        visit.page.get_by_label("API key").fill("wrong")
        visit.page.keyboard.press("Enter")
        visit.page.get_by_text("did not accept the key").wait_for()
        visit.page.get_by_label("API key").fill(key)
        visit.page.get_by_role("button", name="Sign in").click()
        visit.page.get_by_role("listitem").nth(1).get_by_role("link").click()
        assert visit.rows("Proponents")
        assert key not in visit.page.url
        assert key not in visit.page.evaluate("JSON.stringify(localStorage)")
        visit.page.reload()
        assert visit.rows("Proponents")


def test_it_waits_for_a_service_that_is_restarted(browser: Any, digits_index: DigitsRun) -> None:
    with serving_when_ready(create_app(digits_index.open())) as url:
        port = int(url.rpartition(":")[2])
        visit = Visit(browser, url, "#/answer?query=1")
        visit.rows("Proponents")
    visit.page.get_by_role("link", name="The row after").click()
    visit.page.get_by_text("Waiting for the service").wait_for()
    with serving(create_app(digits_index.open()), port=port), Client(url) as client:
        visit.page.get_by_role("heading", name=re.compile("query row 2", re.IGNORECASE)).wait_for()
        visit.page.get_by_text("Waiting for the service").wait_for(state="detached")
        assert visit.rows("Proponents") == told(client, "proponents", query_rows=[2])


def test_it_works_below_the_prefix_of_a_proxy(browser: Any, digits_index: DigitsRun) -> None:
    app = create_app(digits_index.open())

    async def below(scope: Any, receive: Any, send: Any) -> None:
        """As a proxy does: takes the prefix away, and knows no other address."""
        if scope["type"] == "http":
            prefix, path = "/some/where", scope["path"]
            scope = scope | {"path": path.removeprefix(prefix) if path.startswith(prefix) else "/outside"}
        await app(scope, receive, send)

    below.state = app.state  # type: ignore[attr-defined]  # as a server looks for it
    with serving(below) as url:  # type: ignore[arg-type]
        visit = Visit(browser, f"{url}/some/where", "#/answer?query=1")
        assert visit.rows("Proponents")
        assert not visit.complaints


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.classifier = nn.Embedding(80, 4), nn.Linear(4, 2)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.classifier((self.words(ids) * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))


def text_task() -> TextClassification:
    texts = [f"{SCRIPT} the film number {row} was {'fine' if row % 2 else 'dull'}" for row in range(12)]
    vocabulary, data = Vocabulary(texts, 80), (texts, [row % 2 for row in range(12)])
    names = (f"dull {SCRIPT}", "fine")
    return TextClassification(
        Words, data, data, vocabulary_size=80, encode=lambda text: vocabulary.encode(text, 40), class_names=names
    )


@pytest.mark.everyday
def test_texts_are_searched_pasted_and_never_run(browser: Any, tmp_path: Path) -> None:
    with serving_when_ready(create_app(tiny.build(text_task(), tmp_path))) as url:
        visit = Visit(browser, url)
        visit.page.get_by_label("Search").fill("dull")
        visit.page.get_by_text("6 of 12 rows").wait_for()
        visit.page.get_by_role("link", name="Your own").click()
        visit.page.get_by_label("Text", exact=True).fill(f"a dull film {SCRIPT}")
        visit.page.get_by_role("button", name="Explain it").click()
        visit.rows("Opponents")
        visit.page.locator("mark", has_text="film").first.wait_for()
        assert visit.page.get_by_text('<img src=x onerror="window.harmed=1">').count() > 3
        assert visit.page.evaluate("window.harmed") is None
        assert not visit.complaints
        assert visit.violations() == []


def house_task() -> TabularRegression:
    houses = [[41.0, 3, "INLAND"], [None, 5, "ISLAND"], [12.5, 2, "INLAND"], [7.0, 1, "BAY"]] * 5
    return TabularRegression(
        lambda: nn.Linear(5, 1),
        (houses, [float(row) for row in range(20)]),
        (houses[:4], [1.5, 2.0, 3.0, 4.0]),
        feature_names=("age", "rooms", "place"),
        categories={"place": ("BAY", "INLAND", "ISLAND")},
        fill={"age": 20.0},
        mean=(20.0, 3.0),
        std=(10.0, 2.0),
    )


def test_a_row_of_a_table_is_filled_in_within_its_ranges(browser: Any, tmp_path: Path) -> None:
    with serving_when_ready(create_app(tiny.build(house_task(), tmp_path))) as url, Client(url) as client:
        visit = Visit(browser, url, "#/ask?from=own")
        visit.page.get_by_text("training data: 7 to 41").wait_for()
        visit.page.get_by_label("age", exact=True).fill("30")
        visit.page.get_by_label("rooms", exact=True).fill("50")
        visit.page.get_by_text("outside of the training data: 1 to 5").wait_for()
        visit.page.get_by_label("place").select_option("ISLAND")
        visit.page.get_by_label("Its label").fill("2.5")
        visit.page.get_by_role("button", name="Explain it").click()
        example = {"features": {"age": 30, "rooms": 50, "place": "ISLAND"}, "label": 2.5}
        assert visit.rows("Proponents") == told(client, "proponents", example=example)
        visit.page.get_by_role("table").nth(1).get_by_text("+", exact=False).or_(
            visit.page.get_by_text("not ISLAND")
        ).first.wait_for()
        assert visit.violations() == []
