"""The wire schemas of requests: what a client sends. The service imports them.

A request with an unknown field is refused. Rows are counted from 0 and keep their numbers for the life of an index.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    PlainValidator,
    ValidatorFunctionWrapHandler,
    WithJsonSchema,
    WrapValidator,
    model_validator,
)
from typing_extensions import Self

from gradtrace_client.schemas import Payload

MAX_K = 1000
MAX_QUERIES = 128
MAX_HITS = 25_000  # at either end, over all queries of a request: the service writes an answer in one piece
MAX_ROWS = 2**18  # of a filter: 0.1 s to read
MAX_TOKEN_ROWS = 32  # each is differentiated at every checkpoint, in one pass
MAX_VALUES = 10_000  # labels or values of a filter: more than classifiers have classes
MAX_CHECKPOINTS = 1_000
MAX_NAME = 255  # characters of a checkpoint's name, which is a file's
FEATURE = "feature:"  # begins the name of a column that is a feature of a table
MAX_COLUMNS = 100  # of a filter
_MAX_FIELDS = 100  # of an object with a fixed set of fields: beyond, unknown ones are not named singly

SOURCES = ("example", "examples", "query_rows", "train_rows")  # the fields that give the queries
_PAIRS_SOURCES = ("example", "examples", "query_rows")
_JSON_TYPES = {"example": "object", "min": "number", "max": "number"}  # of the fields that are not lists


def whole(value: Any) -> Any:
    """1.0 is an integer in JSON, which has only numbers."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _wholes(value: Any) -> Any:
    """`whole` for a list: one call, where an element's own validator would triple the time for thousands of rows."""
    if isinstance(value, list) and len(value) <= MAX_ROWS and float in map(type, value):
        return [whole(element) for element in value]
    return value


def _at_most(most: int) -> BeforeValidator:
    """Counts before reading: of objects and sets, pydantic reads, and refuses, every entry before it counts them."""

    def counted(value: Any) -> Any:
        if isinstance(value, dict | list) and len(value) > most:
            raise ValueError(f"give at most {most} entries, not {len(value):,}")
        return value

    return BeforeValidator(counted)


def _value(value: Any) -> float | str | bool:
    """One function for all types, because pydantic's unions put the type's name into the path of the field."""
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and len(value) <= MAX_NAME:
        return value
    if isinstance(value, int | float) and abs(value) < 2**63:  # NaN compares false
        return float(value)
    raise ValueError("give a number or the name of a class")


def _class(value: Any) -> float | str:
    if isinstance(value, bool):
        raise ValueError("give a number or the name of a class")
    return _value(value)


Row = Annotated[int, Field(strict=True, ge=0, lt=2**53), BeforeValidator(whole)]
# Of long lists the first element that does not fit is named, and reading ends there.
Rows = Annotated[
    list[Annotated[int, Field(strict=True, ge=0, lt=2**53)]],
    Field(max_length=MAX_ROWS, fail_fast=True),
    BeforeValidator(_wholes),
]
Name = Annotated[str, Field(max_length=MAX_NAME)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Flag = Annotated[bool, Field(strict=True)]
Class = Annotated[
    float | str, PlainValidator(_class), WithJsonSchema({"anyOf": [{"type": "number"}, {"type": "string"}]})
]
Value = Annotated[
    float | str | bool,
    PlainValidator(_value),
    WithJsonSchema({"anyOf": [{"type": "number"}, {"type": "string"}, {"type": "boolean"}]}),
]
Weights = Literal["learning_rate", "learning_rate_steps", "equal"]
Similarity = Literal["cosine", "dot", "l2"]
Aggregate = Literal["mean"]
Include = Literal["parts", "layers", "percentiles", "histogram", "probabilities", "clusters", "examples"]
Prefilter = Literal["bm25", "repsim"]
Order = Literal["descending", "ascending"]


def _require_one(request: BaseModel, names: tuple[str, ...]) -> None:
    """Raises ValueError unless exactly one of the fields is given."""
    given = [name for name in names if getattr(request, name) is not None]
    if len(given) != 1:
        said = " and ".join(given) if given else "none of them"
        raise ValueError(f"give exactly one of {', '.join(names)}; the request has {said}")


def _exactly_one(names: tuple[str, ...]) -> dict[str, JsonValue]:
    """JSON Schema: one of the fields is given, and the others are null or absent."""
    return {"oneOf": [_given(name, names) for name in names]}


def _at_least_one(names: tuple[str, ...]) -> dict[str, JsonValue]:
    """JSON Schema: at least one of the fields is given."""
    return {"anyOf": [_given(name, (name,)) for name in names]}


def _given(name: str, names: tuple[str, ...]) -> JsonValue:
    types: dict[str, JsonValue] = {
        other: {"type": _JSON_TYPES.get(other, "array") if other == name else "null"} for other in names
    }
    return {"required": [name], "properties": types}


class RequestSchema(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _has_few_fields(cls, data: Any) -> Any:
        """Unknown fields are refused one by one, which takes long for a million of them."""
        if isinstance(data, dict) and len(data) > _MAX_FIELDS:
            raise ValueError(
                f"there are {len(data):,} fields, of which {len(cls.model_fields)} are known; leave out others"
            )
        return data


class LabelTarget(RequestSchema):
    """The loss that the query would have with another label; or how much greater it is than with a second one."""

    label: Class = Field(description="The loss at this label is explained: a class by number or name, or a value.")
    rather_than: Class | None = Field(
        None, description="The loss at `label` minus that at this one is explained: proponents push towards `label`."
    )


def _target(value: Any, read: ValidatorFunctionWrapHandler) -> LabelTarget | Literal["loss"]:
    """By hand, because pydantic's unions put the type's name into the path of the field."""
    if value == "loss":
        return "loss"
    if not isinstance(value, dict | LabelTarget):
        raise ValueError('give "loss", or an object with label and, for a contrast, rather_than')
    return LabelTarget.model_validate(value)


Target = Annotated[LabelTarget | Literal["loss"], WrapValidator(_target)]


class Condition(RequestSchema):
    """What the value of a column must meet, in everything that is given. Unknown values meet no condition."""

    model_config = ConfigDict(json_schema_extra=_at_least_one(("min", "max", "in")))

    min: Annotated[Number, Field(strict=True)] | None = Field(None, description="At least this.")
    max: Annotated[Number, Field(strict=True)] | None = Field(None, description="At most this.")
    in_: Annotated[list[Value], Field(min_length=1, max_length=MAX_VALUES, fail_fast=True)] | None = Field(
        None, alias="in", description="One of these; classes also by their names."
    )

    @model_validator(mode="after")
    def _restricts(self) -> Condition:
        if self.min is None and self.max is None and self.in_ is None:
            raise ValueError("give one or more of min, max and in")
        return self


class RowFilter(RequestSchema):
    """Which training rows are searched: those that meet every condition given."""

    labels: Annotated[list[Class], Field(min_length=1, max_length=MAX_VALUES, fail_fast=True)] | None = Field(
        None, description="Rows with one of these labels; classes also by their names."
    )
    correct_only: Flag = Field(False, description="Rows that the last checkpoint predicts correctly.")
    rows: Rows | None = Field(None, min_length=1, description="Only these rows.")
    exclude_rows: Rows | None = Field(None, description="All rows but these.")
    where: (
        Annotated[dict[Name, Condition], Field(min_length=1, max_length=MAX_COLUMNS), _at_most(MAX_COLUMNS)] | None
    ) = Field(
        None,
        description="By column (label, prediction, loss, correct, norm) what its value must meet: "
        '{"loss": {"min": 1.0}, "prediction": {"in": [3, 5]}}.',
    )


class Question(RequestSchema):
    index: str | None = Field(None, max_length=64, description="Which of the service's indexes. Default: the first.")
    method: str = Field("tracin", max_length=64, description="One of the methods that GET /index lists.")
    checkpoints: Annotated[list[Name], Field(min_length=1, max_length=MAX_CHECKPOINTS, fail_fast=True)] | None = Field(
        None, description="Names of the checkpoints used. Default: all."
    )
    weights: Weights | None = Field(None, description="Weight of each checkpoint. Default: the method's own.")
    damping: Annotated[Number, Field(strict=True, gt=0)] | None = Field(
        None, description="Added to the curvature, relative to the mean eigenvalue."
    )
    segments: Annotated[int, Field(strict=True, ge=1, le=1000), BeforeValidator(whole)] | None = Field(
        None, description="Segments of the training, each with one curvature and one gradient."
    )
    similarity: Similarity | None = Field(None, description="How representations are compared.")


class _ExamplesQuestion(Question):
    """A question about examples, which are given in the task's own form or by their rows."""

    example: Payload | None = Field(None, description="One query in the task's own form.")
    examples: list[Payload] | None = Field(
        None, min_length=1, max_length=MAX_QUERIES, description="Several queries in the task's own form."
    )
    query_rows: list[Row] | None = Field(
        None, min_length=1, max_length=MAX_QUERIES, description="Rows of the task's query data set."
    )
    train_rows: list[Row] | None = Field(
        None, min_length=1, max_length=MAX_QUERIES, description="Rows of the training data set."
    )
    target: Target | None = Field(
        None,
        description="`loss`: explain the loss even where the task defines another measurement. An object: explain the "
        "loss at another label, or the difference of the losses at two.",
    )


class ScoresQuestion(_ExamplesQuestion):
    """Exactly one of `example`, `examples`, `query_rows` and `train_rows` gives the queries."""

    model_config = ConfigDict(json_schema_extra=_exactly_one(SOURCES))

    @model_validator(mode="after")
    def _has_one_source(self) -> Self:
        _require_one(self, SOURCES)
        return self

    @property
    def queries(self) -> int:
        """Number of queries."""
        return max(len(given or ()) for given in (self.examples, self.query_rows, self.train_rows)) or 1


class Queries(ScoresQuestion):
    """Exactly one of `example`, `examples`, `query_rows` and `train_rows` gives the queries."""

    filter: RowFilter | None = Field(None, description="Which training rows are searched. Default: all.")
    aggregate: Aggregate | None = Field(
        None, description="`mean`: one result, whose scores are the means over the queries of their scores."
    )


class InfluenceRequest(Queries):
    k: Annotated[int, Field(strict=True, ge=1, le=MAX_K), BeforeValidator(whole)] = Field(
        10, description="Hits at each of the two ends."
    )
    rescore: Flag = Field(
        False,
        description="Recompute the full gradients of twice as many rows as asked for at either end, and order them by "
        "their exact scores.",
    )
    prefilter: Prefilter | None = Field(
        None,
        description="Rescore the rows that are most alike by this method, in place of those that the search finds.",
    )
    candidates: Annotated[int, Field(strict=True, ge=1, le=MAX_K), BeforeValidator(whole)] = Field(
        100, description="How many rows a prefilter gives."
    )
    include: Annotated[frozenset[Include], Field(fail_fast=True), _at_most(_MAX_FIELDS)] = Field(
        frozenset(("parts", "examples")),
        description="What hits carry besides: `parts`, the score by checkpoint; `layers`, the score by layer; "
        "`percentiles`, where the score stands among those of all rows; `clusters`, which of them are near-duplicates; "
        "`examples`, the rendered example. What results carry: `histogram`, that of the scores of all rows; "
        "`probabilities`, those of the query's classes.",
    )

    @model_validator(mode="after")
    def _is_affordable(self) -> InfluenceRequest:
        results = 1 if self.aggregate else self.queries
        for wanted, what, each, most in (
            (self.rescore, "rescore takes {} hits at each end", "k", MAX_K),
            (self.prefilter, "a prefilter gives {} candidates", "candidates", MAX_K),
            ("clusters" in self.include, "clusters are of {} hits at each end", "k", MAX_K),
            (True, "an answer holds {:,} hits at each end", "k", MAX_HITS),
        ):
            if wanted and results * getattr(self, each) > most:
                raise ValueError(
                    f"{what.format(most)} at most, over all results, not {results} x {getattr(self, each)}; lower "
                    f"{each} or send fewer queries at a time"
                )
        return self


class GroupsRequest(Queries):
    by: str = Field(
        "label",
        max_length=len(FEATURE) + MAX_NAME,
        description="The column whose values make the groups: one of the index's `columns`, or `feature:NAME`, a "
        "feature of the training rows. Of numbers that are not whole, or too many, ten ranges are the groups.",
    )


class PairsRequest(_ExamplesQuestion):
    """Training examples, which need not be in the training set, against queries.

    Exactly one of `example`, `examples` and `query_rows` gives the queries; `train_examples`, `train_rows` or both give
    the training examples.
    """

    model_config = ConfigDict(
        json_schema_extra=_exactly_one(_PAIRS_SOURCES) | _at_least_one(("train_examples", "train_rows"))
    )

    train_examples: list[Payload] | None = Field(
        None, min_length=1, max_length=MAX_QUERIES, description="In the task's own form, with labels."
    )

    @model_validator(mode="after")
    def _has_both_sides(self) -> PairsRequest:
        _require_one(self, _PAIRS_SOURCES)
        if self.train_examples is None and self.train_rows is None:
            raise ValueError("give train_examples, train_rows or both")
        return self


class RemovalRequest(ScoresQuestion):
    """What leaving training rows out of the training would do to queries.

    Exactly one of `example`, `examples`, `query_rows` and `train_rows` gives the queries.
    """

    method: str = Field("influence", max_length=64, description="One of the methods that GET /index lists.")
    rows: Rows = Field(min_length=1, description="The training rows that are left out, together.")


class TokensRequest(ScoresQuestion):
    """Which tokens the scores of training rows come from, for one query.

    Exactly one of `example`, `examples`, `query_rows` and `train_rows` gives the query.
    """

    rows: Annotated[list[Row], Field(min_length=1, max_length=MAX_TOKEN_ROWS)] = Field(
        description="The training rows whose scores are split."
    )

    @model_validator(mode="after")
    def _has_one_query(self) -> TokensRequest:
        if self.queries > 1:
            raise ValueError(f"tokens are those of one query, not of {self.queries}: send them one by one")
        return self


class SelfInfluenceRequest(Question):
    """One page of the training rows, ordered by their influence on themselves."""

    k: Annotated[int, Field(ge=1, le=MAX_K)] = Field(10, description="Rows in the answer.")
    offset: Annotated[int, Field(ge=0, lt=2**53)] = Field(0, description="Rows skipped before the first.")
    # Again, and not strict: a URL holds only text.
    damping: Annotated[Number, Field(gt=0)] | None = Field(
        None, description="Added to the curvature, relative to the mean eigenvalue."
    )
    segments: Annotated[int, Field(ge=1, le=1000)] | None = Field(
        None, description="Segments of the training, each with one curvature and one gradient."
    )
    order: Order = Field("descending", description="`descending`: the rows with the largest score first.")
    labels: Annotated[list[Number], Field(min_length=1, max_length=MAX_VALUES, fail_fast=True)] | None = Field(
        None, description="Only rows with one of these labels."
    )
    examples: bool = Field(True, description="Whether the answer carries the rendered examples.")
