"""Answers as pandas frames and as HTML for notebooks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas

    from gradtrace_client.group_and_pair_schemas import Asked, GroupsAnswer, PairsAnswer
    from gradtrace_client.schemas import ExampleAnswer, Hit, Influence
    from gradtrace_client.service_schemas import Job

_TEXT_LIMIT = 200


def frame(records: Sequence[dict[str, Any]]) -> pandas.DataFrame:
    """A DataFrame with one line a record.

    Raises:
        ImportError: pandas is not installed.
    """
    try:
        import pandas
    except ImportError:
        raise ImportError("to_pandas() needs pandas: pip install 'gradtrace-client[pandas]'") from None
    table: pandas.DataFrame = pandas.DataFrame(records)
    return table


def influence_records(results: Iterable[Influence]) -> list[dict[str, Any]]:
    """One record a hit, with the position of its query, its side and its rank from 1 on."""
    return [
        {"query": query, "side": side, "rank": rank, **hit_record(hit)}
        for query, result in enumerate(results)
        for side, hits in (("proponent", result.proponents), ("opponent", result.opponents))
        for rank, hit in enumerate(hits, 1)
    ]


def hit_record(hit: Hit) -> dict[str, Any]:
    """The hit's scalars, each checkpoint's part as `part:NAME` and each layer's as `layer:NAME`."""
    scalars = hit.model_dump(exclude={"parts", "layers", "example"})
    parts = {f"part:{name}": part for name, part in (hit.parts or {}).items()}
    return scalars | parts | {f"layer:{name}": part for name, part in (hit.layers or {}).items()}


def influence_html(result: Influence) -> str:
    """The query and both ends as HTML."""
    query = result.query
    title = f"Query: {example_html(query.example)} {escape(described(query.label, query.label_name))}"
    if query.count > 1:
        title = f"Mean of {query.count} queries, label: {escape(described(query.label, query.label_name))}"
    predicted = f"predicted {described(query.prediction, query.prediction_name)}, explained: {query.target}"
    ends = hits_html("Proponents", result.proponents) + hits_html("Opponents", result.opponents)
    note = "" if result.note is None else note_html(f"Note: {result.note}")
    return f"<div><p>{title}<br>{escape(predicted)}</p>{ends}{note}</div>"


def hits_html(title: str, hits: Sequence[Hit]) -> str:
    """A table of hits as HTML, with percentiles where they carry them."""
    placed = any(hit.percentile is not None for hit in hits)
    heads = ("row", "score", *["percentile"] * placed, "label", "prediction", "loss", "example")
    return table_html(title, heads, [_cells(hit, placed) for hit in hits])


def table_html(title: str, heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Cells are HTML; title and heads are text."""
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in line)}</tr>" for line in lines)
    return f"<table><caption>{escape(title)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def records_html(title: str, records: Sequence[dict[str, Any]]) -> str:
    """A table of text with the records' keys as heads."""
    lines = [["" if value is None else escape(str(value)) for value in record.values()] for record in records]
    return table_html(title, list(records[0]) if records else (), lines)


def groups_html(answer: GroupsAnswer) -> str:
    """A table for each query, the largest sum first."""
    tables = []
    for result in answer.results:
        lines = [
            [
                escape(str(group.group) if group.group_name is None else group.group_name),
                str(group.rows),
                f"{group.sum:+.4g}",
                f"{group.mean:+.4g}",
            ]
            for group in result.groups
        ]
        tables.append(
            table_html(f"Influence on {_asked_text(result.query)}", (answer.by, "rows", "sum", "mean"), lines)
        )
    return "".join(tables) + note_html(answer.convention)


def pairs_html(answer: PairsAnswer) -> str:
    """A line for each query, a column for each training example."""
    heads = ["query", *(_asked_text(asked) for asked in answer.train)]
    lines = [
        [escape(_asked_text(query)), *(f"{score:+.4g}" for score in scores)]
        for query, scores in zip(answer.queries, answer.scores, strict=True)
    ]
    return table_html("Influence of training examples", heads, lines) + note_html(answer.convention)


def _asked_text(asked: Asked) -> str:
    who = "an example" if asked.row is None else f"{asked.split} row {asked.row}"
    who = f"the mean of {asked.count} queries" if asked.count > 1 else who
    return f"{who}, label {described(asked.label, asked.label_name)}"


def example_answer_html(answer: ExampleAnswer) -> str:
    """A row of a data set with what is known of it."""
    words = f"{answer.split} row {answer.row}, label {described(answer.label, answer.label_name)}"
    if answer.prediction is not None:
        words += f", predicted {described(answer.prediction, answer.prediction_name)}"
    return f"<p>{example_html(answer.example)} {escape(words)}</p>"


def job_html(job: Job) -> str:
    """How far a job is, or how it ended."""
    words = f"{job.operation} of {job.index}, {job.state}, generation {job.generation}"
    words += "" if job.error is None else f": {job.error}"
    words += "".join(f"; no {method} any more: {remedy}" for method, remedy in job.lost_methods.items())
    return f'<p><progress value="{job.progress:.3f}" max="1"></progress> {escape(words)}</p>'


def _cells(hit: Hit, placed: bool) -> list[str]:
    loss = "" if hit.loss is None else f"{hit.loss:.4g}"
    percentile = "" if hit.percentile is None else f"{hit.percentile:.2f} %"
    texts = (
        str(hit.row),
        f"{hit.score:+.4g}",
        *[percentile] * placed,
        described(hit.label, hit.label_name),
        described(hit.prediction, hit.prediction_name),
        loss,
    )
    return [*map(escape, texts), example_html(hit.example)]


def note_html(text: str) -> str:
    return f"<p><small>{escape(text)}</small></p>"


def example_html(example: dict[str, Any] | None) -> str:
    """An image as a thumbnail, anything else as escaped text; only `data:image/` addresses are ever put in a page."""
    image = (example or {}).get("image")
    if isinstance(image, str) and image.startswith("data:image/"):
        return f'<img src="{escape(image)}" style="height:48px;image-rendering:pixelated">'
    return escape(example_text(example))


def example_text(example: dict[str, Any] | None) -> str:
    """A rendered example in one short line of text; an image is named, not shown."""
    if not example:
        return ""
    if "text" in example:
        text = " ".join(str(example["text"]).split())
    elif isinstance(example.get("features"), dict):
        text = ", ".join(f"{name} {_cell(value)}" for name, value in example["features"].items())
    elif isinstance(example.get("error"), str):
        text = f"not shown: {example['error']}"
    else:
        text = ", ".join(example)
    return text if len(text) <= _TEXT_LIMIT else text[: _TEXT_LIMIT - 1] + "…"


def _cell(value: Any) -> str:
    if value is None:
        return "unknown"
    return number_text(value) if isinstance(value, int | float) else str(value)


def number_text(value: float) -> str:
    """Six digits, thousands set apart."""
    return f"{value:,.6g}"


def described(label: float | None, name: str | None) -> str:
    """A label in words: its name where it has one."""
    if label is None:
        return "none"
    return name if name is not None else number_text(label)
