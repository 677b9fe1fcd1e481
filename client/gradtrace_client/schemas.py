"""The wire schemas of answers about queries and rows. The service imports them.

Answers show themselves: `to_pandas()` gives a frame, and in a notebook they appear as tables.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from gradtrace_client._display import example_html, example_text, frame, label_text, note_html, table_html
from gradtrace_client._html_file import document_html

if TYPE_CHECKING:
    import pandas

Label = int | float
Payload = dict[str, Any]  # what the task's parse takes and its render gives: {"image": ...}, {"text": ...}, ...
Split = Literal["train", "query"]


class AnswerSchema(BaseModel):
    """Answers may gain fields in a later service of the same major version; a client ignores those."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class CheckpointInfo(AnswerSchema):
    name: str
    step: int
    learning_rate: float
    learning_rate_sum: float | None = Field(None, description="Of all steps up to this one; null if unknown.")
    run: int = Field(0, description="Number of the training run that it belongs to.")
    kind: str = Field(
        "weights",
        description="`weights`: saved by the training; `average`: the mean weights of a segment, only for fast-source; "
        "`recorded`: the training up to this step, only for hydra.",
    )


class IndexInfo(AnswerSchema):
    """Which index answered. `generation` grows with every change of the index."""

    generation: int
    task: str
    rows: int = Field(description="Of the training data; row numbers are below it.")
    deleted: int = Field(0, description="How many of them no answer names: deleted ones, and those never indexed.")
    checkpoints: list[CheckpointInfo]
    dimensions: int
    basis: str
    precision: str
    verified: bool = Field(True, description="False: opened without comparing the checksums of the rows.")


class ImageInput(AnswerSchema):
    """`{"image": ...}`, of this size."""

    kind: Literal["image"] = "image"
    height: int
    width: int
    channels: int


class TextInput(AnswerSchema):
    """`{"text": ...}`"""

    kind: Literal["text"] = "text"


class Feature(AnswerSchema):
    """A column of a table: a number, of which the training data has these values, or one of several words."""

    name: str
    min: float | None
    max: float | None
    median: float | None
    integer: bool = Field(description="Whether all values are whole numbers.")
    choices: list[str] | None = Field(description="The words of a category; null: a number.")
    optional: bool = Field(description="Whether null may be given for a number that is not known.")


class FeaturesInput(AnswerSchema):
    """`{"features": {name: value}}`, with a value for each."""

    kind: Literal["features"] = "features"
    features: list[Feature]


class OtherInput(AnswerSchema):
    """A form of the task's own."""

    kind: Literal["other"] = "other"


class IndexDetails(IndexInfo):
    methods: list[str]
    class_names: list[str] | None
    query_rows: int = Field(description="Size of the task's query data set, 0 if it has none.")
    conventions: dict[str, str] = Field(description="By method: sign and unit of its scores.")
    splits: dict[Split, int] = Field(
        default_factory=dict, description="Number of rows of `train`, deleted ones included, and of `query`."
    )
    input: ImageInput | TextInput | FeaturesInput | OtherInput | None = Field(
        None, description="What an example of a request looks like; null: the task takes none."
    )
    columns: list[str] = Field(
        default_factory=list, description="Names for a filter's `where`, for `by` of groups, and for `GET /columns`."
    )
    layers: list[str] = Field(default_factory=list, description="Layers whose shares a score can be split into.")
    token_methods: list[str] = Field(
        default_factory=list,
        description="Methods whose scores can be split by token; none where the task tells none.",
    )
    can_retrain: bool = Field(False, description="Whether the task can train a model on some of its rows.")
    can_complete: bool = Field(False, description="Whether the model writes, so that `POST /complete` is answered.")


class Timing(AnswerSchema):
    """Milliseconds. `total` runs from the validated request to the finished answer; it may exceed the others' sum.

    Of a request with more queries than the service's `batch_size`, which takes several passes: the sums, and the
    largest `batch`.
    """

    queue: float
    batch: int = Field(default=1, description="Queries answered in the same pass; the times are those of the pass.")
    gradient: float
    search: float
    rescore: float = 0.0
    rescore_per_row: float | None = Field(default=None, description="`rescore` divided by the number of rescored rows.")
    percentiles: float = 0.0
    render: float
    total: float


class Hit(AnswerSchema):
    """One training row with its score; label, prediction, loss and correct are those of the last checkpoint."""

    row: int
    score: float = Field(description="Positive: a proponent. The unit is given by the answer's `convention`.")
    label: Label | None
    label_name: str | None
    prediction: Label | None
    prediction_name: str | None
    loss: float | None
    correct: bool | None
    parts: dict[str, float] | None = Field(description="By checkpoint; they sum to the score.")
    layers: dict[str, float] | None = Field(default=None, description="By layer; they sum to the score.")
    percentile: float | None = Field(default=None, description="Share of all training rows with a lower score, in %.")
    cluster: int | None = Field(
        default=None,
        description="Row of the highest hit of the same end that this one is a near-duplicate of, its own if of none. "
        "Only if `clusters` were included.",
    )
    example: Payload | None = Field(
        description='{"image": data URL}, {"text": ...} or {"features": {...}}; {"error": reason} if rendering failed.'
    )

    def example_text(self) -> str:
        """The example in one line of at most 200 characters; an image is only named."""
        return example_text(self.example)


class ClassProbability(AnswerSchema):
    label: Label
    label_name: str | None
    probability: float


class QueryInfo(AnswerSchema):
    """What was explained. `split` and `row` are set if the query was given by its row. `loss` is that at the query's
    own label, or else at the predicted one, whatever the target.

    For the mean of several queries, `rows` takes the place of `row`, `label` and `prediction` are set only if all
    queries share them, and `loss` and `probabilities` are their means.
    """

    split: Split | None
    row: int | None
    rows: list[int] | None = None
    count: int = Field(default=1, description="Number of queries, if it is a mean.")
    target: str = Field(description="The quantity explained, in words, such as `loss at the predicted label`.")
    label: Label | None
    label_name: str | None
    prediction: Label | None
    prediction_name: str | None
    loss: float | None
    probabilities: list[ClassProbability] | None = Field(
        default=None,
        description="Of the classes, at the last checkpoint used, the largest first, at most 20; null if they were not "
        "included, or the task gives no scores of classes.",
    )
    example: Payload | None

    def example_text(self) -> str:
        """The example in one line of at most 200 characters; an image is only named."""
        return example_text(self.example)


class Histogram(AnswerSchema):
    """Bins of equal width from the lowest to the highest score: one more edge than counts."""

    edges: list[float]
    counts: list[int] = Field(description="Rows with a score from an edge to the next; the last bin has both its ends.")


class Distribution(AnswerSchema):
    """The scores of all training rows on the query, regardless of the filter."""

    mean: float
    std: float
    quantiles: dict[str, float] = Field(description="By percentage: `0` is the lowest score, `100` the highest.")
    histogram: Histogram | None = Field(default=None, description="Only if `histogram` was included.")


class Influence(AnswerSchema):
    """The answer to one query. At either end, hits are ordered from the most extreme score inwards.

    Proponents have positive scores and opponents negative ones, so there may be fewer than `k`; `note` then says why.
    For `repsim` and `bm25` they are instead the most and the least similar rows.
    """

    query: QueryInfo
    proponents: list[Hit]
    opponents: list[Hit]
    rows_searched: int = Field(description="Rows that passed the filter.")
    rows_touched: int = Field(description="Rows for which the search read more than the first level.")
    rows_rescored: int = Field(default=0, description="Rows whose full gradients were recomputed.")
    distribution: Distribution | None = Field(
        default=None, description="Only if `percentiles` or `histogram` were included."
    )
    note: str | None = Field(
        default=None, description="Why there are fewer hits than asked for, or why every score is zero."
    )

    def to_pandas(self) -> pandas.DataFrame:
        """One line for each hit, proponents first."""
        return frame(_hit_records([self]))

    def _repr_html_(self) -> str:
        query = self.query
        label = escape(label_text(query.label, query.label_name))
        title = f"Query: {example_html(query.example)} {label}"
        if query.count > 1:
            title = f"Mean of {query.count} queries, label: {label}"
        predicted = f"predicted {label_text(query.prediction, query.prediction_name)}, explained: {query.target}"
        ends = _hits_html("Proponents", self.proponents) + _hits_html("Opponents", self.opponents)
        note = "" if self.note is None else note_html(f"Note: {self.note}")
        return f"<div><p>{title}<br>{escape(predicted)}</p>{ends}{note}</div>"


class Recall(AnswerSchema):
    """Share of the exact top and bottom rows that the searcher found: its mean over held-out queries, at build time."""

    top: float
    bottom: float


class ScoresAnswer(AnswerSchema):
    index: IndexInfo
    method: str
    convention: str = Field(description="Sign and unit of the scores.")


class InfluenceAnswer(ScoresAnswer):
    """`results` are in the order of the queries, or one result for their mean.

    `exact`: the hits are those that scoring every stored row would give. `rescored`: scores were computed from full
    gradients instead of stored rows.
    """

    exact: bool
    recall: Recall | None = Field(
        None,
        description="Of an approximate searcher, if it was measured with this method, `k` and options.",
    )
    rescored: bool = False
    results: list[Influence]
    timing_ms: Timing

    def to_pandas(self) -> pandas.DataFrame:
        """One line for each hit; `query` is the position in `results`."""
        return frame(_hit_records(self.results))

    def to_html(self) -> str:
        """The answer as one HTML document, with its pictures, to be written in UTF-8 and sent to others.

        It holds no script and loads nothing. It is at most 20 MB long: of longer ones, the weakest hits are left out,
        and the document says how many.
        """
        return document_html(self)

    def _repr_html_(self) -> str:
        return "".join(result._repr_html_() for result in self.results) + note_html(self.convention)


class SelfInfluenceAnswer(ScoresAnswer):
    """`rows_total`: number of rows with the requested labels; `results` is one page of them."""

    rows_total: int
    results: list[Hit]
    timing_ms: Timing

    def to_pandas(self) -> pandas.DataFrame:
        """One line for each row."""
        return frame([_hit_record(hit) for hit in self.results])

    def _repr_html_(self) -> str:
        return _hits_html("Self-influence", self.results) + note_html(self.convention)


class ExampleAnswer(AnswerSchema):
    """One row of a data set; prediction, loss and correct are those of the last checkpoint, null where unknown."""

    split: Split
    row: int
    label: Label | None
    label_name: str | None
    prediction: Label | None
    prediction_name: str | None
    loss: float | None
    correct: bool | None
    example: Payload | None = Field(description="As of a hit; null where rendering was not asked for.")

    def _repr_html_(self) -> str:
        words = f"{self.split} row {self.row}, label {label_text(self.label, self.label_name)}"
        if self.prediction is not None:
            words += f", predicted {label_text(self.prediction, self.prediction_name)}"
        return f"<p>{example_html(self.example)} {escape(words)}</p>"


def _hit_records(results: Iterable[Influence]) -> list[dict[str, Any]]:
    """One record for each hit, with the position of its query, its side and its rank, counted from 1."""
    return [
        {"query": query, "side": side, "rank": rank, **_hit_record(hit)}
        for query, result in enumerate(results)
        for side, hits in (("proponent", result.proponents), ("opponent", result.opponents))
        for rank, hit in enumerate(hits, 1)
    ]


def _hit_record(hit: Hit) -> dict[str, Any]:
    """The hit's scalars, its score by checkpoint as `part:NAME` and by layer as `layer:NAME`."""
    by_checkpoint = {f"part:{name}": score for name, score in (hit.parts or {}).items()}
    by_layer = {f"layer:{name}": score for name, score in (hit.layers or {}).items()}
    return hit.model_dump(exclude={"parts", "layers", "example"}) | by_checkpoint | by_layer


def _hits_html(title: str, hits: Sequence[Hit]) -> str:
    """A table of hits, with a column of percentiles where any hit has one."""
    percentiles = any(hit.percentile is not None for hit in hits)
    heads = ("row", "score", *["percentile"] * percentiles, "label", "prediction", "loss", "example")
    return table_html(title, heads, [_hit_cells(hit, percentiles) for hit in hits])


def _hit_cells(hit: Hit, percentiles: bool) -> list[str]:
    percentile = "" if hit.percentile is None else f"{hit.percentile:.2f} %"
    texts = (
        str(hit.row),
        f"{hit.score:+.4g}",
        *[percentile] * percentiles,
        label_text(hit.label, hit.label_name),
        label_text(hit.prediction, hit.prediction_name),
        "" if hit.loss is None else f"{hit.loss:.4g}",
    )
    return [*map(escape, texts), example_html(hit.example)]
