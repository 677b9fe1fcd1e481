"""The state file by itself: marks beside a plain dictionary, data sets, migrations, files that fail."""

from __future__ import annotations

import asyncio
import os
import shutil
import sqlite3
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from conftest import examples
from gradtrace.store.manifest_file import read_manifest
from gradtrace.store.row_ids import read_row_ids
from gradtrace_client.state_schemas import (
    MarkRequest,
    MarksRequest,
    SavedQuestionsRequest,
    SaveQuestionRequest,
    UndoRequest,
    UnmarkRequest,
)
from gradtrace_indexer import append_rows, delete_rows
from gradtrace_service.errors import (
    FieldError,
    MarksConflictError,
    NoSuchChangeError,
    StateBusyError,
    StateError,
    StateUnavailableError,
)
from gradtrace_service.state import database as database_module
from gradtrace_service.state import marks, migrations, questions
from gradtrace_service.state.data_sets import TrainingRows
from gradtrace_service.state.database import Database

pytestmark = pytest.mark.unit

T = TypeVar("T")

ROWS = TrainingRows("index", 1, np.ones(40, dtype=bool), {"0": "a", "39": "b"}, ["c"])


class Kept:
    """The state of one file, with calls that wait. Each call is by a new event loop."""

    def __init__(self, path: Path, rows: TrainingRows = ROWS) -> None:
        self.database, self.rows, self.closed = Database(path), rows, False

    def write(self, change: Callable[..., T], *arguments: Any) -> T:
        return asyncio.run(self.database.write(lambda connection: change(connection, *arguments)))

    def read(self, query: Callable[..., T], *arguments: Any) -> T:
        return asyncio.run(self.database.read(lambda connection: query(connection, *arguments)))

    def mark(self, rows: list[int], kind: str = "wrong", who: str | None = "ann", **fields: Any) -> int | None:
        request = MarkRequest.model_validate({"rows": rows, "mark": kind, **fields})
        return self.write(marks.mark, self.rows, request, who).change

    def unmark(self, rows: list[int], **fields: Any) -> int | None:
        return self.write(marks.unmark, self.rows, UnmarkRequest(rows=rows, **fields), None).change

    def undo(self, change: int) -> int | None:
        return self.write(marks.undo, self.rows, UndoRequest(change=change), "ann").change

    def there(self, **fields: Any) -> dict[int, tuple[str, str | None]]:
        page = self.read(marks.page, self.rows, MarksRequest(k=1000, **fields))
        return {mark.row: (mark.mark, mark.note) for mark in page.results}

    def close(self) -> None:
        """Also a second time."""
        if not self.closed:
            asyncio.run(self.database.close())
        self.closed = True


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Kept]:
    with closing(Kept(tmp_path / "state.sqlite")) as opened:
        yield opened


_rows = st.lists(st.integers(0, 5), min_size=1, max_size=4)
_steps = st.lists(
    st.one_of(
        st.tuples(st.just("mark"), _rows, st.sampled_from(["wrong", "right", "unsure", "remove"])),
        st.tuples(st.just("unmark"), _rows),
        st.tuples(st.just("undo"), st.integers(1, 12)),
    ),
    max_size=12,
)


@settings(max_examples=examples(20))
@given(steps=_steps)
def test_marks_are_as_in_a_dictionary_whose_changes_are_undone(
    steps: list[Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The reference keeps whole dictionaries: of a change, what its rows had before and after."""
    with closing(Kept(tmp_path_factory.mktemp("steps") / "state.sqlite")) as kept:
        now: dict[int, int] = {}  # by row, the step that marked it
        changes: dict[int, dict[int, tuple[int | None, int | None]]] = {}
        for number, (verb, *arguments) in enumerate(steps):
            if verb == "undo":
                change, known = None, changes.get(arguments[0])
                after = {row: new for row, (_, new) in (known or {}).items()}
                if known is None:
                    with pytest.raises(NoSuchChangeError):
                        kept.undo(arguments[0])
                    continue
                if any(now.get(row) != new for row, new in after.items()):
                    with pytest.raises(MarksConflictError):
                        kept.undo(arguments[0])
                    continue
                change, wanted = kept.undo(arguments[0]), {row: old for row, (old, _) in known.items()}
            elif verb == "mark":
                change = kept.mark(arguments[0], arguments[1], note=str(number))
                wanted = dict.fromkeys(arguments[0], number)
            else:
                change, wanted = kept.unmark(arguments[0]), dict.fromkeys(set(arguments[0]) & now.keys())
                assert (change is None) == (not wanted)
            if change is not None:
                changes[change] = {row: (now.get(row), step) for row, step in wanted.items()}
            now = {row: step for row, step in (now | wanted).items() if step is not None}
            assert kept.there() == {row: (steps[step][2], str(step)) for row, step in now.items()}


def test_a_mark_that_others_changed_is_not_overwritten(kept: Kept) -> None:
    first = kept.mark([3], note="first")
    kept.mark([3, 4], "right", note="other", who="bob")
    for expected in ({"3": first}, {"3": 0}, {"4": 0, "5": 0}):
        with pytest.raises(MarksConflictError) as refused:
            kept.mark([3, 4, 5], "remove", expected=expected)
        assert {(entry.mark.note, entry.mark.who) for entry in refused.value.conflicts if entry.mark} == {
            ("other", "bob")
        }
        with pytest.raises(MarksConflictError):
            kept.unmark([3, 4, 5], expected=expected)
    assert kept.there() == {3: ("right", "other"), 4: ("right", "other")}
    with pytest.raises(MarksConflictError) as gone:
        kept.mark([5], expected={"5": 1})
    assert [(entry.row, entry.mark) for entry in gone.value.conflicts] == [(5, None)]
    kept.mark([3, 5], "remove", expected={"3": 2, "5": 0})
    assert kept.there()[3] == ("remove", None)


def test_pages_counts_and_chosen_rows(kept: Kept) -> None:
    kept.mark(list(range(0, 40, 2)), "wrong")
    kept.mark([1, 3, 4], "remove", note="x")
    page = kept.read(marks.page, ROWS, MarksRequest(offset=2, k=3))
    assert [mark.row for mark in page.results] == [2, 3, 4]
    assert (page.rows_total, page.counts) == (22, {"wrong": 19, "right": 0, "unsure": 0, "remove": 3})
    page = kept.read(marks.page, ROWS, MarksRequest(mark="remove", rows=[4, 0, 3, 17]))
    assert [(mark.row, mark.note) for mark in page.results] == [(3, "x"), (4, "x")]
    assert page.rows_total == 2


def test_rows_that_are_not_there_are_refused_and_nothing_is_kept(kept: Kept) -> None:
    present = np.arange(40) != 7
    kept.rows = TrainingRows("index", 1, present, ROWS.probes, ROWS.bases)
    for rows, words in (([1, 40], r"rows\[1\]: there is no row 40"), ([7], "row 7 of the training data is not in")):
        with pytest.raises(FieldError, match=words):
            kept.mark(rows)
    assert not kept.there()


def test_old_changes_are_forgotten_but_no_mark(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(marks, "_KEPT_CHANGES", 10)
    kept.mark([0], note="kept")
    for number in range(59):
        kept.mark([1 + number % 3], note=str(number))
    assert kept.there() == {0: ("wrong", "kept"), **{1 + number % 3: ("wrong", str(number)) for number in (56, 57, 58)}}
    with pytest.raises(NoSuchChangeError):
        kept.undo(30)
    for change in range(60, 50, -1):
        kept.undo(change)
    assert kept.there()[0] == ("wrong", "kept")
    with closing(sqlite3.connect(kept.database.path)) as reader:
        assert reader.execute("SELECT count(*) FROM changes").fetchone()[0] < 40
        assert reader.execute("PRAGMA foreign_key_check").fetchall() == []


def rows_of(path: Path, name: str = "index") -> TrainingRows:
    manifest = read_manifest(path)
    return TrainingRows.of(name, manifest, read_row_ids(path, manifest).present)


def test_marks_stay_with_their_data_set(kept: Kept, tmp_path: Path) -> None:
    """Through deletions and appended rows, and a new build of the same data; of others, nothing is shown."""
    data = tiny.classes(40)
    task = tiny.ClassTask(tiny.mlp, data)
    tiny.build(task, tmp_path / "a", basis="spectral", dimensions=8)
    index = tmp_path / "a" / "index"
    kept.rows = rows_of(index)
    kept.mark([0, 5], note="mine")
    mine = {0: ("wrong", "mine"), 5: ("wrong", "mine")}
    delete_rows(index, [0, 1])  # the first rows: those by which most data sets are known
    append_rows(index, tiny.ClassTask(tiny.mlp, [*data, *tiny.classes(9, seed=4)]), progress=False)
    kept.rows = rows_of(index)
    assert kept.there() == mine
    kept.mark([48], "right")
    tiny.build(task, tmp_path / "again")
    kept.rows = rows_of(tmp_path / "again" / "index")
    assert set(kept.there()) == {0, 5, 48}
    tiny.build(tiny.ClassTask(tiny.mlp, tiny.classes(40, seed=7)), tmp_path / "b")
    kept.rows = rows_of(tmp_path / "b" / "index")
    assert kept.there() == {}
    kept.mark([5], "remove", note="others'")
    kept.rows = rows_of(index, "another name")
    assert kept.there() == {}
    kept.rows = rows_of(index)
    assert kept.there()[5] == ("wrong", "mine")


def test_the_changes_of_another_data_set_are_not_undone(kept: Kept) -> None:
    change = kept.mark([1])
    assert change is not None
    kept.rows = TrainingRows("other", 1, ROWS.present, ROWS.probes, ROWS.bases)
    with pytest.raises(NoSuchChangeError):
        kept.undo(change)


def test_saved_questions(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(3):
        kept.write(questions.save, SaveQuestionRequest(title=f"Why {number}?", address=f"#row={number}"), "ann")
    page = kept.read(questions.page, SavedQuestionsRequest(offset=1, k=1))
    assert [(one.title, one.address, one.who) for one in page.results] == [("Why 1?", "#row=1", "ann")]
    kept.write(questions.delete, page.results[0].id)
    with pytest.raises(FieldError, match="there is no saved question"):
        kept.write(questions.delete, page.results[0].id)
    monkeypatch.setattr(questions, "_MOST", 2)
    with pytest.raises(FieldError, match="delete some"):
        kept.write(questions.save, SaveQuestionRequest(title="x", address="?"), None)


def test_a_file_of_the_first_release_is_brought_up_to_date(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as earlier:
        earlier.setattr(migrations, "MIGRATIONS", migrations.MIGRATIONS[:1])
        kept.mark([3], note="old")
        kept.close()
    with ThreadPoolExecutor(4) as pool:  # several services at a time
        states = list(pool.map(lambda _: Kept(kept.database.path), range(4)))
        seen = list(pool.map(lambda state: state.there(), states))
        list(
            pool.map(
                lambda state: state.write(questions.save, SaveQuestionRequest(title="t", address="#"), None), states
            )
        )
    assert seen == [{3: ("wrong", "old")}] * 4
    assert states[0].read(questions.page, SavedQuestionsRequest()).total == 4
    for state in states:
        state.close()


def test_files_of_others_and_of_later_releases_are_left_alone(tmp_path: Path) -> None:
    for name, statements in {
        "a later release": ("PRAGMA application_id = 0x47726164", "PRAGMA user_version = 99", "CREATE TABLE x (y)"),
        "another program": ("CREATE TABLE x (y)",),
    }.items():
        path = tmp_path / name
        with closing(sqlite3.connect(path)) as other:
            for statement in statements:
                other.execute(statement)
        before = path.read_bytes()
        with closing(Kept(path)) as kept:
            for call in (kept.there, lambda kept=kept: kept.mark([1])):
                with pytest.raises(StateUnavailableError, match=name):
                    call()
        with closing(sqlite3.connect(path)) as other:
            assert other.execute("SELECT name FROM sqlite_schema").fetchall() == [("x",)]
        assert path.read_bytes() == before


def test_reading_makes_no_file_and_what_is_made_is_for_its_owner_alone(kept: Kept) -> None:
    assert kept.there() == {}
    assert not kept.database.path.exists()
    kept.mark([1])
    assert stat.S_IMODE(kept.database.path.stat().st_mode) == 0o600


@pytest.mark.parametrize("damage", ["garbage", "truncated", "overwritten", "empty folder", "pipe", "dangling link"])
def test_a_damaged_file_is_refused_and_taken_again_once_restored(kept: Kept, damage: str, tmp_path: Path) -> None:
    path = kept.database.path
    kept.mark(list(range(40)), note="x" * 900)
    for number in range(60):
        kept.mark([number % 40], note=str(number) * 400)
    before = kept.there()
    kept.close()
    copy = shutil.copy(path, tmp_path / "copy")
    content = path.read_bytes()
    path.unlink()
    {
        "garbage": lambda: path.write_bytes(os.urandom(5000)),
        "truncated": lambda: path.write_bytes(content[: len(content) // 2]),
        "overwritten": lambda: path.write_bytes(content[:4096] + b"\xff" * (len(content) - 4096)),
        "empty folder": path.mkdir,
        "pipe": lambda: os.mkfifo(path),
        "dangling link": lambda: path.symlink_to("nowhere"),
    }[damage]()
    with closing(Kept(path)) as again:
        for call in (again.there, lambda: again.mark([1]), again.there):
            with pytest.raises(StateError, match=r"restore it|regular file"):
                call()
        path.rmdir() if path.is_dir() else path.unlink()
        shutil.copy(copy, path)
        assert again.there() == before


def test_values_that_were_never_kept_are_refused(kept: Kept) -> None:
    kept.mark([1])
    with closing(sqlite3.connect(kept.database.path)) as other:
        other.execute("UPDATE changes SET mark = 'wrnog'")
        other.commit()
    with pytest.raises(StateUnavailableError, match="restore it"):
        kept.there()
    with closing(sqlite3.connect(kept.database.path)) as other:
        other.execute("UPDATE changes SET mark = 'wrong'")
        other.execute("UPDATE data_sets SET identity = '{'")
        other.commit()
    with pytest.raises(StateUnavailableError, match="restore it"):
        kept.mark([1])


def test_nothing_is_kept_in_a_file_that_was_removed_meanwhile(kept: Kept) -> None:
    kept.mark([1])
    moved = kept.database.path.rename(kept.database.path.with_name("moved"))
    for call in (kept.there, lambda: kept.mark([2])):
        with pytest.raises(StateUnavailableError, match="removed or replaced"):
            call()
    moved.rename(kept.database.path)
    kept.mark([3])
    assert set(kept.there()) == {1, 3}


def test_who_waits_too_long_for_another_writer_is_told(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    kept.mark([1])
    kept.close()
    monkeypatch.setattr(database_module, "_WAIT_SECONDS", 0.1)
    with closing(Kept(kept.database.path)) as second, closing(sqlite3.connect(kept.database.path)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StateBusyError):
            second.mark([2])
        assert set(second.there()) == {1}  # readers wait for nobody
        other.rollback()
        second.mark([2])
        assert set(second.there()) == {1, 2}
