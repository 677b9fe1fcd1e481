"""Manifests that were changed and sealed again: refused in words, and nothing outside of the directory is read, written
or removed, and no memory is taken for what they claim."""

from __future__ import annotations

import json
import resource
import shutil
import sys
from collections.abc import Iterator
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import examples
from damaged_index import COMMANDS, changed, outside, refused, seal
from gradtrace import CorruptIndexError, GradtraceError, StoreError
from gradtrace_indexer import verify


@pytest.fixture
def path(home: Path) -> Path:
    return home / "index"


FILE = {"path": "deleted/2.ids", "bytes": 16, "xxh3": "0" * 32}
CHECKPOINT: dict[str, Any] = {"name": "a", "file": "../a.pt", "step": 1, "learning_rate": 0.1, "sha256": "0" * 64}
NONSENSE: list[tuple[dict[str, Any], str]] = [
    ({"deleted": FILE | {"path": "../outside/secret"}}, "not a path below"),
    ({"deleted": FILE | {"path": "/etc/passwd"}}, "not a path below"),
    ({"deleted": FILE | {"path": "deleted//2.ids"}}, "not a path below"),
    ({"deleted": FILE | {"path": "deleted/\u0000"}}, "not a usable file name"),
    ({"deleted": FILE | {"path": "d" * 5000}}, "not a usable file name"),
    ({"deleted": FILE | {"bytes": -8}}, "size or the checksum"),
    ({"deleted": FILE | {"xxh3": "../../x"}}, "size or the checksum"),
    ({"deleted": FILE | {"bytes": 8 * 40}}, "deleted rows are not some of its rows"),
    ({"row_ids": FILE | {"path": "row_ids/2.ids"}}, "row ids are not those"),
    ({"levels": []}, "levels are not ascending"),
    ({"levels": [10**12]}, "its levels end at column"),
    ({"levels": [8, 8, 20]}, "levels are not ascending"),
    ({"levels": [7, 20]}, "even width"),
    ({"checkpoints": []}, "it has no checkpoint"),
    ({"checkpoints": [CHECKPOINT, CHECKPOINT | {"step": 2}]}, "two of its checkpoints are named 'a'"),
    ({"checkpoints": [CHECKPOINT | {"learning_rate": -0.1}]}, "learning rate is not a finite"),
    ({"checkpoints": [CHECKPOINT | {"learning_rate": float("inf")}]}, "learning rate is not a finite"),
    ({"checkpoints": [CHECKPOINT | {"name": "../../outside"}]}, "not a usable name"),
    ({"checkpoints": [CHECKPOINT | {"run": 3}]}, "training runs [3]"),
    ({"checkpoints": [CHECKPOINT, CHECKPOINT | {"name": "b", "step": 0}]}, "not in the order of training"),
    ({"checkpoints": [CHECKPOINT | {"kind": "average"}]}, "must be in the index"),
    ({"checkpoints": [CHECKPOINT | {"file": "/dev/zero"}]}, "not relative to the index"),
    ({"rows": -1}, "-1 stored rows"),
    ({"rows": 10**12}, "stored rows of"),
    ({"generation": 0}, "its generation is 0"),
    ({"shards": []}, "do not cover the rows"),
    ({"skipped": {"99": "bad"}}, "skips rows"),
    (
        {
            "kernels": {
                "output": "value",
                "damping": 1,
                "files": {"nobody": FILE | {"path": "kernels/nobody.2.safetensors"}},
            }
        },
        "kernels are of other checkpoints",
    ),
    ({"column_scales": []}, "0 files of column scales"),
    ({"complete": False}, "unfinished generation"),
    ({"colour": "red"}, "is damaged (colour"),
]


@pytest.mark.parametrize(("fields", "words"), NONSENSE, ids=[words for _, words in NONSENSE])
def test_a_resealed_manifest_with_nonsense_is_refused_in_words(
    home: Path, path: Path, fields: dict[str, Any], words: str
) -> None:
    before = outside(home)
    changed(path, **fields)
    refused(path, words)
    for command in COMMANDS.values():
        with pytest.raises(StoreError):
            command(path)
    assert outside(home) == before


def test_shards_of_other_sizes_than_their_rows_are_refused(path: Path) -> None:
    shards = json.loads((path / "manifest.json").read_bytes())["shards"]
    shards[0]["rows"]["bytes"] = 10**15
    changed(path, shards=shards)
    assert verify(path, progress=False)
    for name in ("open", "open without verifying", "delete", "compact", "append", "kernels"):
        with pytest.raises(CorruptIndexError, match="is damaged"):
            COMMANDS[name](path)


@pytest.mark.parametrize("content", [b"[" * 10**6, b'{"format":' * 10**5, b"\xff" * 1000, b"", b"3", b"{}"])
def test_a_manifest_that_is_no_manifest(path: Path, content: bytes) -> None:
    (path / "manifest.json").write_bytes(content)
    refused(path, "is damaged")


def test_a_manifest_without_end_is_not_read(path: Path) -> None:
    with (path / "manifest.json").open("r+b") as file:
        file.truncate(1 << 40)
    refused(path, "MB, which no manifest has")


def places_of(path: Path, kinds: tuple[type, ...]) -> list[tuple[Any, ...]]:
    """The places of the values of these types in a manifest, as keys from the outermost on."""

    def walk(value: Any, place: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
        if isinstance(value, kinds):
            yield place
        pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, inner in pairs:
            yield from walk(inner, (*place, key))

    return [place for place in walk(json.loads((path / "manifest.json").read_bytes()), ()) if place]


def value_at(home: Path, place: tuple[Any, ...]) -> Any:
    return reduce(lambda value, key: value[key], place, json.loads((home / "index" / "manifest.json").read_bytes()))


KINDS = ["delete", "number", "text", "value", "swap", "repeat", "rename", "another's", "another's"]
ODD_NUMBERS = [-1, 0, 1, 2, 7, 2**31, 10**12, 2**53, 2**63, 10**30, -0.5, 1e308, float("nan"), float("inf")]
ODD_TEXTS = ["", ".", "..", "../outside/secret", "{home}/outside/secret", "a" * 5000, "\u0000", "a/b", "manifest.json"]
ODD_VALUES = [None, True, [], {}, [[]], "3", 3, {"a": 1}]


def altered(manifest: Any, place: tuple[Any, ...], kind: str, value: Any) -> None:
    """Change a manifest at a place; where an earlier change took that place away, nothing."""
    for key in place[:-1]:
        try:
            manifest = manifest[key]
        except (KeyError, IndexError, TypeError):
            return
    key = place[-1]
    there = range(len(manifest)) if isinstance(manifest, list) else manifest if isinstance(manifest, dict) else ()
    if key not in there:
        return
    if kind == "delete":
        del manifest[key]
    elif kind == "swap" and isinstance(manifest, list):
        manifest[key], manifest[0] = manifest[0], manifest[key]
    elif kind == "repeat" and isinstance(manifest, list):
        manifest.insert(key, manifest[key])
    elif kind == "rename" and isinstance(manifest, dict):
        manifest[str(value)] = manifest.pop(key)
    else:
        manifest[key] = value


@pytest.fixture
def little_memory() -> Iterator[None]:
    """A gigabyte more than now: what a manifest claims, and no disk holds, cannot be allocated."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (1 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


_watched: list[str] = []
_opened: list[str] = []


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if _watched and event in ("open", "os.remove", "os.rename", "shutil.rmtree"):
        _opened.extend(str(each) for each in arguments[:2] if "outside" in str(each))


sys.addaudithook(_watch)


@settings(max_examples=examples(120), deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_whatever_a_manifest_says_the_answer_is_one_of_ours(
    undamaged: Path, tmp_path_factory: pytest.TempPathFactory, little_memory: None, data: st.DataObject
) -> None:
    """Nothing else than Gradtrace's errors, no memory for sizes that are not on the disk, nothing outside touched."""
    home = Path(shutil.copytree(undamaged, tmp_path_factory.mktemp("fuzz") / "home"))
    path = home / "index"
    texts = [text.format(home=home) for text in ODD_TEXTS]
    manifest = json.loads((path / "manifest.json").read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        kind = data.draw(st.sampled_from(KINDS))
        kinds = {"number": (int, float), "text": (str,)}.get(kind, (int, float, str, list, dict))
        places = places_of(undamaged / "index", kinds)
        place = data.draw(st.sampled_from(places))
        if kind in ("text", "rename", "swap", "repeat") and place[-1] == "file":
            continue  # weights may lie anywhere, to be read as such
        value = data.draw(st.sampled_from({"number": ODD_NUMBERS, "value": ODD_VALUES}.get(kind, texts)))
        if kind == "another's":  # of the same key: another file, number, list
            value = value_at(undamaged, data.draw(st.sampled_from([p for p in places if p[-1] == place[-1]])))
        altered(manifest, place, kind, value)
    seal(path / "manifest.json", manifest)
    before, said = outside(home), list[str]()
    _watched.append("all")
    try:
        said += verify(path, all_generations=True, progress=False)
        for name in data.draw(st.permutations(sorted(COMMANDS)))[:4]:
            try:
                COMMANDS[name](path)
            except GradtraceError as error:
                said.append(str(error))
    finally:
        _watched.clear()
        touched = list(_opened)
        _opened.clear()
        after = outside(home)
        shutil.rmtree(home)
    assert not touched
    assert after == before
    assert all(len(text) < 3000 for text in said)
