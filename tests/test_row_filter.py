"""Filters against plain loops over the rows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from gradtrace import QueryError, RowFilter

pytestmark = pytest.mark.unit

NAMES = ["cat", "dog", "emu", "fox"]
NUMBERS = st.sampled_from([-1.0, 0.0, 0.5, 1.0, 2.0, 3.0])
CONDITION = st.fixed_dictionaries(
    {}, optional={"min": NUMBERS, "max": NUMBERS, "in": st.lists(st.sampled_from([0, 1, 2, 3, 0.5, True]), min_size=1)}
).filter(bool)


@st.composite
def tables(draw: st.DrawFn) -> dict[str, list[Any]]:
    """Columns of a few rows, unknown values among them."""
    count = draw(st.integers(1, 20))

    def column(values: st.SearchStrategy[Any]) -> list[Any]:
        return draw(st.lists(st.none() | values, min_size=count, max_size=count))

    known = draw(st.lists(NUMBERS, min_size=count, max_size=count))
    classes = st.integers(0, 3)
    return {"label": column(classes), "prediction": column(classes), "loss": known, "correct": column(st.booleans())}


def as_store_gives_them(table: Mapping[str, list[Any]]) -> dict[str, NDArray[Any]]:
    columns = {}
    for name, values in table.items():
        if name == "correct":
            columns[name] = np.array(values, dtype=object if None in values else bool)
        else:
            columns[name] = np.array([math.nan if value is None else value for value in values])
    return columns


def meets(value: Any, condition: Mapping[str, Any]) -> bool:
    if value is None:
        return False
    inside = condition.get("min", -math.inf) <= value <= condition.get("max", math.inf)
    return inside and ("in" not in condition or value in condition["in"])


@given(
    tables(),
    st.dictionaries(st.sampled_from(["label", "prediction", "loss", "correct"]), CONDITION),
    st.none() | st.lists(st.integers(0, 3) | st.sampled_from(NAMES)),
    st.booleans(),
)
def test_conditions_hold_together(
    table: dict[str, list[Any]], where: dict[str, Any], labels: list[Any] | None, correct_only: bool
) -> None:
    count = len(table["loss"])
    expected = [
        all(meets(table[name][row], condition) for name, condition in where.items())
        and (labels is None or table["label"][row] in [NAMES.index(x) if isinstance(x, str) else x for x in labels])
        and (not correct_only or table["correct"][row] is True)
        for row in range(count)
    ]
    row_filter = RowFilter(labels=labels, correct_only=correct_only, where=where)
    if not any(expected):
        with pytest.raises(QueryError, match="leaves no training row"):
            row_filter.mask(count, as_store_gives_them(table), NAMES)
        return
    mask = row_filter.mask(count, as_store_gives_them(table), NAMES)
    assert mask is not None
    assert mask.tolist() == expected


def test_classes_by_name_in_columns_of_classes() -> None:
    columns = {"label": np.array([0, 1, 2]), "prediction": np.array([1, 1, 3]), "loss": np.array([0.1, 1.0, 2.0])}
    mask = RowFilter(where={"prediction": {"in": ["dog", 3]}, "label": {"in": ["cat", "emu"]}}).mask(3, columns, NAMES)
    assert mask is not None
    assert mask.tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("row_filter", "words"),
    [
        (RowFilter(where={"colour": {"min": 1}}), "column 'colour'; the index has label, loss"),
        (RowFilter(where={"loss": {"above": 1}}), r"condition on loss is \{'above': 1\}.*min, max and in"),
        (RowFilter(where={"loss": {}}), "one or more of min, max and in"),
        (RowFilter(where={"loss": {"min": "1"}}), "numbers, not '1'"),
        (RowFilter(where={"loss": {"in": ["cat"]}}), "class 'cat'; nothing has a name there: give numbers"),
        (RowFilter(labels=["cow"]), "class 'cow'; the classes are cat, dog, emu, fox"),
        (RowFilter(where={"label": {"in": ["cow"]}}), "class 'cow'"),
        (RowFilter(where={"loss": {"min": 5}}), "leaves no training row"),
    ],
    ids=str,
)
def test_filters_that_are_refused(row_filter: RowFilter, words: str) -> None:
    columns = {"label": np.array([0, 1]), "loss": np.array([0.5, 1.0])}
    with pytest.raises(QueryError, match=words):
        row_filter.mask(2, columns, NAMES)


def test_names_need_a_task_that_has_them() -> None:
    with pytest.raises(QueryError, match="give numbers"):
        RowFilter(labels=["cat"]).mask(1, {"label": np.array([0])})


def test_a_dict_is_the_filter_with_its_conditions() -> None:
    given = {"labels": [1, "dog"], "correct_only": True, "exclude_rows": range(3), "where": {"loss": {"max": 2}}}
    assert RowFilter.of(given) == RowFilter(**given)
    assert RowFilter.of(None) == RowFilter.of({}) == RowFilter()
    assert RowFilter.of(filter_ := RowFilter(rows=[3])) is filter_


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"label": [3]}, "no condition 'label'; choose from labels, correct_only, rows, exclude_rows, where"),
        ({"labels": 3}, "labels of a filter is a list, not 3"),
        ({"labels": "cat"}, "labels of a filter is a list, not 'cat'"),
        ({"labels": [None]}, "numbers or names of classes, not None"),
        ({"correct_only": "yes"}, "correct_only of a filter is True or False, not 'yes'"),
        ({"rows": 3}, "rows of a filter is a list, not 3"),
        ({"rows": [0.5]}, "row numbers, not float64"),
        ({"rows": ["a"]}, "row numbers, not"),
        ({"where": ["loss"]}, "where of a filter gives conditions by column"),
        ({"where": {"loss": 3}}, "where of a filter gives conditions by column"),
        ({"where": {"loss": {"in": 3}}}, "on loss of a filter is a list, not 3"),
        ([3], r"a RowFilter or a dict of labels, .*, not \[3\]"),
    ],
    ids=str,
)
def test_dicts_that_are_refused(given: Any, words: str) -> None:
    columns = {"label": np.array([0, 1]), "loss": np.array([0.5, 1.0])}
    with pytest.raises(QueryError, match=words):
        RowFilter.of(given).mask(2, columns, NAMES)
