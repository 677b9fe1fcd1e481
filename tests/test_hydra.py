"""An index with a recording of its training: the method `hydra`, and what the other operations make of it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import digits_task
from gradtrace import (
    CheckpointRecorder,
    Index,
    InfluenceRecorder,
    QueryError,
    RecordingError,
    StoreError,
    load_checkpoints,
    open_index,
    read_recording,
)
from gradtrace.models.gradient_model import GradientModel
from gradtrace_indexer import add_checkpoints, add_run, append_rows, build_index, compact, delete_rows, verify
from gradtrace_indexer.cli import app

TASK = digits_task.TASK
STEPS = 60


@dataclass(frozen=True)
class Run:
    checkpoints: Path
    recording: Path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Trained with momentum and weight decay, recorded, with four checkpoints: the last is of a step after the end."""
    out = tmp_path_factory.mktemp("recorded")
    torch.manual_seed(0)
    model = TASK.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.8, weight_decay=1e-3)
    influence = InfluenceRecorder(out / "recording", TASK, dimensions=600)
    checkpoints = CheckpointRecorder(out / "checkpoints", every=STEPS // 3)
    for step in range(STEPS + STEPS // 3):
        rows = torch.randperm(digits_task.TRAIN_ROWS)[:32]
        batch = TASK.collate([TASK.train[row] for row in rows.tolist()])
        optimizer.zero_grad()
        if step < STEPS:
            with influence.step(model, optimizer, rows):
                TASK.loss(model, batch).mean().backward()
                optimizer.step()
        else:
            TASK.loss(model, batch).mean().backward()
            optimizer.step()
        checkpoints.step(model, optimizer)
        if step == STEPS - 1:
            influence.finish()
    return Run(out / "checkpoints", out / "recording")


def built(run: Run, directory: Path, **arguments: Any) -> Index:
    checkpoints = load_checkpoints(run.checkpoints)[:3]
    return build_index(
        TASK, checkpoints, directory, recording=run.recording, precision="float16", progress=False, **arguments
    )


@pytest.fixture(scope="module")
def index(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Index:
    return built(run, tmp_path_factory.mktemp("hydra") / "index")


QUERIES = [TASK.query[row] for row in range(20)]


def expected(run: Run, queries: Any = QUERIES, checkpoint: int = 2) -> Any:
    """Products of the queries' gradients, in the recording's basis, and its rows. [queries, rows]."""
    recording = read_recording(run.recording)
    saved = load_checkpoints(run.checkpoints)[checkpoint]
    model = GradientModel(TASK, saved, torch.device("cpu"), QUERIES[:2])
    coordinates, _ = model.encode(recording.basis, model.batch(queries))
    return coordinates.numpy() @ recording.hydra_rows.T


def test_scores_are_products_of_the_query_s_gradient_and_the_recorded_rows(run: Run, index: Index) -> None:
    assert "hydra" in index.methods
    scores = index.scores(QUERIES, method="hydra")
    wanted = expected(run)
    np.testing.assert_allclose(scores, wanted, atol=2e-3 * np.abs(wanted).max())
    result = index.influence(QUERIES[:1], k=5, method="hydra", include=["layers", "percentiles"])[0]
    assert [hit.row for hit in result.proponents] == np.argsort(-scores[0])[:5].tolist()
    assert [hit.row for hit in result.opponents] == np.argsort(scores[0])[:5].tolist()
    assert set(result.proponents[0].parts) == {"recording"}
    own = index.self_influence(method="hydra")
    examples = [TASK.train[row] for row in range(digits_task.TRAIN_ROWS)]
    wanted = np.diagonal(expected(run, examples))
    np.testing.assert_allclose(own, wanted, atol=1e-2 * np.abs(wanted).max())


def test_rows_that_are_removed_take_their_recorded_products_away(run: Run, index: Index) -> None:
    removed = [3, 17, 200, 399]
    products = expected(run)
    effects = index.removal([*removed, 17], QUERIES, method="hydra")
    changes = [effect.predicted_change for effect in effects]
    np.testing.assert_allclose(changes, products[:, removed].sum(1), atol=4 * 2e-3 * np.abs(products).max())
    np.testing.assert_allclose(changes, index.scores(QUERIES, method="hydra")[:, removed].sum(1), rtol=1e-4, atol=1e-7)


def test_other_methods_never_sum_over_the_recorded_rows(run: Run, index: Index, tmp_path: Path) -> None:
    entry = index.manifest.basis
    plain = build_index(
        TASK,
        load_checkpoints(run.checkpoints)[:3],
        tmp_path / "index",
        basis="two-sided",
        dimensions=600,
        precision="float16",
        progress=False,
    )
    assert (entry.kind, entry.dimensions) == ("two-sided", plain.manifest.basis.dimensions)
    for method in plain.methods:
        np.testing.assert_allclose(
            index.scores(QUERIES, method=method), plain.scores(QUERIES, method=method), rtol=1e-5, atol=1e-7
        )
    with pytest.raises(QueryError, match="unknown checkpoint 'recording'"):
        index.scores(QUERIES, checkpoints=["recording"])
    with pytest.raises(QueryError, match="does not answer by 'hydra': it holds no recording"):
        plain.scores(QUERIES, method="hydra")


def test_hydra_takes_no_options_and_no_hypothetical_rows(index: Index) -> None:
    with pytest.raises(QueryError, match="takes no weights"):
        index.scores(QUERIES, method="hydra", weights="equal")
    with pytest.raises(QueryError, match="not an inner product of full gradients"):
        index.influence(QUERIES, method="hydra", rescore=True)
    with pytest.raises(QueryError, match="rows that were trained on alone"):
        index.pairs(QUERIES, QUERIES, method="hydra")


def test_an_index_with_a_recording_lives_on(run: Run, tmp_path: Path) -> None:
    directory = tmp_path / "index"
    built(run, directory)
    before = open_index(directory, TASK).scores(QUERIES, method="hydra")
    gone = [3, 17, 200]
    delete_rows(directory, gone)
    compact(directory)
    added = add_checkpoints(directory, TASK, load_checkpoints(run.checkpoints), progress=False)
    assert [entry.kind for entry in added.manifest.checkpoints] == ["weights"] * 3 + ["recorded", "weights"]
    after = added.scores(QUERIES, method="hydra")  # at the weights that the recording ended with
    assert not after[:, gone].any()
    kept = np.setdiff1d(np.arange(digits_task.TRAIN_ROWS), gone)
    scale = float(np.abs(before).max())  # products over other numbers of rows may be summed in another order
    np.testing.assert_allclose(after[:, kept], before[:, kept], rtol=1e-5, atol=1e-6 * scale)
    assert not verify(directory)
    with pytest.raises(StoreError, match="holds a recording of the training"):
        append_rows(directory, TASK, progress=False)


def test_another_run_joins_an_index_with_a_recording(run: Run, index: Index, tmp_path: Path) -> None:
    """Its projections have as many dimensions; `hydra` stays that of the recorded run."""
    built(run, tmp_path / "index")
    assert index.manifest.basis.dimensions < index.manifest.basis.requested == 600
    grown = add_run(tmp_path / "index", TASK, load_checkpoints(run.checkpoints)[3:], progress=False)
    assert [entry.run for entry in grown.manifest.checkpoints] == [0, 0, 0, 0, 1]
    np.testing.assert_array_equal(grown.scores(QUERIES, method="hydra"), index.scores(QUERIES, method="hydra"))


def test_moved_weights_are_found(run: Run, index: Index, tmp_path: Path) -> None:
    built(run, tmp_path / "index")
    open_index(tmp_path / "index", TASK, checkpoints=run.checkpoints)


def test_recordings_of_other_trainings_are_refused(run: Run, index: Index, tmp_path: Path) -> None:
    checkpoints = load_checkpoints(run.checkpoints)
    for some in (checkpoints, checkpoints[:2]):
        with pytest.raises(RecordingError, match="save a checkpoint after the last recorded step"):
            build_index(TASK, some, tmp_path / "index", recording=run.recording, progress=False)
    with pytest.raises(RecordingError, match="not a finished recording"):
        build_index(TASK, checkpoints, tmp_path / "index", recording=tmp_path, progress=False)
    directory = index.directory
    with pytest.raises(StoreError, match="already holds another index"):
        build_index(TASK, checkpoints[:3], directory, progress=False)


def test_the_command_line_builds_with_a_recording(run: Run, tmp_path: Path) -> None:
    listed = json.loads((run.checkpoints / "checkpoints.json").read_text())
    listed["checkpoints"] = listed["checkpoints"][:3]
    (run.checkpoints / "recorded.json").write_text(json.dumps(listed))
    arguments = {
        "checkpoints": run.checkpoints / "recorded.json",
        "out": tmp_path / "index",
        "recording": run.recording,
    }
    options = [text for name, value in arguments.items() for text in (f"--{name}", str(value))]
    done = CliRunner().invoke(app, ["build", f"{digits_task.__file__}:TASK", *options])
    assert done.exit_code == 0, done.output
    assert "hydra" in open_index(tmp_path / "index", TASK).methods
