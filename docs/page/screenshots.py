"""Takes the pictures of docs/page.md again: serves the indexes of the examples, and looks at them with a browser.

    make demo DATASET=digits ONCE=1               # and so for the other DATA_SETS: they come to lie in runs/
    python docs/page/screenshots.py runs          # all pictures
    python docs/page/screenshots.py runs clean    # those of these names

Needs Playwright and Chromium. Marks that are set for a picture are kept in a state file of its own, which is removed.
"""

from __future__ import annotations

import io
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from gradtrace_service.app import create_service
from gradtrace_service.indexes.hosted import Hosted
from gradtrace_service.server import serving
from gradtrace_service.settings import DEFAULTS

FOLDER = Path(__file__).parent
EXAMPLES = FOLDER.parents[1] / "examples"
DATA_SETS = ("cifar10", "digits", "california", "dbpedia", "wikitext")
WAIT_MS = 600_000
COLOURS = 256  # of a palette: a third of the bytes
DRAWN_MS = 500
UNFINISHED = ".skeleton, .stale, .banner, [aria-busy=true]"


def as_it_is(page: Page) -> None:
    """Nothing is done before the picture is taken."""


def mark_some(page: Page) -> None:
    """The first rows, by quick keys."""
    press(page, "rrrru")


def mark_to_remove(page: Page) -> None:
    """The first rows; then, what removing them would do."""
    press(page, "xxxxxxxx")
    page.get_by_role("link", name="Act on the marks").click()


def show_tokens(page: Page) -> None:
    """Of all rows."""
    page.get_by_label("Show the tokens of all rows").check()
    page.get_by_role("group", name="Tokens of the row").first.wait_for()


def press(page: Page, keys: str) -> None:
    page.get_by_role("list", name="Rows to look at").get_by_role("button").first.click()
    for key in keys:
        page.wait_for_timeout(DRAWN_MS)
        page.keyboard.press(key)


@dataclass(frozen=True)
class Picture:
    """`place` is the page's address after the #; `element` the part that is taken (a CSS selector), else the window."""

    place: str
    act: Callable[[Page], None] = as_it_is
    size: tuple[int, int] = (1200, 800)
    dark: bool = False
    element: str | None = None


PICTURES = {
    "ask": Picture("/ask?index=cifar10&wrong=true&order=-loss", size=(1200, 640)),
    "answer": Picture("/answer?index=cifar10&query=3087", size=(1200, 900)),
    "text": Picture("/answer?index=dbpedia&query=63", size=(1200, 900)),
    "tokens": Picture("/answer?index=wikitext&query=0&method=influence&k=5", show_tokens, size=(1200, 1000)),
    "compare": Picture("/compare?index=digits&query=0", size=(1200, 900), dark=True),
    "clean": Picture("/clean?index=cifar10&by=disagree", mark_some),
    "act": Picture("/clean?index=digits", mark_to_remove, size=(1200, 900)),
    "map": Picture("/overview?index=california&colour=label", size=(1440, 1600), element=".ov-map"),
    "phone": Picture("/answer?index=cifar10&query=3087", size=(390, 844)),
}


def take(browser: Browser, url: str, picture: Picture) -> bytes:
    """The picture as a PNG of few colours."""
    width, height = picture.size
    scheme: Any = "dark" if picture.dark else "light"
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme, bypass_csp=True)
    page = context.new_page()
    page.set_default_timeout(WAIT_MS)
    page.goto(f"{url}/#{picture.place}")
    page.add_style_tag(
        content="html { scrollbar-gutter: auto !important; }"
    )  # which a browser without a window leaves empty
    show(page)
    picture.act(page)
    show(page)
    shot = page.locator(picture.element).screenshot() if picture.element else page.screenshot()
    context.close()
    return with_palette(shot)


def show(page: Page) -> None:
    """Wait until nothing is being loaded for a while."""
    page.locator("h1").wait_for()
    quiet = 0
    while quiet < 3:
        page.wait_for_timeout(DRAWN_MS)
        quiet = 0 if page.locator(UNFINISHED).or_(page.get_by_text("so far")).count() else quiet + 1


def with_palette(png: bytes) -> bytes:
    image = Image.open(io.BytesIO(png)).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
    image.save(small := io.BytesIO(), "PNG", optimize=True)
    return small.getvalue()


def task_of(run: Path, example: Path) -> str:
    """Of an example with a task in Python, or of a language model."""
    return f"{example / 'task.py'}:TASK" if (example / "task.py").is_file() else str(run / "index" / "task.json")


def main(runs: Path, *names: str) -> None:
    wanted = {name: PICTURES[name] for name in names or PICTURES}
    named = [data for data in DATA_SETS if any(f"index={data}" in picture.place for picture in wanted.values())]
    hosted = [Hosted(data, runs / data / "index", task_of(runs / data, EXAMPLES / data)) for data in named]
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        settings = DEFAULTS.model_copy(update={"processes": 0, "state": Path(folder) / "state.sqlite"})
        with serving(create_service(hosted, settings)) as url:
            browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            for name, picture in wanted.items():
                (FOLDER / f"{name}.png").write_bytes(png := take(browser, url, picture))
                print(f"{name}.png: {len(png) / 1000:.0f} kB")
            browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
