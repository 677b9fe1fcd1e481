"""docs/queries.md describes everything that may be asked, and docs/api.md is the API as it is."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any, get_args

import pytest

from gradtrace import Index
from gradtrace_client import Client
from gradtrace_client.group_and_pair_schemas import GroupsRequest, PairsRequest
from gradtrace_client.schemas import (
    Condition,
    Include,
    InfluenceRequest,
    Question,
    RowFilter,
    Weights,
)
from gradtrace_service import cli
from gradtrace_service.api_reference import api_page

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "queries.md").read_text()


def test_every_field_of_a_question_has_a_section_with_an_example() -> None:
    sections = dict(re.findall(r"^### `(\w+)`\n(.*?)(?=^##|\Z)", PAGE, re.MULTILINE | re.DOTALL))
    assert set(sections) == set(InfluenceRequest.model_fields)
    for name, text in sections.items():
        assert f'"{name}": ' in text, f"no example of {name}"


@pytest.mark.parametrize("name", [*RowFilter.model_fields, *get_args(Include)])
def test_every_part_of_a_filter_and_of_a_hit_is_listed(name: str) -> None:
    assert re.search(rf"^- [^:]*`{name}`[^:]*: ", PAGE, re.MULTILINE)


@pytest.mark.parametrize("name", [f.alias or n for n, f in Condition.model_fields.items()] + list(get_args(Weights)))
def test_every_condition_and_weight_is_named(name: str) -> None:
    assert f"`{name}`" in PAGE


def test_the_sdk_takes_every_field_and_the_library_all_but_what_it_is_asked_with() -> None:
    fields = set(InfluenceRequest.model_fields)
    assert set(inspect.signature(Client.influence).parameters) == fields
    sources = {"example", "examples", "query_rows", "train_rows", "index"}
    assert set(inspect.signature(Index.influence).parameters) - {"self", "examples"} == fields - sources


@pytest.mark.parametrize(
    ("heading", "request_type", "sdk", "library"),
    [
        ("Groups of rows", GroupsRequest, Client.groups, Index.group_influence),
        ("Pairs", PairsRequest, Client.pairs, Index.pairs),
    ],
)
def test_groups_and_pairs_are_described_and_taken(heading: str, request_type: Any, sdk: Any, library: Any) -> None:
    text = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    fields = set(request_type.model_fields)
    own = fields - set(Question.model_fields) - set(InfluenceRequest.model_fields)
    assert {name for name in own if f"`{name}`" in text and f'"{name}": ' in text} == own
    assert set(inspect.signature(sdk).parameters) == fields
    examples = {"example", "examples", "query_rows", "train_rows", "index"}
    assert fields - examples <= set(inspect.signature(library).parameters)


def test_the_command_line_has_the_options_that_the_page_shows() -> None:
    options = set(inspect.signature(cli.query).parameters) - {"row_filter"} | {"filter"}
    shown = set(re.findall(r"--([a-z-]+)", "\n".join(re.findall(r"gradtrace query.*", PAGE))))
    assert {name.replace("-", "_") for name in shown} <= options


def test_the_page_of_the_api_is_up_to_date() -> None:
    assert (DOCS / "api.md").read_text() == api_page(), "run `make api` and commit docs/api.md"
