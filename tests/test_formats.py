"""Indexes of this and of earlier formats, as tests/data/formats/make.py left them when each format was today's."""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from gradtrace import CorruptIndexError, StoreError, open_index
from gradtrace.store import manifest as schema
from gradtrace.store.manifest_file import read_manifest
from gradtrace_indexer import delete_rows, discard, prune, verify
from gradtrace_indexer.description import details
from gradtrace_indexer.task_loading import load_task

FORMATS = Path(__file__).parent / "data" / "formats"

# Of each format, the SHA-256 of its schema, as `schema_sha256` describes it.
SCHEMAS = {
    3: "ad3a938a34a57fe41af81c6c1868cbbc8a1371e9c1119846b12cb7f3ecf6171a",
    4: "cf53b2a933fe8364f3e24e16a0efe7f3edc56917d417f96e9461e415aba2efb3",
    5: "3f690367aaa4e47d9283fd11007dc23fe4e6437c663778306641d11c77b70d93",
}


def schema_sha256() -> str:
    """Of the names, types and defaults of all fields in a manifest, as they are written in the code."""
    tree = ast.parse(inspect.getsource(schema))
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
    fields = {
        each.name: [ast.unparse(field) for field in each.body if isinstance(field, ast.AnnAssign)] for each in classes
    }
    words = [
        ast.unparse(node) for node in tree.body if isinstance(node, ast.Assign) and "Literal[" in ast.unparse(node)
    ]
    return hashlib.sha256(json.dumps([fields, words]).encode()).hexdigest()


def test_the_format_s_number_rises_with_every_change_of_the_schema() -> None:
    assert schema_sha256() == SCHEMAS[schema.FORMAT_VERSION], (
        "the manifest's schema is another than that of its format: raise FORMAT_VERSION, enter the new SHA-256 here, "
        "write docs/format.md, and keep an index of the new format (tests/data/formats/make.py)"
    )


def test_there_is_an_index_of_each_format() -> None:
    assert {folder.name for folder in FORMATS.iterdir() if folder.is_dir()} >= {
        str(number) for number in range(1, schema.FORMAT_VERSION + 1)
    }


@pytest.mark.parametrize("name", ["3", "3-early", "4", "5"])
def test_formats_that_are_read_answer_as_they_did(name: str) -> None:
    task = load_task(f"{FORMATS}/make.py:TASK")
    assert verify(FORMATS / name / "index", all_generations=True, progress=False) == []
    index = open_index(FORMATS / name / "index", task)
    for method, expected in json.loads((FORMATS / name.partition("-")[0] / "answers.json").read_text()).items():
        scores = index.scores(task.train[:3], method=method)
        np.testing.assert_allclose(scores, np.array(expected), rtol=1e-3, atol=1e-5)


def test_an_update_of_an_earlier_format_is_of_this_one(tmp_path: Path) -> None:
    """A release that reads only the earlier one must not take what it cannot read for damage."""
    shutil.copytree(FORMATS / "3", tmp_path / "3")
    path = tmp_path / "3" / "index"
    assert read_manifest(path).format == 3
    delete_rows(path, [0])
    assert read_manifest(path).format == schema.FORMAT_VERSION
    assert json.loads((path / "generations" / "2.json").read_text())["format"] == 3  # it stays as it was
    assert verify(path, progress=False) == []


@pytest.mark.parametrize("number", range(1, schema.OLDEST_FORMAT))
def test_an_earlier_format_is_named_with_the_remedy(number: int) -> None:
    path = FORMATS / str(number) / "index"
    words = (
        rf"has format {number}, an older one, built by Gradtrace .*"
        r"reads formats 3 to 5: rebuild the index with this release"
    )
    for command in (read_manifest, prune, discard, lambda path: list(details(path))):
        with pytest.raises(StoreError, match=words):
            command(path)
    (problem,) = verify(path, progress=False)
    assert f"has format {number}, an older one" in problem


def sealed(manifest: Any) -> bytes:
    blank = json.dumps(manifest | {"checksum": ""}, indent=1).encode()
    digest = xxhash.xxh3_128_hexdigest(blank)
    return blank.replace(b'"checksum": ""', f'"checksum": "{digest}"'.encode())


def test_a_newer_format_is_named_whatever_else_it_has(tmp_path: Path) -> None:
    manifest = {"format": 99, "rows": "many", "libraries": {"gradtrace": "7.1"}}
    (tmp_path / "manifest.json").write_bytes(sealed(manifest))
    with pytest.raises(StoreError, match=r"format 99, a newer one, built by Gradtrace 7\.1.*the release that built it"):
        read_manifest(tmp_path)


def test_a_format_that_is_no_number_is_damage(tmp_path: Path) -> None:
    for number in (None, True, [3], 10**30, -1, "99"):
        (tmp_path / "manifest.json").write_bytes(sealed({"format": number}))
        with pytest.raises(StoreError) as caught:
            read_manifest(tmp_path)
        assert isinstance(caught.value, CorruptIndexError) or "format" in str(caught.value)
