"""No text that comes from data, tasks, files, people or addresses is run by the page, or becomes a part of it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

import hostile_strings
import tiny
from conftest import wait_until
from gradtrace import Task
from gradtrace_client import Client
from gradtrace_service.app import create_service
from gradtrace_service.http.api_keys import Scope, add_key, read_keys
from gradtrace_service.indexes.hosted import Hosted
from gradtrace_service.server import serving
from gradtrace_service.settings import Settings, SettingsError
from hostile_strings import FILE_NAME, INDEX_NAME, SCRIPT
from page_browser import Visit

TASKS = {INDEX_NAME: "TEXTS", "table": "TABLE", "elsewhere": "ELSEWHERE"}
PLACES = (
    "ask", "ask?from=train", "ask?from=own", "ask?from=saved", "answer?query=1", "answer?query=1,2", "answer?train=3",
    "compare", "overview", "clean", "clean?by=disagree", "clean?by=harm", "clean?part=act", "operate",
)  # fmt: skip
ADDRESSES = (
    "{script}",
    "ask?index={script}",
    "ask?text={script}",
    "ask?from={script}&order={script}",
    "answer?query={script}",
    "answer?query=1&method={script}",
    "answer?query=1&checkpoints={script}",
    "answer?query=1&target={script}",
    "answer?example={example}",
    "compare?first={script}&second={script}",
    "clean?by={script}&row={script}",
    "clean?part=act&forecast={script}&deletion={script}&retraining={script}",
    "overview?colour={script}&method={script}",
)


def build(task: Task, folder: Path) -> Path:
    """An index whose checkpoints have names of that kind."""
    (checkpoint,) = tiny.checkpoints(task, folder / "checkpoints", 1)
    named = checkpoint.path.rename(checkpoint.path.with_name(f"{FILE_NAME}{checkpoint.path.suffix}"))
    checkpoints = [dataclasses.replace(checkpoint, path=named)]
    tiny.build_index(task, checkpoints, folder / "index", progress=False, basis="none", precision="float16")
    return folder / "index"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of a service over all of them, with marks and a saved question that say so, too."""
    folder = tmp_path_factory.mktemp("hostile")
    hosted = [
        Hosted(name, build(getattr(hostile_strings, task), folder / task), f"{hostile_strings.__file__}:{task}")
        for name, task in TASKS.items()
    ]
    settings = Settings(processes=0, state=folder / "state.sqlite")
    with serving(create_service(hosted, settings)) as url, Client(url) as client:
        for index in TASKS:
            client.mark([0, 1], "remove", note=SCRIPT, index=index)
        client.mark([2], "wrong", label=0, note=SCRIPT, index=INDEX_NAME)
        client.save_question(SCRIPT, f"#/ask?{quote(SCRIPT)}", note=SCRIPT)
        yield url


@pytest.fixture
def visit(browser: Any, url: str) -> Iterator[Visit]:
    visit = Visit(browser, url)
    asked = list[str]()
    visit.page.on("request", lambda request: asked.append(request.url))
    visit.page.on("dialog", lambda dialog: visit.complaints.append(dialog.message))
    yield visit
    visit.page.context.close()
    assert not visit.complaints
    assert [address for address in asked if not address.startswith((f"{url}/", "data:", "blob:"))] == []


def look(visit: Visit, place: str) -> str:
    """The text of a view in a new document, once it is complete; nothing of it may have been run."""
    visit.page.goto("about:blank")
    visit.go(f"#/{place}")
    visit.page.locator("main h1, main h2").first.wait_for()
    visit.page.locator("main:not(:has(.skeleton)), main:has(.state)").wait_for()
    text = visit.page.locator("main").inner_text()
    assert visit.page.evaluate("globalThis.harmed") is None
    assert visit.page.locator('img[src="x"], body script, [onerror], [href^="javascript"]').count() == 0
    return str(text)


@pytest.mark.parametrize(
    "index", [pytest.param(INDEX_NAME, marks=pytest.mark.everyday), *(name for name in TASKS if name != INDEX_NAME)]
)
def test_texts_of_data_tasks_files_and_people_stay_texts(visit: Visit, index: str) -> None:
    texts = [look(visit, f"{place}{'&' if '?' in place else '?'}index={quote(index)}") for place in PLACES]
    assert any("onerror=" in text for text in texts)


@pytest.mark.everyday
def test_an_address_that_somebody_else_has_made_runs_nothing(visit: Visit) -> None:
    for address in ADDRESSES:
        look(visit, address.format(script=quote(SCRIPT), example=quote(json.dumps({"text": SCRIPT}))))


def test_a_picture_file_and_a_note_are_taken_with_any_name_and_text(visit: Visit, url: str) -> None:
    look(visit, f"clean?index={quote(INDEX_NAME)}")
    visit.page.get_by_role("list", name="Rows to look at").get_by_role("button").first.click()
    note = visit.page.get_by_role("textbox", name="Note")
    note.fill(f"{SCRIPT} again")
    note.press("Enter")
    with Client(url) as client:
        wait_until(lambda: f"{SCRIPT} again" in [mark.note for mark in client.marks(index=INDEX_NAME).results])
    visit.page.get_by_label("Marked last").wait_for()
    assert visit.page.evaluate("globalThis.harmed") is None


@pytest.mark.everyday
def test_keys_have_names_that_are_no_markup(tmp_path: Path) -> None:
    with pytest.raises(SettingsError):
        add_key(tmp_path / "keys", SCRIPT, [Scope.query])
    add_key(tmp_path / "keys", "anna", [Scope.query])
    changed = (tmp_path / "keys").read_text().replace('"anna"', '"<b>anna</b>"')
    (tmp_path / "keys").write_text(changed)
    with pytest.raises(SettingsError):
        read_keys(tmp_path / "keys")
