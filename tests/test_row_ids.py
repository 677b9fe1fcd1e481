"""Positions and ids of rows, against lists."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradtrace import CorruptIndexError, QueryError
from gradtrace.store.manifest import FileEntry
from gradtrace.store.row_ids import RowIds, read_row_ids
from gradtrace_indexer.writing.files import write_ids
from made_index import write_index

pytestmark = pytest.mark.unit


@st.composite
def stored_rows(draw: st.DrawFn) -> tuple[int, list[int], list[int]]:
    """Rows ever indexed, those stored, and those of them that are deleted; at least one is left."""
    rows = draw(st.integers(1, 30))
    ids = sorted(draw(st.sets(st.integers(0, rows - 1), min_size=1)))
    deleted = sorted(draw(st.sets(st.sampled_from(ids), max_size=len(ids) - 1)))
    return rows, ids, deleted


@given(stored_rows(), st.randoms(use_true_random=False))
def test_positions_and_ids(case: tuple[int, list[int], list[int]], random: np.random.Generator) -> None:
    rows, ids, deleted = case
    found = RowIds(rows, np.array(ids), np.array(deleted, dtype=np.int64))
    left = [row for row in ids if row not in deleted]
    assert found.present.tolist() == [row in left for row in range(rows)]
    assert found.live_ids().tolist() == left
    values = np.arange(2 * len(ids), dtype=np.float32).reshape(2, -1)
    expected = [[line[ids.index(row)] if row in left else -1.5 for row in range(rows)] for line in values.tolist()]
    np.testing.assert_array_equal(found.spread(values, -1.5), np.array(expected, dtype=np.float32))
    mask = np.array([random.random() < 0.5 for _ in range(rows)])
    admitted = [mask[row] and row in left for row in ids]
    if any(admitted):
        allowed = found.allowed(mask)
        assert allowed is not None
        assert allowed.tolist() == admitted
    elif len(left) < rows:
        with pytest.raises(QueryError, match="no training row but deleted"):
            found.allowed(mask)
    everything = found.allowed(None)
    assert (everything is None) == (len(left) == rows)
    assert everything is None or everything.tolist() == [row in left for row in ids]


def test_columns_of_deleted_rows_are_unknown() -> None:
    found = RowIds(4, np.array([0, 2, 3]), np.array([2]))
    columns = found.columns(
        {
            "label": np.array([5, 6, 7]),
            "loss": np.array([0.5, 0.25, 0.125], np.float32),
            "correct": np.array([True, False, True]),
            "word": np.array(["a", "b", "c"]),
        }
    )
    np.testing.assert_array_equal(columns["label"], [5, np.nan, np.nan, 7])
    np.testing.assert_array_equal(columns["loss"], np.array([0.5, np.nan, np.nan, 0.125], np.float32))
    assert columns["correct"].tolist() == [True, None, None, True]
    assert columns["word"].tolist() == ["a", None, None, "c"]


def test_nothing_is_copied_where_nothing_is_deleted() -> None:
    found = RowIds(3, np.arange(3), np.zeros(0, np.int64))
    values, mask = np.zeros((2, 3), np.float32), np.array([True, False, True])
    assert found.spread(values, 0.0) is values
    assert found.allowed(mask) is mask
    assert found.allowed(None) is None


@pytest.mark.parametrize("wrong", [[0, 1], [0, 2, 1], [0, 1, 3], [-1, 0, 1], [0, 0, 1]], ids=str)
def test_ids_that_do_not_fit_the_manifest(tmp_path: Path, wrong: list[int]) -> None:
    manifest = write_index(tmp_path, np.ones((1, 3, 4), np.float32))
    entry = write_ids(tmp_path, "row_ids/2.ids", np.array(wrong))
    with pytest.raises(CorruptIndexError, match="do not fit"):
        read_row_ids(tmp_path, manifest.model_copy(update={"row_ids": entry}))


def test_a_file_of_ids_that_is_missing_or_cut(tmp_path: Path) -> None:
    manifest = write_index(tmp_path, np.ones((1, 3, 4), np.float32))
    gone = FileEntry(path="deleted/2.ids", bytes=8, xxh3="")
    with pytest.raises(CorruptIndexError, match=r"2\.ids cannot be read"):
        read_row_ids(tmp_path, manifest.model_copy(update={"deleted": gone}))
    (tmp_path / "deleted").mkdir()
    (tmp_path / "deleted" / "2.ids").write_bytes(b"seven b")
    with pytest.raises(CorruptIndexError, match=r"2\.ids cannot be read"):
        read_row_ids(tmp_path, manifest.model_copy(update={"deleted": gone}))
