"""The document: its head, a section for each query, and the facts about the index."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from datetime import datetime, timezone
from functools import cache
from importlib.resources import files

from gradtrace_client._display import label_text
from gradtrace_client._html_file.cards import fact
from gradtrace_client._html_file.markup import Markup, clipped, element, joined
from gradtrace_client._html_file.numbers import plain
from gradtrace_client._html_file.room import Room
from gradtrace_client._html_file.sections import result_section
from gradtrace_client._shown import Answer, Checkpoint, Index, Result
from gradtrace_client.sentences import subject_text, timing_text

MAX_BYTES = 20_000_000  # what most mail servers deliver
_TEXT_LIMIT = 2_000  # characters of a sentence
_NAME_LIMIT = 200
_MOST_CHECKPOINTS = 50


def document_html(answer: Answer, largest: int = MAX_BYTES) -> str:
    """The answer as one HTML file.

    largest: its size in bytes; examples and hits that would exceed it are left out, which the file says
    """
    room = Room(largest)
    room.take(joined(_style(), _head("", _style()), _about(answer)))
    sections = [result_section(answer, at, room) for at in range(len(answer.results))]
    heading = _question(answer.results)
    body = element(
        "main",
        element("h1", heading),
        element("p", element("b", "The scores: "), clipped(answer.convention, _TEXT_LIMIT), class_="meaning"),
        _contents(answer.results) if len(sections) > 1 else None,
        *sections,
        _about(answer),
    )
    page = element("html", _head(heading, _style()), element("body", body), lang="en")
    return f"<!DOCTYPE html>\n{page}\n"


def _question(results: Sequence[Result]) -> str:
    """What is answered. Proponents of a loss speak for its label, so only of a right prediction are they the reason."""
    queries = [result.query for result in results]
    predictions = {label_text(query.prediction, query.prediction_name) for query in queries}
    right = all(query.target.startswith("loss") and query.label in (None, query.prediction) for query in queries)
    if right and len(predictions) == 1 and queries[0].prediction is not None:
        return f"Which training examples made the model predict “{clipped(predictions.pop(), _NAME_LIMIT)}”?"
    return "Which training examples helped the model here, and which misled it?"


def _head(title: str, style: str) -> Markup:
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    return element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="referrer", content="no-referrer"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        element("style", Markup(style)),
    )


@cache
def _style() -> str:
    return (files("gradtrace_client") / "_html_file" / "document.css").read_text("utf-8")


def _contents(results: Sequence[Result]) -> Markup:
    links = [
        element("li", element("a", subject_text(result.query), href=f"#query-{at}"))
        for at, result in enumerate(results, 1)
    ]
    return element("nav", element("ol", *links), aria_label="Queries")


def _about(answer: Answer) -> Markup:
    index, saved = answer.index, datetime.now(timezone.utc).replace(microsecond=0)
    facts = [
        fact("Method", clipped(answer.method, _NAME_LIMIT)),
        fact("Task", element("bdi", clipped(index.task, _NAME_LIMIT))),
        fact("Training rows", f"{index.rows:,}"),
        fact("Index", _index_text(index)),
        fact("Answered in", timing_text(answer.timing_ms)),
        fact("Saved", element("time", f"{saved:%Y-%m-%d %H:%M} UTC", datetime=saved.isoformat())),
    ]
    return element(
        "footer",
        element("h2", "About this answer"),
        element("dl", *facts, class_="facts wide"),
        _checkpoints(index.checkpoints),
        element("p", "By Gradtrace. This file loads nothing and runs nothing."),
    )


def _index_text(index: Index) -> str:
    text = f"generation {index.generation}; {index.dimensions:,} dimensions, {index.basis} basis, in {index.precision}"
    return text + ("" if index.verified else "; opened without comparing the checksums of its rows")


def _checkpoints(checkpoints: Sequence[Checkpoint]) -> Markup:
    shown = checkpoints[:_MOST_CHECKPOINTS]
    heads = element("tr", *(element("th", name, scope="col") for name in ("name", "run", "step", "learning rate")))
    table = element("table", element("thead", heads), element("tbody", *map(_checkpoint_line, shown)))
    left_out = len(checkpoints) - len(shown)
    more = element("p", f"and {left_out:,} more") if left_out else None
    return element("details", element("summary", f"{len(checkpoints)} checkpoints"), table, more)


def _checkpoint_line(checkpoint: Checkpoint) -> Markup:
    return element(
        "tr",
        element("th", element("bdi", clipped(checkpoint.name, _NAME_LIMIT)), scope="row"),
        element("td", str(checkpoint.run)),
        element("td", f"{checkpoint.step:,}"),
        element("td", plain(checkpoint.learning_rate)),
    )
