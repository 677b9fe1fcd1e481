"""Schemathesis against the service's OpenAPI schema, over real HTTP: every endpoint, every check.

`make fuzz` is the same for longer: FUZZ_SECONDS for each of the two tests.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from conftest import DigitsRun
from gradtrace_service.app import create_service
from gradtrace_service.http.api_keys import Scope, add_key
from gradtrace_service.indexes.hosted import Hosted
from gradtrace_service.server import serving
from gradtrace_service.settings import Settings

SECONDS = os.environ.get("FUZZ_SECONDS")
BOUND = ["--max-time", SECONDS] if SECONDS else ["--max-examples", "3", "--seed", "0"]

# What is too large for the schema may be too large to be read.
_CONFIGURATION = """
[checks]
negative_data_rejection.expected-statuses = ["400", "401", "403", "404", "405", "409", "413", "422", "429", "5xx"]
"""


@dataclass(frozen=True)
class Target:
    """A service with keys, all of whose addresses are open to this one."""

    url: str
    headers: dict[str, str]
    folder: Path

    def get(self, path: str) -> Any:
        return httpx.get(self.url + path, headers=self.headers).raise_for_status().json()

    def fuzz(self, schema: dict[str, Any], *options: str) -> None:
        file = self.folder / "openapi.json"
        file.write_text(json.dumps(schema))
        (self.folder / "schemathesis.toml").write_text(_CONFIGURATION)
        words = [str(Path(sys.executable).with_name("st")), "run", file.name, "--url", self.url, "--no-color"]
        key = [f"{name}: {value}" for name, value in self.headers.items()]
        words += ["--exclude-path", "/events"]  # an answer without an end
        words += ["--checks", "all", "--header", *key, *BOUND, *options]
        done = subprocess.run(words, cwd=self.folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def target(digits_index: DigitsRun, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    folder = tmp_path_factory.mktemp("fuzz")
    index = Path(shutil.copytree(digits_index.index, folder / "index"))  # for /reindex
    key = add_key(folder / "keys", "fuzzer", [Scope.query, Scope.admin])
    hosted = [Hosted("digits", index, digits_index.task, [digits_index.checkpoints])]
    with serving(create_service(hosted, Settings(processes=0, api_key_file=folder / "keys"))) as url:
        yield Target(url, {"Authorization": f"Bearer {key}"}, folder)


def test_whatever_is_sent_the_answer_is_as_documented(target: Target) -> None:
    """What the schema allows may still name what is not there, and is refused then: the next test is of the rest."""
    kinds = ["--phases", "coverage,fuzzing,stateful"] if SECONDS else ["--phases", "coverage", "--mode", "negative"]
    target.fuzz(target.get("/openapi.json"), "--exclude-checks", "positive_data_acceptance", *kinds)


def test_what_names_things_that_are_there_is_accepted(target: Target) -> None:
    schema = narrowed(target.get("/openapi.json"), target.get("/index"))
    target.fuzz(schema, "--mode", "positive", "--phases", "fuzzing")


def narrowed(schema: dict[str, Any], index: dict[str, Any]) -> dict[str, Any]:
    """The schema, of TracIn alone, about rows, checkpoints and columns that are there, with filters that leave rows."""
    names = _names(index)
    unused = {"damping", "segments", "similarity", "correct_only", "rows", "max", "in", "text", "expected"}
    of_rows = ("MarkRequest", "UnmarkRequest", "RemovalRequest")
    for request in of_rows:
        schema["components"]["schemas"][request]["properties"]["rows"] = names["train_rows"]
    del schema["components"]["schemas"]["RemovalRequest"]["properties"]["weights"]  # its default method takes none
    # Later requests would name rows that are gone; the task has no `fit` and no tokens, and its model does not write.
    for path in ("/rows/delete", "/retrain", "/influence/tokens", "/complete"):
        del schema["paths"][path]
    for request in (
        *(
            "InfluenceRequest",
            "GroupsRequest",
            "PairsRequest",
            "ReindexRequest",
            "UndoRequest",
            "ScoresQuestion",
            *of_rows,
        ),
        *("RowFilter", "Condition", "LabelTarget"),
    ):
        properties = schema["components"]["schemas"][request]["properties"]
        for name in unused & set(properties) - ({"rows"} if request in of_rows else set()):
            del properties[name]
        properties.update({name: names[name] for name in set(names) & set(properties)})
    contrast = {"label": {"enum": [0, 1, 2]}, "rather_than": {"enum": [3, "nine", None]}}
    schema["components"]["schemas"]["LabelTarget"]["properties"].update(contrast)
    lists = ("/examples/{split}", "/columns/{split}", "/overview")
    for path in ("/index", "/self-influence", "/examples/{split}/{row}", "/marks", "/marks/export", *lists):
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
    label = {"enum": [*range(10), *index["class_names"]]}
    pixels = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 255}, "minItems": 8, "maxItems": 8}
    example = {
        "type": "object",
        "properties": {"image": pixels | {"items": pixels}, "label": label},
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
        "k": {"type": "integer", "minimum": 1, "maximum": 200},  # so that all of few queries may be rescored
        "example": example,
        "examples": few | {"items": example},
        "train_examples": few | {"items": example},
        "query_rows": few | {"items": query_row},
        "train_rows": few | {"items": train_row},
        "exclude_rows": few | {"items": train_row},
        "label": label,
        "rather_than": label,
        "labels": few | {"items": {"type": "integer", "minimum": 0, "maximum": 9}},
        "predictions": few | {"items": label},
        "names": few | {"items": {"enum": ["label", "prediction", "loss", "correct"]}},
        "where": {
            "type": "object",
            "propertyNames": {"const": "loss"},
            "additionalProperties": {"$ref": "#/components/schemas/Condition"},
            "minProperties": 1,
        },
        "min": {"type": "number", "maximum": 0},
    }
