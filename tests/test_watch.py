"""Following a training run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import tiny
from gradtrace import CheckpointError
from gradtrace_indexer.update.update import watch
from tiny import ClassTask


def listed(directory: Path, count: int) -> str:
    """checkpoints.json for the first so many."""
    entries = [
        f'{{"file": "{n}.pt", "step": {5 * n * (n + 1)}, "learning_rate": {0.1 / n}, "learning_rate_sum": {n}}}'
        for n in range(1, count + 1)
    ]
    return f'{{"checkpoints": [{", ".join(entries)}]}}'


def test_checkpoints_are_added_as_they_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A training run is played between two looks: half-written lists and weights, then whole ones."""
    task, directory = ClassTask(tiny.mlp, tiny.classes(30)), tmp_path / "checkpoints"
    tiny.build(task, tmp_path, count=1)
    tiny.checkpoints(task, directory, 4)
    late = {n: (directory / f"{n}.pt").read_bytes() for n in (2, 3, 4)}
    for n in late:
        (directory / f"{n}.pt").unlink()
    index_file = directory / "checkpoints.json"

    def wrote(name: str, content: bytes) -> None:
        (directory / name).write_bytes(content)

    looks = iter(
        [
            lambda: index_file.write_text(listed(directory, 1)),
            lambda: index_file.write_text(listed(directory, 2)[:60]),  # cut short
            lambda: index_file.write_text(listed(directory, 3)),  # weights are missing
            lambda: [wrote("2.pt", late[2][:500]), wrote("3.pt", late[3])],  # half of one is there
            lambda: wrote("2.pt", late[2][:900]),  # and still growing
            lambda: wrote("2.pt", late[2]),
            lambda: None,
            lambda: [wrote("4.pt", late[4]), index_file.write_text(listed(directory, 4))],
            lambda: None,
        ]
    )
    waited: list[str] = []

    def sleep(seconds: float) -> None:
        assert seconds == 7
        next(looks)()

    monkeypatch.setattr("gradtrace_indexer.update.update.time.sleep", sleep)
    updates = watch(tmp_path / "index", task, directory, interval=7, on_wait=lambda error: waited.append(str(error)))
    assert [entry.name for entry in next(updates).manifest.checkpoints] == ["1.pt", "2.pt", "3.pt"]
    assert [entry.name for entry in next(updates).manifest.checkpoints] == ["1.pt", "2.pt", "3.pt", "4.pt"]
    for words in ("is missing", "malformed", "which is missing"):
        assert any(words in text for text in waited), waited
    assert not any("damaged" in text for text in waited)


def test_weights_that_never_fit_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task, directory = ClassTask(tiny.mlp, tiny.classes(30)), tmp_path / "checkpoints"
    tiny.build(task, tmp_path, count=1)
    before = tiny.files(tmp_path / "index")
    torch.save({"other": torch.zeros(2)}, directory / "2.pt")
    (directory / "checkpoints.json").write_text(listed(directory, 2))

    class StopError(Exception):
        pass

    def stop(error: CheckpointError) -> None:
        assert "does not fit" in str(error)
        raise StopError

    monkeypatch.setattr("gradtrace_indexer.update.update.time.sleep", lambda seconds: None)
    with pytest.raises(StopError):
        next(watch(tmp_path / "index", task, directory, on_wait=stop))
    assert tiny.files(tmp_path / "index") == before
