"""Ask, for a language model, in a real browser: a prompt is completed, and words of the completion are asked about."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest

import tiny_language
from conftest import FRAMEWORK_WARNINGS, serving_when_ready
from gradtrace import load_checkpoints
from gradtrace.tasks import CausalLM
from gradtrace_client import Client
from gradtrace_indexer import build_index
from gradtrace_service.app import create_app
from page_browser import Visit, told

pytestmark = [*FRAMEWORK_WARNINGS, pytest.mark.usefixtures("offline")]
PROMPT = "the cat at the house"


def asked(visit: Visit) -> Any:
    """The example of the address."""
    return json.loads(parse_qs(visit.page.url.partition("?")[2])["example"][0])


def test_words_of_a_completion_are_chosen_and_explained(browser: Any, tmp_path: Path) -> None:
    tiny_language.saved(tiny_language.gpt2(340), tmp_path / "model")
    task = CausalLM(tmp_path / "model", [{"text": text} for text in tiny_language.texts(12)])
    options: dict[str, Any] = {"dimensions": 8, "progress": False}
    index = build_index(task, load_checkpoints(tmp_path / "model"), tmp_path / "index", **options)
    with serving_when_ready(create_app(index)) as url, Client(url, retries=0) as client:
        visit = Visit(browser, url, "#/ask?from=own")
        page, written = visit.page, client.complete(PROMPT)
        page.get_by_label("Prompt, or a text").fill(PROMPT)
        page.get_by_role("button", name="Complete").click()
        words = page.get_by_role("group", name="Only these words").get_by_role("button")
        words.first.wait_for()
        assert page.get_by_label("Completion", exact=True).input_value() == written.text
        assert not visit.violations()
        words.nth(1).click()
        assert words.nth(1).get_attribute("aria-pressed") == "true"
        page.get_by_role("button", name="Explain it").click()
        rows = visit.rows("Proponents")
        example = asked(visit)
        assert {name: value for name, value in example.items() if name != "only"} == {
            name: value for name, value in written.payload.items() if name != "only"
        }
        assert "".join(written.tokens[number] for number in example["only"]).strip()
        assert rows == told(client, "proponents", example=example)
        visit.go("#/ask?from=own")
        page.reload()
        page.get_by_label("Prompt, or a text").fill(PROMPT)
        page.get_by_label("Completion", exact=True).fill(" the dog")
        page.get_by_role("button", name="Explain it").click()
        assert visit.rows("Opponents") == told(
            client, "opponents", example={"prompt": PROMPT, "completion": " the dog"}
        )
        page.context.close()
        assert not visit.complaints
