"""The wire schemas: what goes over HTTP, in both directions. The service imports them.

A request refuses fields that it does not know. Rows count from 0 and never change their meaning within an index.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, WithJsonSchema, model_validator

from gradtrace_client import _display
from gradtrace_client._sources import at_least_one, exactly_one, require_one

if TYPE_CHECKING:
    import pandas

MAX_K = 1000
MAX_QUERIES = 128
MAX_HITS = 25_000  # at either end, of all queries of a request: the answer is written in one piece


def _whole(value: Any) -> Any:
    """1.0 is an integer to JSON, which knows numbers alone."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


WHOLE = BeforeValidator(_whole)
Row = Annotated[int, Field(strict=True, ge=0, lt=2**53), WHOLE]
Label = int | float
Number = Annotated[float, Field(allow_inf_nan=False)]
Payload = dict[str, Any]  # what the task's parse takes and its render gives: {"image": ...}, {"text": ...}, ...
Weights = Literal["learning_rate", "learning_rate_steps", "equal"]
Similarity = Literal["cosine", "dot", "l2"]
Aggregate = Literal["mean"]
Include = Literal["parts", "layers", "percentiles", "examples"]
Split = Literal["train", "query"]
Order = Literal["descending", "ascending"]


def _value(value: Any) -> float | str | bool:
    """One function for all kinds, since pydantic's unions put the kind's name into the path of the field."""
    if isinstance(value, bool | str):
        return value
    if isinstance(value, int | float) and abs(value) < 2**63:  # NaN compares false
        return float(value)
    raise ValueError("give a number or the name of a class")


def _class(value: Any) -> float | str:
    if isinstance(value, bool):
        raise ValueError("give a number or the name of a class")
    return _value(value)


Class = Annotated[
    float | str, PlainValidator(_class), WithJsonSchema({"anyOf": [{"type": "number"}, {"type": "string"}]})
]
Value = Annotated[
    float | str | bool,
    PlainValidator(_value),
    WithJsonSchema({"anyOf": [{"type": "number"}, {"type": "string"}, {"type": "boolean"}]}),
]

SOURCES = ("example", "examples", "query_rows", "train_rows")  # fields that say what is asked about


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Answer(BaseModel):
    """Answers may gain fields in a later service of the same major version; a client passes over them."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class Condition(_Request):
    """What the value of a column must meet, in all that is given. Unknown values meet nothing."""

    model_config = ConfigDict(json_schema_extra=at_least_one(("min", "max", "in")))

    min: Annotated[Number, Field(strict=True)] | None = Field(None, description="At least this.")
    max: Annotated[Number, Field(strict=True)] | None = Field(None, description="At most this.")
    in_: list[Value] | None = Field(
        None, alias="in", min_length=1, description="One of these; classes also by their names."
    )

    @model_validator(mode="after")
    def _some(self) -> Condition:
        if self.min is None and self.max is None and self.in_ is None:
            raise ValueError("give one or more of min, max and in")
        return self


class RowFilter(_Request):
    """Which training rows may be found: those that meet every condition given."""

    labels: list[Class] | None = Field(
        None, min_length=1, description="Rows with one of these labels; classes also by their names."
    )
    correct_only: bool = Field(False, description="Rows that the last checkpoint predicts correctly.")
    rows: list[Row] | None = Field(None, min_length=1, description="Only these rows.")
    exclude_rows: list[Row] | None = Field(None, description="All rows but these.")
    where: dict[str, Condition] | None = Field(
        None,
        min_length=1,
        description="By column (label, prediction, loss, correct, norm) what its value must meet: "
        '{"loss": {"min": 1.0}, "prediction": {"in": [3, 5]}}.',
    )


class Question(_Request):
    index: str | None = Field(None, max_length=64, description="Which of the service's indexes. Default: the first.")
    method: str = Field("tracin", max_length=64, description="One of the methods that GET /index lists.")
    checkpoints: list[str] | None = Field(
        None, min_length=1, description="Names of the checkpoints used. Default: all."
    )
    weights: Weights | None = Field(None, description="Weight of each checkpoint. Default: the method's own.")
    damping: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="Added to the curvature, relative to each layer's mean eigenvalue."
    )
    segments: Annotated[int, Field(strict=True, ge=1, le=1000), WHOLE] | None = Field(
        None, description="Stretches of training that each have one curvature and one gradient."
    )
    similarity: Similarity | None = Field(None, description="How representations are compared.")


class Queries(Question):
    """Exactly one of `example`, `examples`, `query_rows` and `train_rows` says what is asked about."""

    model_config = ConfigDict(json_schema_extra=exactly_one(SOURCES))

    example: Payload | None = Field(None, description="One example in the task's own form.")
    examples: list[Payload] | None = Field(
        None, min_length=1, max_length=MAX_QUERIES, description="Several examples in the task's own form."
    )
    query_rows: list[Row] | None = Field(
        None, min_length=1, max_length=MAX_QUERIES, description="Rows of the task's query data set."
    )
    train_rows: list[Row] | None = Field(
        None, min_length=1, max_length=MAX_QUERIES, description="Rows of the training data set."
    )
    filter: RowFilter | None = Field(None, description="Which training rows may be found. Default: all.")
    aggregate: Aggregate | None = Field(
        None, description="`mean`: one result, whose scores are the means over the queries of their scores."
    )
    target: Literal["loss"] | None = Field(
        None, description="`loss`: explain the loss even where the task defines another measurement."
    )

    @model_validator(mode="after")
    def _one_source(self) -> Queries:
        require_one(self, SOURCES)
        return self


class InfluenceRequest(Queries):
    k: Annotated[int, Field(strict=True, ge=1, le=MAX_K), WHOLE] = Field(
        10, description="Hits at each of the two ends."
    )
    rescore: bool = Field(
        False,
        description="Recompute the full gradients of the rows found, twice as many at either end as asked for, and "
        "order them by exact scores.",
    )
    include: frozenset[Include] = Field(
        frozenset(("parts", "examples")),
        description="What hits carry besides: `parts`, the score by checkpoint; `layers`, the score by layer; "
        "`percentiles`, where the score stands among those of all rows; `examples`, the rendered example.",
    )

    @model_validator(mode="after")
    def _affordable(self) -> InfluenceRequest:
        results = 1 if self.aggregate else self.queries
        if self.rescore and results * self.k > MAX_K:
            raise ValueError(
                f"rescore takes {MAX_K} hits at each end at most, over all results, not {results} x {self.k}; lower k "
                "or send fewer queries at a time"
            )
        if results * self.k > MAX_HITS:
            raise ValueError(
                f"an answer holds {MAX_HITS:,} hits at each end at most, over all results, not {results} x {self.k}; "
                "lower k or send fewer queries at a time"
            )
        return self

    @property
    def queries(self) -> int:
        """How many examples are asked about."""
        return max(len(given or ()) for given in (self.examples, self.query_rows, self.train_rows)) or 1


class SelfInfluenceRequest(Question):
    """One page of the training rows, ordered by their influence on themselves."""

    k: Annotated[int, Field(ge=1, le=MAX_K)] = Field(10, description="Rows in the answer.")
    offset: Annotated[int, Field(ge=0, lt=2**53)] = Field(0, description="Rows passed over before the first.")
    segments: Annotated[int, Field(ge=1, le=1000)] | None = Field(  # not strict: an address holds text alone
        None, description="Stretches of training that each have one curvature and one gradient."
    )
    order: Order = Field("descending", description="`descending`: the rows with the largest score first.")
    labels: list[Number] | None = Field(None, min_length=1, description="Only rows with one of these labels.")
    examples: bool = Field(True, description="Whether the answer carries the rendered examples.")


class CheckpointInfo(_Answer):
    name: str
    step: int
    learning_rate: float
    learning_rate_sum: float | None = Field(None, description="Of all steps up to this one; null where not known.")
    run: int = Field(0, description="Which training run it is of.")
    kind: str = Field(
        "weights",
        description="`weights` as training left them; `average` of a segment's, for fast-source alone; `recorded`: the "
        "training up to there, for hydra alone.",
    )


class IndexInfo(_Answer):
    """Which index answered. `generation` grows with every change of the index."""

    generation: int
    task: str
    rows: int
    checkpoints: list[CheckpointInfo]
    dimensions: int
    basis: str
    precision: str


class IndexDetails(IndexInfo):
    methods: list[str]
    class_names: list[str] | None
    query_rows: int = Field(description="Size of the task's query data set, 0 where it has none.")
    conventions: dict[str, str] = Field(description="By method: sign and unit of its scores.")


class Timing(_Answer):
    """Milliseconds. `total` runs from the validated request to the finished answer and includes what no part covers."""

    queue: float
    batch: int = Field(default=1, description="Queries answered in the same pass, whose times the others are.")
    gradient: float
    search: float
    rescore: float = 0.0
    rescore_per_row: float | None = Field(default=None, description="`rescore` by the number of rows rescored.")
    percentiles: float = 0.0
    render: float
    total: float


class Hit(_Answer):
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
    example: Payload | None = Field(
        description='{"image": data URL}, {"text": ...} or {"features": {...}}; {"error": why} where it failed.'
    )

    def example_text(self) -> str:
        """The example in one line of at most 200 characters; an image is only named."""
        return _display.example_text(self.example)


class QueryInfo(_Answer):
    """What was explained. `split` and `row` are set where the query was asked by row.

    For the mean of several queries `rows` takes the place of `row`, `label` and `prediction` are those that all share,
    and `loss` is their mean.
    """

    split: Split | None
    row: int | None
    rows: list[int] | None = None
    count: int = Field(default=1, description="Queries whose mean it is.")
    target: str = Field(description="The quantity explained, such as `loss` or `loss at the predicted label`.")
    label: Label | None
    label_name: str | None
    prediction: Label | None
    prediction_name: str | None
    loss: float | None
    example: Payload | None

    def example_text(self) -> str:
        """The example in one line of at most 200 characters; an image is only named."""
        return _display.example_text(self.example)


class Distribution(_Answer):
    """The scores of all training rows on the query, whatever the filter."""

    mean: float
    std: float
    quantiles: dict[str, float] = Field(description="By percentage: `0` is the lowest score, `100` the highest.")


class Influence(_Answer):
    """The answer to one query, most extreme hit first at either end.

    Proponents have positive scores and opponents negative ones, so there may be fewer than `k`, and `note` says so. Of
    `repsim` alone they are the most and the least alike.
    """

    query: QueryInfo
    proponents: list[Hit]
    opponents: list[Hit]
    rows_searched: int = Field(description="Rows that the filter left.")
    rows_touched: int = Field(description="Rows of which the search read more than the first level.")
    rows_rescored: int = Field(default=0, description="Rows whose full gradients were recomputed.")
    distribution: Distribution | None = Field(default=None, description="Where `percentiles` were included.")
    note: str | None = Field(
        default=None, description="Why there are fewer hits than asked for, or why every score is zero."
    )

    def to_pandas(self) -> pandas.DataFrame:
        """One line a hit, proponents first."""
        return _display.frame(_display.influence_records([self]))

    def _repr_html_(self) -> str:
        return _display.influence_html(self)


class Recall(_Answer):
    """Mean shares of the exact best and worst rows that the searcher found on held-out queries when it was built."""

    top: float
    bottom: float


class InfluenceAnswer(_Answer):
    """`results` are in the order of the queries, or one result for their mean.

    `exact`: the search found the rows that scoring every stored row would find. `rescored`: their scores are those of
    full gradients, not of the stored rows.
    """

    index: IndexInfo
    method: str
    convention: str = Field(description="Sign and unit of the scores.")
    exact: bool
    recall: Recall | None = Field(
        None,
        description="Of the searcher with this method, where not exact and asked as the queries it was measured with: "
        "its `k`, default options, all checkpoints, no filter, no rescoring and no mean of queries.",
    )
    rescored: bool = False
    results: list[Influence]
    timing_ms: Timing

    def to_pandas(self) -> pandas.DataFrame:
        """One line a hit; `query` is the position in `results`."""
        return _display.frame(_display.influence_records(self.results))

    def _repr_html_(self) -> str:
        return "".join(_display.influence_html(result) for result in self.results) + _display.note_html(self.convention)


class SelfInfluenceAnswer(_Answer):
    """`rows_total`: rows that the request's labels left, of which `results` is one page."""

    index: IndexInfo
    method: str
    convention: str
    rows_total: int
    results: list[Hit]
    timing_ms: Timing

    def to_pandas(self) -> pandas.DataFrame:
        """One line a row."""
        return _display.frame([_display.hit_record(hit) for hit in self.results])

    def _repr_html_(self) -> str:
        return _display.hits_html("Self-influence", self.results) + _display.note_html(self.convention)


class ExampleAnswer(_Answer):
    """One row of a data set. Prediction, loss and correct are known for training rows only."""

    split: Split
    row: int
    label: Label | None
    label_name: str | None
    prediction: Label | None
    prediction_name: str | None
    loss: float | None
    correct: bool | None
    example: Payload

    def _repr_html_(self) -> str:
        return _display.example_answer_html(self)
