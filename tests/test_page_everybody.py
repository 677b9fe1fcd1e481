"""No view keeps people out: axe-core finds nothing wrong with it in either colour scheme, and it fits a phone."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from conftest import DigitsRun
from gradtrace_client import Client
from gradtrace_service.app import create_service
from gradtrace_service.indexes.hosted import Hosted
from gradtrace_service.server import serving
from gradtrace_service.settings import Settings
from page_browser import Visit

pytestmark = pytest.mark.everyday

VIEWS = {
    "ask": "[data-at] img",
    "ask?from=own": "[role=application]",
    "ask?several=true&query=1,2": "[role=listitem] button img",
    "answer?query=3": "article img",
    "compare": ".cmp-agreement canvas",
    "overview": ".heat tbody tr:last-child a",
    "operate": ".op-table",
    "clean": ".clean-current img",
    "clean?part=act": ".clean-effects",
    "no": "h1",
}  # by place, what comes last there


@pytest.fixture(scope="module")
def marked(digits_index: DigitsRun, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a service with a row that is to be removed."""
    settings = Settings(processes=0, state=tmp_path_factory.mktemp("state") / "state.sqlite")
    hosted = Hosted("digits", digits_index.index, digits_index.task)
    with serving(create_service([hosted], settings)) as url, Client(url) as client:
        client.mark([client.self_influence(k=1).results[0].row], "remove")
        yield url


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_keeps_people_out(marked: str, shown: Callable[..., Visit], scheme: str) -> None:
    assert shown(marked, "", color_scheme=scheme).violations_of(VIEWS) == {}


def test_it_fits_a_phone(marked: str, shown: Callable[..., Visit]) -> None:
    visit = shown(marked, "")
    visit.page.set_viewport_size({"width": 360, "height": 740})
    for place, last in VIEWS.items():
        visit.look_at(place, last)
        assert visit.page.evaluate("document.documentElement.scrollWidth") <= 360, place
