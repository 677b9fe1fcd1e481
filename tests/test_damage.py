"""Damaged and hostile indexes: refused in words, and nothing outside of the directory is read, written or removed."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tiny
from gradtrace import Checkpoint, CorruptIndexError, GradtraceError, Index, StoreError, open_index
from gradtrace.store.manifest import read_manifest
from gradtrace_indexer import (
    add_checkpoints,
    add_kernels,
    append_rows,
    compact,
    delete_rows,
    discard,
    fit_representer,
    prune,
    roll_back,
    set_searcher,
    verify,
)
from gradtrace_indexer.description import details
from tiny import ClassTask

ROWS, QUERIES = tiny.classes(40), tiny.classes(2, seed=5)
TASK = ClassTask(tiny.mlp, ROWS)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with checkpoints/ and index/, which has averages, kernels, a refitted layer, a searcher and earlier
    generations; and outside/, the files of others."""
    home = tmp_path_factory.mktemp("whole")
    tiny.build(TASK, home, 4, basis="spectral", precision="int4", dimensions=20, average_segments=2)
    delete_rows(home / "index", [3, 17])
    add_kernels(home / "index", progress=False)
    fit_representer(home / "index")
    set_searcher(home / "index", TASK, "faiss:Flat", progress=False)
    (home / "outside").mkdir()
    (home / "outside" / "secret").write_bytes(b"of others")
    return home


@pytest.fixture
def home(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "home"))


@pytest.fixture
def path(home: Path) -> Path:
    return home / "index"


def opened(path: Path, **options: Any) -> Index:
    return open_index(path, TASK, **options)


def fifth(path: Path) -> list[Checkpoint]:
    """A checkpoint after those of the index."""
    return tiny.checkpoints(TASK, path.parent / "more", 5)[4:]


COMMANDS: dict[str, Callable[[Path], object]] = {
    "open": lambda path: opened(path).influence(QUERIES, k=3),
    "open without verifying": lambda path: opened(path, verify=False).scores(QUERIES),
    "info": lambda path: list(details(path)),
    "delete": lambda path: delete_rows(path, [5]),
    "compact": lambda path: compact(path, progress=False),
    "append": lambda path: append_rows(path, ClassTask(tiny.mlp, [*ROWS, *tiny.classes(3, seed=9)]), progress=False),
    "add": lambda path: add_checkpoints(
        path, TASK, tiny.checkpoints(TASK, path.parent / "more", 5)[4:], progress=False
    ),
    "kernels": lambda path: add_kernels(path, damping=0.5, progress=False),
    "representer": lambda path: fit_representer(path, l2=0.01),
    "searcher": lambda path: set_searcher(path, TASK, "progressive", progress=False),
    "roll back": lambda path: roll_back(path, 2),
    "discard": discard,
    "prune": prune,
}


def seal(path: Path, manifest: Any) -> None:
    """Write it with a checksum that fits."""
    blank = json.dumps(manifest | {"checksum": ""}, indent=1).encode()
    digest = xxhash.xxh3_128_hexdigest(blank)
    path.write_bytes(blank.replace(b'"checksum": ""', f'"checksum": "{digest}"'.encode()))


def changed(path: Path, **fields: Any) -> None:
    """Change fields of the manifest, and seal it."""
    seal(path / "manifest.json", json.loads((path / "manifest.json").read_bytes()) | fields)


def outside(home: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(home)): file.read_bytes()
        for folder in ("outside", "checkpoints")
        for file in (home / folder).rglob("*")
        if file.is_file()
    }


def refused(path: Path, words: str) -> None:
    """`verify` says it, and every command but those that look after manifests alone."""
    assert any(words in problem for problem in verify(path, progress=False)), verify(path, progress=False)
    for name in ("open", "open without verifying"):
        with pytest.raises(CorruptIndexError) as caught:
            COMMANDS[name](path)
        assert words in str(caught.value)


def test_the_base_of_these_tests_is_whole(path: Path) -> None:
    assert verify(path, all_generations=True, progress=False) == []
    for name in ("open", "open without verifying", "info", "roll back", "append"):
        COMMANDS[name](path)


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


def numbers_of(path: Path, kinds: tuple[type, ...]) -> list[tuple[Any, ...]]:
    """The places of the values of these types in a manifest, as keys from the outermost on."""

    def walk(value: Any, place: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
        if isinstance(value, kinds):
            yield place
        pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, inner in pairs:
            yield from walk(inner, (*place, key))

    return [place for place in walk(json.loads((path / "manifest.json").read_bytes()), ()) if place]


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
    if not isinstance(manifest, dict | list) or (
        key not in manifest if isinstance(manifest, dict) else key >= len(manifest)
    ):
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


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_whatever_a_manifest_says_the_answer_is_one_of_ours(
    whole: Path, tmp_path_factory: pytest.TempPathFactory, little_memory: None, data: st.DataObject
) -> None:
    """Nothing else than Gradtrace's errors, no memory for sizes that are not on the disk, nothing outside touched."""
    home = Path(shutil.copytree(whole, tmp_path_factory.mktemp("fuzz") / "home"))
    path = home / "index"
    texts = [text.format(home=home) for text in ODD_TEXTS]
    manifest = json.loads((path / "manifest.json").read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        kind = data.draw(st.sampled_from(["delete", "number", "text", "value", "swap", "repeat", "rename"]))
        kinds = {"number": (int, float), "text": (str,)}.get(kind, (int, float, str, list, dict))
        place = data.draw(st.sampled_from(numbers_of(whole / "index", kinds)))
        if kind in ("text", "rename") and place[-1] == "file":
            continue  # weights may lie anywhere, to be read as such
        value = data.draw(st.sampled_from({"number": ODD_NUMBERS, "value": ODD_VALUES}.get(kind, texts)))
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


def linked(path: Path, name: str) -> Path:
    """Move a file or folder of an index out of it, and leave a link."""
    target = path.parent / "outside" / "moved"
    shutil.move(path / name, target)
    (path / name).symlink_to(target)
    return target


@pytest.mark.parametrize("name", ["rows", "rows/4.pt", "manifest.json", "curvature/4.pt.1.safetensors", "averages"])
def test_links_inside_an_index_are_not_followed(home: Path, path: Path, name: str) -> None:
    linked(path, name)
    before = outside(home)
    refused(path, "is a symbolic link, which is not followed inside of an index")
    for command in COMMANDS.values():
        with contextlib.suppress(GradtraceError):
            command(path)
    assert {name: content for name, content in outside(home).items() if name in before} == before


def test_the_index_itself_may_be_reached_by_a_link(home: Path, path: Path) -> None:
    (home / "link").symlink_to(path)
    assert verify(home / "link", progress=False) == []
    opened(home / "link").influence(QUERIES)


@pytest.mark.parametrize(
    "name", ["rows/4.pt/000000000.1.rows", "bases/0.1.safetensors", "manifest.json", "deleted/2.ids"]
)
def test_what_is_not_a_file_is_not_read(path: Path, name: str) -> None:
    """Reading a FIFO would never end."""
    (path / name).unlink()
    os.mkfifo(path / name)
    refused(path, f"{name} is not a regular file")


@pytest.mark.parametrize("target", ["fifo", "/dev/zero"])
def test_weights_that_are_not_files_are_not_read(home: Path, path: Path, target: str) -> None:
    weights = home / "checkpoints" / "4.pt"
    weights.unlink()
    os.mkfifo(weights) if target == "fifo" else weights.symlink_to(target)
    assert [problem for problem in verify(path, progress=False) if "is not a file" in problem]
    with pytest.raises(GradtraceError, match="is not a file"):
        opened(path)


def test_temporary_names_that_are_links_are_not_written_through(home: Path, path: Path) -> None:
    before = outside(home)
    secret = home / "outside" / "secret"
    for name in ("manifest.json.tmp", "deleted/6.ids.tmp", "generations/5.json.tmp", "pending.json.tmp"):
        (path / name).symlink_to(secret)
    assert delete_rows(path, [5]).generation == 6
    assert outside(home) == before
    assert verify(path, all_generations=True, progress=False) == []


STRAYS = [
    *("generations/1 (copy).json", "generations/01.json", "generations/99.json", "generations/notes", "rows.txt"),
    *("rows/README.txt", "searchers/backup/a.1", "bases/old.safetensors", "jobs/a.json"),
]


def strays(path: Path) -> None:
    for name in STRAYS:
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text("{}")
    (path / "generations" / "7.json").mkdir()
    os.mkfifo(path / "generations" / "8.json")
    (path / "generations" / "0.json").symlink_to(path / "manifest.json")


@pytest.mark.parametrize("name", COMMANDS)
def test_strays_are_passed_over(path: Path, name: str) -> None:
    strays(path)
    COMMANDS[name](path)
    assert verify(path, all_generations=True, progress=False) == []
    assert all((path / stray).exists() for stray in STRAYS)


@pytest.mark.parametrize("command", [prune, discard])
def test_only_files_of_the_format_are_removed_and_nothing_behind_a_link(
    home: Path, path: Path, command: Callable[[Path], object]
) -> None:
    others = home / "outside" / "rows" / "4.pt"
    others.mkdir(parents=True)
    (others / "000000000.9.rows").write_text("of another index")
    (path / "rows" / "linked").symlink_to(others)
    (path / "rows" / "9.pt").mkdir()
    (path / "rows" / "9.pt" / "000000000.9.rows").symlink_to(others / "000000000.9.rows")
    (path / "rows" / "9.pt" / "000000001.9.rows").write_text("left of a killed process")
    (path / "representer").rename(home / "outside" / "representer")
    (path / "representer").symlink_to(home / "outside" / "representer")
    strays(path)
    before = outside(home)
    command(path)
    assert outside(home) == before
    assert all((path / stray).exists() for stray in STRAYS)
    assert not (path / "rows" / "9.pt" / "000000001.9.rows").exists()


def test_a_damaged_earlier_generation_stops_nothing(path: Path) -> None:
    compact(path, progress=False)
    third = path / "generations" / "3.json"
    third.write_bytes(third.read_bytes()[:-9])
    assert [problem[:13] for problem in verify(path, progress=False)] == ["generation 3:"]
    assert any("generation 3 cannot be read" in line for line in details(path))
    with pytest.raises(CorruptIndexError, match=r"generation 3 of .* is damaged"):
        roll_back(path, 3)
    opened(path)
    (path / "rows" / "1.pt").mkdir()
    (path / "rows" / "1.pt" / "000000000.9.rows").write_text("left of a killed process")
    files = set(tiny.files(path))
    discard(path)  # what generation 3 may name stays
    assert files - set(tiny.files(path)) == {"rows/1.pt/000000000.9.rows"}
    delete_rows(path, [5])
    prune(path)
    assert verify(path, all_generations=True, progress=False) == []
    assert set(tiny.files(path)) < files | {"deleted/7.ids"}


def test_a_damaged_unfinished_generation_is_told_and_given_up(path: Path) -> None:
    (path / "pending.json").write_text("{}")
    opened(path)
    assert any("gradtrace discard" in problem for problem in verify(path, progress=False))
    for name in ("prune", "delete", "compact"):
        with pytest.raises(CorruptIndexError, match="gradtrace discard"):
            COMMANDS[name](path)
    discard(path)
    assert verify(path, progress=False) == []


def test_verify_reports_every_problem(home: Path, path: Path) -> None:
    manifest = read_manifest(path)
    rows, basis = path / manifest.shards[0].rows.path, path / manifest.basis.files[0].path
    rows.write_bytes(bytes([rows.read_bytes()[0] ^ 1]) + rows.read_bytes()[1:])
    basis.write_bytes(b"short")
    (path / manifest.curvature[0].path).unlink()
    average = path / manifest.checkpoints[0].file
    average.write_bytes(average.read_bytes()[:-1] + b"\x07")
    torch.save({}, home / "checkpoints" / "4.pt")
    (path / "generations" / "1.json").write_text("{}")
    problems = verify(path, progress=False)
    for words in ("rows/", "bases/0.1.safetensors has 5 bytes", "is missing", "averages/", "4.pt", "generation 1:"):
        assert any(words in problem for problem in problems), words
    assert len(problems) >= 6


def test_moved_weights_are_verified_where_they_are(home: Path, path: Path) -> None:
    (home / "checkpoints").rename(home / "weights")
    assert any("4.pt" in problem for problem in verify(path, progress=False))
    assert verify(path, checkpoints=home / "weights", progress=False) == []


def test_what_is_not_verified_is_said(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert opened(path).verified
    assert "not verified" not in repr(opened(path))
    index = opened(path, verify=False)
    assert not index.verified
    assert "not verified" in repr(index)
    assert "without comparing the checksums" in caplog.text


def test_without_verifying_damaged_rows_are_read_and_nothing_else(path: Path) -> None:
    """Any bytes of rows can be read; of all other files, which other libraries read, the checksums are compared."""
    manifest = read_manifest(path)
    of_rows = {file for shard in manifest.shards for file in (shard.rows, shard.representations) if file}
    for entry in manifest.files():
        intact = (path / entry.path).read_bytes()
        (path / entry.path).write_bytes(bytes(byte ^ 0xFF for byte in intact))
        if entry in of_rows:
            index = opened(path, verify=False, searcher="progressive")
            for method in index.methods:
                with contextlib.suppress(GradtraceError):
                    index.scores(QUERIES, method=method)
                    index.influence(QUERIES, k=5, method=method)
        else:
            with pytest.raises(CorruptIndexError, match="does not match its checksum"):
                opened(path, verify=False)
        (path / entry.path).write_bytes(intact)


@pytest.mark.parametrize("size", [0, 100, -64])
def test_files_truncated_under_an_open_index(path: Path, size: int) -> None:
    """Reading what was mapped would end the process."""
    index = opened(path, searcher="progressive")
    index.influence(QUERIES)
    for shard in read_manifest(path).shards:
        with (path / shard.rows.path).open("r+b") as file:
            file.truncate(max(0, size if size >= 0 else shard.rows.bytes + size))
    for ask in (index.influence, index.scores):
        with pytest.raises(CorruptIndexError, match="was truncated or replaced"):
            ask(QUERIES)
    for entry in read_manifest(path).files():
        with (path / entry.path).open("r+b") as file:
            file.truncate(0)
    assert index.columns["label"].shape == (40,)
    assert index.label(QUERIES[0]) == QUERIES[0][1]
    with pytest.raises(CorruptIndexError, match="was truncated or replaced"):
        index.influence(QUERIES)
