from __future__ import annotations

from pathlib import Path

import pytest

from gradtrace.durable import rename_durably, temporary_path, write_whole


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for content in ("first", "second"):
        write_whole(path, lambda temporary, content=content: temporary.write_text(content))
        assert path.read_text() == content
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")

    def half(temporary: Path) -> None:
        temporary.write_text("ne")
        assert path.read_text() == "old"
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_whole(path, half)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_finished_temporary_file_takes_the_final_name(tmp_path: Path) -> None:
    path = tmp_path / "a.rows"
    temporary_path(path).write_bytes(b"rows")
    rename_durably(temporary_path(path), path)
    assert path.read_bytes() == b"rows"
    assert not temporary_path(path).exists()
