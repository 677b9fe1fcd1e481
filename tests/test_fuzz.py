"""Schemathesis against the service's OpenAPI schema, over real HTTP: every endpoint, every check.

`make fuzz` is the same for longer: FUZZ_SECONDS for each of the two tests.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from conftest import DigitsRun
from gradtrace_service.app import create_service
from gradtrace_service.catalog import Hosted
from gradtrace_service.server import serving
from gradtrace_service.settings import Settings

SECONDS = os.environ.get("FUZZ_SECONDS")
BOUND = ["--max-time", SECONDS] if SECONDS else ["--max-examples", "5", "--seed", "0"]


@pytest.fixture(scope="module")
def url(digits_index: DigitsRun) -> Iterator[str]:
    hosted = [Hosted("digits", digits_index.index, digits_index.task)]
    with serving(create_service(hosted, Settings())) as address:
        yield address


def fuzz(schema: str, url: str, *options: str) -> None:
    words = [str(Path(sys.executable).with_name("st")), "run", schema, "--url", url, "--checks", "all", "--no-color"]
    done = subprocess.run([*words, *BOUND, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_whatever_is_sent_the_answer_is_as_documented(url: str) -> None:
    """What the schema allows may still name what is not there, and then it is refused: the next test is of the rest."""
    phases = "coverage,fuzzing,stateful" if SECONDS else "coverage,fuzzing"
    fuzz(f"{url}/openapi.json", url, "--exclude-checks", "positive_data_acceptance", "--phases", phases)


def test_what_names_things_that_are_there_is_accepted(url: str, tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps(narrowed(httpx.get(f"{url}/openapi.json").json(), httpx.get(f"{url}/index").json())))
    fuzz(str(schema), url, "--mode", "positive", "--phases", "coverage,fuzzing")


def narrowed(schema: dict[str, Any], index: dict[str, Any]) -> dict[str, Any]:
    """The schema, of TracIn alone, about rows, checkpoints and columns that are there, with filters that leave rows."""
    names = _names(index)
    unused = {"damping", "segments", "similarity", "correct_only", "rows", "max", "in"}
    for request in ("InfluenceRequest", "GroupsRequest", "PairsRequest", "ReindexRequest", "RowFilter", "Condition"):
        properties = schema["components"]["schemas"][request]["properties"]
        for name in unused & set(properties):
            del properties[name]
        properties.update({name: names[name] for name in set(names) & set(properties)})
    for path in ("/index", "/self-influence", "/examples/{split}/{row}"):
        operation = schema["paths"][path]["get"]
        operation["parameters"] = [one for one in operation["parameters"] if one["name"] not in unused]
        for parameter in operation["parameters"]:
            if parameter["name"] != "examples":  # whether to show them, here
                parameter["schema"] = names.get(parameter["name"], parameter["schema"])
    return schema


def _names(index: dict[str, Any]) -> dict[str, Any]:
    """By field: what it may hold."""
    row = {"type": "integer", "minimum": 0}
    train_row, query_row = row | {"maximum": index["rows"] - 1}, row | {"maximum": index["query_rows"] - 1}
    pixels = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 255}, "minItems": 8, "maxItems": 8}
    example = {
        "type": "object",
        "properties": {"image": pixels | {"items": pixels}, "label": {"enum": [*range(10), *index["class_names"]]}},
        "required": ["image", "label"],
        "additionalProperties": False,
    }
    few = {"type": "array", "minItems": 1, "maxItems": 5}
    return {
        "index": {"const": "digits"},
        "method": {"const": "tracin"},
        "checkpoints": few | {"items": {"enum": [one["name"] for one in index["checkpoints"]]}, "uniqueItems": True},
        "by": {"enum": ["label", "prediction", "loss", "correct", "norm"]},
        "row": query_row,
        "example": example,
        "examples": few | {"items": example},
        "train_examples": few | {"items": example},
        "query_rows": few | {"items": query_row},
        "train_rows": few | {"items": train_row},
        "exclude_rows": few | {"items": train_row},
        "labels": few | {"items": {"type": "integer", "minimum": 0, "maximum": 9}},
        "where": {
            "type": "object",
            "propertyNames": {"const": "loss"},
            "additionalProperties": {"$ref": "#/components/schemas/Condition"},
            "minProperties": 1,
        },
        "min": {"type": "number", "maximum": 0},
    }
