"""An answer as one HTML file: what it shows, that it is valid, and that nothing which is shown becomes markup.

It is read by html5lib, which follows the standard, and by a browser.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

import html5lib
import httpx
import pytest

from gradtrace_client import Client, InfluenceAnswer
from gradtrace_client._html_file.document import document_html
from gradtrace_client._html_file.examples import shared_words
from gradtrace_service import cli

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg=="
)
SAVED = re.compile(r"<time .*?</time>")
FEATURES = {"rooms": 12, "place": "INLAND", "age": None, "owned": True}
EXAMPLES = {
    "a picture": {"image": PIXEL},
    "a text": {"text": "The river Huisne is left of the Sarthe.\nIt is long."},
    "features": {"features": FEATURES},
    "a failure": {"error": "it cannot be rendered"},
    "something else": {"sequence": [1, 2, 3], "text": ""},
    "nothing": None,
}


def hit(row: int, score: float, example: Any, **changed: Any) -> dict[str, Any]:
    known = {"label": 3, "label_name": "three", "prediction": 5, "prediction_name": "five", "loss": 2.5}
    shares = {"parts": {"a.pt": score / 4, "b.pt": 3 * score / 4}, "layers": {"fc": score, "out": 0.0}}
    return {"row": row, "score": score, **known, **shares, "correct": False, "percentile": 99.5, "example": example} | (
        changed
    )


def answer(example: Any = None, hits: int = 2, results: int = 1) -> dict[str, Any]:
    """As JSON. Proponents are rows 100, 101, ... with scores 2, 1, ...; opponents 200, 201, ... with -1.5, -0.75 ..."""
    query = {"split": "query", "row": 1, "target": "loss", "label": 3, "label_name": "three", "prediction": 3}
    query |= {"prediction_name": "three", "loss": 0.5, "example": example}
    query |= {"probabilities": [{"label": 3, "label_name": "three", "probability": 0.75}]}
    histogram = {"edges": [-2.0, -1.0, 0.0, 1.0, 2.0], "counts": [1, 0, 30, 9]}
    ends = {
        "proponents": [hit(100 + at, 2 / (at + 1), example) for at in range(hits)],
        "opponents": [hit(200 + at, -1.5 / (at + 1), example) for at in range(hits)],
    }
    distribution = {"mean": 0.0, "std": 1.0, "quantiles": {"0": -2.0, "100": 2.0}, "histogram": histogram}
    result = {"query": query, **ends, "rows_searched": 40, "rows_touched": 12, "distribution": distribution}
    checkpoint = {"name": "a.pt", "step": 1234, "learning_rate": 0.1}
    index = {"generation": 3, "task": "Digits", "rows": 40, "checkpoints": [checkpoint], "dimensions": 64}
    return {
        "index": index | {"basis": "spectral", "precision": "float16"},
        "method": "tracin",
        "convention": "Positive: a proponent.",
        "exact": True,
        "results": [{**result, "note": "only 2 of 10 proponents"}] * results,
        "timing_ms": {"queue": 0, "gradient": 1.5, "search": 2.5, "render": 0, "total": 4.0},
    }


def page(content: dict[str, Any]) -> str:
    return InfluenceAnswer.model_validate(content).to_html()


def parsed(document: str) -> Element:
    """Raises ParseError for what is not valid HTML."""
    return html5lib.HTMLParser(strict=True, namespaceHTMLElements=False).parse(document)  # type: ignore[no-any-return]


def texts(of: Element) -> str:
    return " ".join(" ".join(of.itertext()).split())


def named(root: Element, name: str) -> list[Element]:
    """Elements with this name, also those of a drawing, or with this class."""
    return [
        found
        for found in root.iter()
        if str(found.tag).rpartition("}")[2] == name or name in found.get("class", "").split()
    ]


@pytest.mark.unit
@pytest.mark.parametrize("example", EXAMPLES.values(), ids=EXAMPLES.keys())
def test_it_is_valid_html_that_loads_and_runs_nothing(example: Any) -> None:
    root = parsed(page(answer(example, results=2)))
    assert [named(root, tag) for tag in ("script", "link", "iframe", "object", "form")] == [[]] * 5
    assert {image.get("src") for image in named(root, "img")} <= {PIXEL}
    assert {link.get("href") for link in named(root, "a")} == {"#query-1", "#query-2"}
    assert [found.get("id") for found in root.iter() if found.get("id")] == ["query-1", "query-2"]
    assert [found for found in root.iter() if found.get("style")] == []
    policy = next(meta.get("content", "") for meta in named(root, "meta") if meta.get("http-equiv"))
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'sha256-")


@pytest.mark.unit
def test_both_ends_are_cards_with_everything_that_is_known() -> None:
    root = parsed(page(answer(EXAMPLES["a text"])))
    cards = [
        [texts(card) for card in named(end, "li")] for side in ("proponents", "opponents") for end in named(root, side)
    ]
    assert [len(end) for end in cards] == [2, 2]
    shown = ("1. Row 100", "+2", "three", "five (not its label)", "2.5", "99.50 %", "The river Huisne", "fc", "+2")
    assert all(words in cards[0][0] for words in shown)
    assert "2. Row 201 -0.75" in cards[1][1]
    whole = texts(root)
    told = ("“three”?", "Positive: a proponent.", "75.0 %", "only 2 of 10 proponents", "Exact search of 40 rows")
    for words in (*told, "4.0 ms", "generation 3; 64 dimensions, spectral basis", "1,234", "Explained loss"):
        assert words in whole


@pytest.mark.unit
def test_bars_have_one_scale_and_columns_show_each_checkpoint() -> None:
    root = parsed(page(answer()))
    bars = [bar for head in named(root, "h4") for bar in named(_parent(root, head), "score-bar")[:1]]
    drawn = [(float(bar[1].get("x", "")), float(bar[1].get("width", ""))) for bar in bars]
    assert drawn == [(50, 50), (50, 25), (12.5, 37.5), (31.25, 18.75)]  # of the scores 2, 1, -1.5, -0.75
    assert texts(named(root, "columns")[0]) == "a.pt: +0.5 b.pt: +1.5"
    heights = [float(column[1].get("height", "")) for column in named(named(root, "columns")[0], "g")]
    assert heights[1] == pytest.approx(3 * heights[0], abs=0.05)


def _parent(root: Element, child: Element) -> Element:
    return next(found for found in root.iter() if child in list(found))


@pytest.mark.unit
def test_the_histogram_marks_the_hits() -> None:
    (chart,) = named(parsed(page(answer())), "histogram")
    bins = [(float(bin_.get("x", "")), float(bin_.get("height", ""))) for bin_ in named(chart, "bin")]
    assert [x // 150 for x, _ in bins] == [0, 2, 3]
    assert [height for _, height in bins] == pytest.approx([20.18, 100, 67.05], abs=0.01)  # 100 log(1 + n) / log(31)
    ticks = [float(tick.get("x", "")) + 1 for side in ("proponent", "opponent") for tick in named(chart, side)]
    assert ticks == pytest.approx([599, 450, 75, 187.5])  # the first would be half outside


@pytest.mark.unit
def test_near_duplicates_name_the_row_that_they_are_like() -> None:
    content = answer(hits=3)
    for hit_, cluster in zip(content["results"][0]["proponents"], (100, 100, 102), strict=True):
        hit_["cluster"] = cluster
    cards = [texts(card) for card in named(named(parsed(page(content)), "proponents")[0], "li")]
    assert ["Near-duplicate of row 100" in card for card in cards] == [False, True, False]


@pytest.mark.unit
def test_what_is_not_included_is_left_out() -> None:
    content = answer()
    bare = {"parts": None, "layers": None, "percentile": None, "label": None, "label_name": None, "loss": None}
    result = content["results"][0]
    result |= {"distribution": None, "note": None, "opponents": [], "proponents": [hit(7, 0.0, None, **bare)]}
    result["query"] |= {"probabilities": None, "label": None, "label_name": None, "prediction": None, "row": None}
    root = parsed(page(content))
    assert not any(named(root, name) for name in ("histogram", "columns", "probable", "layers", "note"))
    assert texts(named(root, "opponents")[0]) == "Opponents lowest scores first None."
    assert "None" not in texts(named(root, "query")[0])


@pytest.mark.unit
def test_only_for_a_right_prediction_the_proponents_are_its_reason() -> None:
    content = answer()
    content["results"][0]["query"]["label"] = 4
    assert "which misled it?" in texts(named(parsed(page(content)), "h1")[0])
    content["results"][0]["query"]["label"] = None
    assert "made the model predict “three”?" in texts(named(parsed(page(content)), "h1")[0])


@pytest.mark.unit
def test_rows_are_compared_with_the_query() -> None:
    content = answer({"features": FEATURES})
    others = {"rooms": 2012, "place": "BAY", "age": None, "owned": False, "new": 1}
    content["results"][0]["proponents"][0]["example"] = {"features": others}
    lines = [texts(line) for line in named(named(parsed(page(content)), "proponents")[0], "tr")[:6]]
    assert lines == [
        "feature value to the query",
        "rooms 2,012 +2,000",
        "place BAY there INLAND",
        "age unknown same",
        "owned False there True",
        "new 1",
    ]
    marked = named(parsed(page(answer(EXAMPLES["a text"]))), "mark")
    assert {texts(word) for word in marked} == {"river", "Huisne", "left", "Sarthe", "long"}
    assert shared_words("The RIVER was there; über", "a river, there. Über") == {"river", "über"}


def evil(path: str) -> str:
    """Breaks out of an element, an attribute, a comment, a style and a title, where that is not prevented."""
    return (
        f"\"'></style></title>--><script>document.title='ran'</script><img src=x onerror=alert(1)>&lt;\0\ud800 {path}"
    )


def poisoned(value: Any, path: str = "") -> Any:
    """Every text, and every name that is not the schema's, replaced by a hostile one that ends with its place."""
    if isinstance(value, dict):
        free = path.endswith(("parts", "layers", "features"))
        return {
            (evil(f"{path}.{key}") if free else key): poisoned(item, f"{path}.{key}") for key, item in value.items()
        }
    if isinstance(value, list):
        return [poisoned(item, f"{path}.{at}") for at, item in enumerate(value)]
    return evil(path) if isinstance(value, str) and not path.endswith(".split") else value


def shown_texts(root: Element) -> str:
    return " ".join(["".join(root.itertext()), *(value for found in root.iter() for value in found.attrib.values())])


@pytest.mark.unit
@pytest.mark.parametrize("example", EXAMPLES.values(), ids=EXAMPLES.keys())
def test_a_script_in_any_field_is_shown_as_text(example: Any) -> None:
    content = answer(example, results=2)
    content["index"]["checkpoints"][0]["name"] = "b.pt"
    hostile = page(poisoned(content))
    hostile.encode()  # no half of a surrogate pair is left
    plain, root = parsed(page(content)), parsed(hostile)
    shown = shown_texts(root)
    tags = [{str(found.tag) for found in tree.iter()} for tree in (plain, root)]
    assert tags[1] <= tags[0] | {"mark"}
    attributes = [{name for found in tree.iter() for name in found.attrib} for tree in (plain, root)]
    assert attributes[1] <= attributes[0]
    assert all(image.get("src") == PIXEL for image in named(root, "img"))
    places = {place for place in _places(poisoned(content)) if not place.endswith(".image")}
    assert len(places) > 30
    for place in places:
        assert f"document.title='ran'</script><img src=x onerror=alert(1)>&lt;\ufffd\ufffd {place}" in shown


def _places(content: Any) -> Iterator[str]:
    """Where its hostile texts are."""
    if isinstance(content, dict):
        yield from _places([*content, *content.values()])
    elif isinstance(content, list):
        for value in content:
            yield from _places(value)
    elif isinstance(content, str) and "ran" in content:
        yield content.rpartition(" ")[2]


@pytest.mark.unit
def test_no_address_but_a_picture_in_the_file_itself_is_used() -> None:
    for address in ("https://elsewhere/a.png", "data:text/html,<b>", "javascript:alert(1)", 'x" onerror="alert(1)', 7):
        root = parsed(page(answer({"image": address})))
        assert named(root, "img") == []
        assert "the image is not a data address" in texts(root)
    broken = parsed(page(answer({"image": "data:image/png;base64,%%%"})))
    assert named(broken, "img")


@pytest.mark.unit
def test_a_long_answer_makes_a_file_of_bounded_size_that_says_what_is_left_out() -> None:
    picture = {"image": "data:image/jpeg;base64," + "A" * 100_000}
    typed = InfluenceAnswer.model_validate(answer(picture, hits=40))
    whole, part = document_html(typed), document_html(typed, largest=2_000_000)
    assert len(whole.encode()) > 8_000_000
    assert len(part.encode()) <= 2_000_000
    ends = [named(parsed(part), side)[0] for side in ("proponents", "opponents")]
    shown = [len(named(end, "li")) for end in ends]
    assert shown[0] == shown[1] > 5
    assert all(f"{40 - shown[0]} more are left out" in texts(end) for end in ends)
    tiny = document_html(typed, largest=1000)
    assert "base64" not in tiny
    assert "40 more are left out" in tiny


@pytest.mark.unit
def test_texts_tables_and_lists_of_any_length_are_cut() -> None:
    long = {"text": "word " * 100_000, "features": {f"f{at}": "v" * 10_000 for at in range(10_000)}}
    content = answer(long, hits=1)
    result = content["results"][0]
    result["proponents"][0] |= {"parts": {f"{at}.pt": 1.0 for at in range(5000)}, "label_name": "n" * 100_000}
    content["index"]["checkpoints"] *= 5000
    content["convention"] = result["note"] = result["query"]["target"] = "c" * 100_000
    content["results"] = [result]
    document = page(content)
    assert len(document) < 200_000
    assert all(words in document for words in ("and 9,960 more", "5000 checkpoints", "3,401 more characters"))


def test_a_browser_runs_no_script_even_where_one_got_in(tmp_path: Path) -> None:
    if BROWSER is None:
        pytest.skip("no chromium or chrome is installed")
    document = page(answer(EXAMPLES["a picture"]))
    injected = document.replace("</main>", "</main><script>document.title = 'ran'</script>")
    unguarded = re.sub(r"<meta http-equiv[^>]*>", "", injected)
    titles = [_title_in_browser(tmp_path, html) for html in (document, injected, unguarded)]
    assert titles == [titles[0], titles[0], "ran"]


def _title_in_browser(folder: Path, document: str) -> str:
    (folder / "answer.html").write_text(document, encoding="utf-8")
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--dump-dom")
    words = [str(BROWSER), *options, f"--user-data-dir={folder / 'profile'}", (folder / "answer.html").as_uri()]
    dumped = subprocess.run(words, capture_output=True, text=True, check=True, timeout=300).stdout
    return texts(named(html5lib.parse(dumped, namespaceHTMLElements=False), "title")[0])


def unsaved(document: str) -> str:
    """Without what differs between two answers to one question: when it was saved, and how long it took."""
    return re.sub(r"[\d.]+ ms: [^<]*", "", SAVED.sub("", document))


def test_sdk_command_and_service_write_the_same(
    client: Client, url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answered = client.influence(query_rows=[3, 4], k=3)
    document = answered.to_html()
    cards = named(parsed(document), "h4")
    hits = [hit for result in answered.results for hit in (*result.proponents, *result.opponents)]
    assert [texts(card).partition(". ")[2] for card in cards] == [f"Row {hit.row} {hit.score:+,.4g}" for hit in hits]
    pictures = [image.get("src") for image in named(parsed(document), "img")]
    assert len(pictures) == len(hits) + 2

    question = {"query_rows": [3, 4], "k": 3}
    response = httpx.post(f"{url}/influence", json=question, headers={"Accept": "text/html"})
    assert unsaved(response.text) == unsaved(document)
    assert response.headers["Content-Type"] == "text/html; charset=utf-8"
    assert response.headers["Content-Disposition"].startswith("attachment; filename=")
    assert response.headers["Content-Security-Policy"].startswith("sandbox;")
    assert "total;dur=" in response.headers["Server-Timing"]

    file = tmp_path / "why.html"
    cli.app(
        ["query", url, "--query-row", "3", "--query-row", "4", "--k", "3", "--html", str(file)], standalone_mode=False
    )
    assert unsaved(file.read_text("utf-8")) == unsaved(document)
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", f"wrote {file}\n")


@pytest.mark.parametrize("accept", ["*/*", "application/json", "text/html, application/json;q=0.9", "text/plain", ""])
def test_answers_are_json_unless_html_alone_is_accepted(url: str, accept: str) -> None:
    response = httpx.post(f"{url}/influence", json={"query_rows": [3], "k": 1}, headers={"Accept": accept})
    assert InfluenceAnswer.model_validate_json(response.content).results[0].query.row == 3


def test_a_refusal_is_a_problem_document_also_for_those_who_accept_html(url: str) -> None:
    response = httpx.post(f"{url}/influence", json={"query_rows": [3], "k": 0}, headers={"Accept": "text/html"})
    assert (response.status_code, response.headers["Content-Type"]) == (422, "application/problem+json")
