"""An index of several training runs: scores are the means of those of the runs' own indexes, whatever happens to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import tiny
from conftest import mostly_long
from gradtrace import (
    Checkpoint,
    CheckpointError,
    Index,
    gradients_reference,
    open_index,
)
from gradtrace.store.manifest import Manifest
from gradtrace.store.manifest_file import read_manifest
from gradtrace_indexer import (
    add_checkpoints,
    add_run,
    append_rows,
    build_index,
    compact,
    delete_rows,
    discard,
    prune,
    roll_back,
    verify,
)
from gradtrace_indexer.build import begin, completion
from tiny import ClassTask

ROWS, QUERIES = tiny.classes(50), tiny.classes(4, seed=5)


@pytest.fixture(autouse=True, scope="module")
def _small_shards() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(begin, "_SHARD_ROWS", 16)
        yield


def task(rows: Sequence[Any] = ROWS) -> ClassTask:
    return ClassTask(tiny.mlp, list(rows))


def runs(directory: Path) -> list[list[Checkpoint]]:
    """Two, of two and three checkpoints, whose files have the same names."""
    return [tiny.checkpoints(task(), directory / str(seed), 2 + seed, seed=seed) for seed in (0, 1)]


def built(checkpoints: Any, path: Path, rows: Sequence[Any] = ROWS, **arguments: Any) -> Index:
    wanted = {"dimensions": 20, "basis": "gauss-newton", "precision": "float16", **arguments}
    return build_index(task(rows), checkpoints, path, progress=False, **wanted)


def mean(found: Sequence[NDArray[np.float32]]) -> NDArray[np.float64]:
    return np.mean(found, axis=0, dtype=np.float64)


def agrees(both: Index, singles: Sequence[Index]) -> None:
    """Every method but the cosine, which is of the gradients at all runs' checkpoints together."""
    for method in both.methods:
        if method == "cosine":
            continue
        for weights in ({}, {"weights": "learning_rate_steps"}) if method == "tracin" else ({},):
            expected = mean([index.scores(QUERIES, method=method, **weights) for index in singles])
            scores = both.scores(QUERIES, method=method, **weights)
            np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-5)
            selfs = mean([index.self_influence(method=method, **weights) for index in singles])
            np.testing.assert_allclose(both.self_influence(method=method, **weights), selfs, rtol=1e-4, atol=1e-6)
    for scores, result in zip(both.scores(QUERIES), both.influence(QUERIES, k=5), strict=True):
        for hits, end in zip((result.proponents, result.opponents), tiny.ends(scores, 5), strict=True):
            np.testing.assert_allclose([hit.score for hit in hits], scores[end], rtol=1e-4, atol=1e-6)


def row_files(directory: Path, run: int, manifest: Manifest) -> list[bytes]:
    """The bytes of one run's rows, columns and curvature, and of its basis."""
    own = [place for place, entry in enumerate(manifest.checkpoints) if entry.run == run]
    shards = [shard for shard in manifest.shards if shard.checkpoint in own]
    files = [file.path for shard in shards for file in (shard.rows, shard.columns)]
    files += [manifest.curvature[place].path for place in own if manifest.curvature]
    files += [manifest.basis.files[run].path]
    return [(directory / file).read_bytes() for file in files]


@dataclass
class Built:
    both: Index
    singles: list[Index]
    runs: list[list[Checkpoint]]


CASES = [
    ("gauss-newton", "float16"),
    pytest.param(("spectral", "float16"), marks=pytest.mark.long),
    ("spectral", "int4"),
    pytest.param(("gaussian", "int8"), marks=pytest.mark.long),
]


@pytest.fixture(scope="module", params=CASES, ids=str)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    basis, precision = request.param
    directory = tmp_path_factory.mktemp("runs")
    found = runs(directory)
    singles = [built(own, directory / f"only-{n}", basis=basis, precision=precision) for n, own in enumerate(found)]
    return Built(built(found, directory / "both", basis=basis, precision=precision), singles, found)


def test_scores_are_means_over_runs(case: Built) -> None:
    agrees(case.both, case.singles)


def test_a_run_is_stored_as_in_an_index_of_its_own(case: Built) -> None:
    both = case.both.contents
    for run, single in enumerate(case.singles):
        own = single.contents
        assert row_files(both.directory, run, both.manifest) == row_files(own.directory, 0, own.manifest)
    names = [entry.name for entry in both.manifest.checkpoints]
    assert names == ["1.pt", "2.pt", "run-1/1.pt", "run-1/2.pt", "run-1/3.pt"]
    assert verify(both.directory) == []


def test_predictions_and_losses_are_those_of_the_last_run(case: Built) -> None:
    for name in ("loss", "prediction"):
        np.testing.assert_array_equal(case.both.columns[name], case.singles[1].columns[name])
    found = [[index.influence(QUERIES, k=1)[0] for index in (case.both, case.singles[1])]]
    for ours, theirs in found:
        assert ours.loss == pytest.approx(theirs.loss)


def test_chosen_checkpoints_of_one_run_are_that_run_alone(case: Built) -> None:
    own = case.singles[1].scores(QUERIES, checkpoints=["1.pt", "3.pt"])
    scores = case.both.scores(QUERIES, checkpoints=["run-1/3.pt", "run-1/1.pt"])
    np.testing.assert_allclose(scores, own, rtol=1e-4, atol=1e-6)
    last = case.both.influence(QUERIES[:1], k=1, method="graddot")[0].proponents[0]
    assert sorted(last.parts) == ["2.pt", "run-1/3.pt"]
    assert sum(last.parts.values()) == pytest.approx(last.score, rel=1e-5)


def test_cosine_is_of_the_last_gradients_of_all_runs_together(case: Built) -> None:
    products = sum(index.scores(QUERIES, method="graddot").astype(np.float64) for index in case.singles)
    rows = sum(index.self_influence(method="graddot").astype(np.float64) for index in case.singles)
    encoded = [
        index.contents.last_model.encode(index.contents.bases[0], index.contents.last_model.batch(QUERIES))[0]
        for index in case.singles
    ]
    norms = np.sqrt(sum(part.double().square().sum(1).numpy() for part in encoded))
    expected = products / norms[:, None] / np.sqrt(rows)
    np.testing.assert_allclose(case.both.scores(QUERIES, method="cosine"), expected, rtol=1e-3, atol=1e-5)


def test_rescored_scores_are_means_of_exact_products(case: Built) -> None:
    expected = np.zeros((len(QUERIES), len(ROWS)))
    for own in case.runs:
        for checkpoint in own:
            model = tiny.loaded(task(), checkpoint)
            q, r = (tiny.flat(gradients_reference(task(), model, some)).numpy() for some in (QUERIES, ROWS))
            expected += checkpoint.learning_rate * q @ r.T / len(case.runs)
    for wanted, result in zip(
        expected, case.both.influence(QUERIES, k=5, rescore=True, include=["layers"]), strict=True
    ):
        for hit in [*result.proponents, *result.opponents]:
            assert hit.score == pytest.approx(wanted[hit.row], rel=1e-3, abs=1e-4)
            assert hit.layers is not None
            assert sum(hit.layers.values()) == pytest.approx(hit.score, rel=1e-3, abs=1e-5)


def test_layers_are_means_over_runs(tmp_path: Path) -> None:
    """With few dimensions a run's basis may leave out a layer that another's has."""
    found = runs(tmp_path)
    singles = [built(own, tmp_path / f"only-{n}", dimensions=3) for n, own in enumerate(found)]
    both = built(found, tmp_path / "both", dimensions=3)
    for query in QUERIES:
        found = [index.influence([query], k=50, include=["layers"])[0] for index in (both, *singles)]
        by_row = [{hit.row: hit.layers or {} for hit in [*some.proponents, *some.opponents]} for some in found]
        for row, layers in by_row[0].items():
            for name, share in layers.items():
                own = [single[row].get(name, 0) for single in by_row[1:]]
                assert share == pytest.approx(sum(own) / 2, rel=1e-4, abs=1e-5)


# What happens to an index


@pytest.mark.parametrize("precision", mostly_long(["int8", "int4"], "int4"))
def test_an_added_run_equals_a_build_with_it(tmp_path: Path, precision: str) -> None:
    found = runs(tmp_path)
    built(found[0], tmp_path / "index", precision=precision)
    index = add_run(tmp_path / "index", task(), found[1], progress=False)
    whole = built(found, tmp_path / "whole", precision=precision)
    for run in (0, 1):
        assert row_files(tmp_path / "index", run, index.manifest) == row_files(tmp_path / "whole", run, whole.manifest)
    assert (index.manifest.checkpoints, index.manifest.task) == (whole.manifest.checkpoints, whole.manifest.task)
    np.testing.assert_array_equal(index.scores(QUERIES), whole.scores(QUERIES))
    again = add_run(tmp_path / "index", task(), found[1], progress=False)
    assert again.manifest.generation == index.manifest.generation
    built(found, tmp_path / "index", precision=precision)  # is there: opened


def test_another_run_after_a_roll_back_has_files_of_its_own(tmp_path: Path) -> None:
    found = runs(tmp_path)
    built(found[0], tmp_path / "index", precision="int4")
    add_run(tmp_path / "index", task(), found[1], progress=False)
    roll_back(tmp_path / "index", 1)
    third = tiny.checkpoints(task(), tmp_path / "2", 1, seed=2)
    add_run(tmp_path / "index", task(), third, progress=False)
    assert verify(tmp_path / "index", all_generations=True) == []
    prune(tmp_path / "index")
    kept = {entry.path for entry in read_manifest(tmp_path / "index").files()}
    assert {str(p.relative_to(tmp_path / "index")) for p in (tmp_path / "index").rglob("*.safetensors")} <= kept


@pytest.mark.parametrize("run", mostly_long([0, 1, None], 0, None))
def test_checkpoints_are_added_to_the_run_that_is_meant(tmp_path: Path, run: int | None) -> None:
    number = 1 if run is None else run
    found = runs(tmp_path)
    both = built(found, tmp_path / "both")
    longer = tiny.checkpoints(task(), tmp_path / str(number), 5, seed=number)
    index = add_checkpoints(tmp_path / "both", task(), longer, run=run, progress=False)
    singles = [built(own, tmp_path / f"only-{n}") for n, own in enumerate(found)]
    singles[number] = add_checkpoints(tmp_path / f"only-{number}", task(), longer, progress=False)
    agrees(index, singles)
    assert [e.step for e in index.manifest.checkpoints if e.run == number] == [c.step for c in longer]
    np.testing.assert_array_equal(index.columns["loss"], singles[1].columns["loss"])
    assert (run == 0) == (index.manifest.task == both.manifest.task)
    with pytest.raises(CheckpointError, match="no training run 2; its runs are 0 to 1"):
        add_checkpoints(tmp_path / "both", task(), longer, run=2, progress=False)


def test_rows_come_and_go(tmp_path: Path) -> None:
    found = runs(tmp_path)
    paths = [tmp_path / "both", tmp_path / "only-0", tmp_path / "only-1"]
    for path, checkpoints in zip(paths, (found, *found), strict=True):
        built(checkpoints, path, rows=ROWS[:40], precision="int4")
        append_rows(path, task(), progress=False)
        delete_rows(path, [0, 3, 45])
        compact(path, progress=False)
    both, *singles = (open_index(path, task()) for path in paths)
    assert not both.scores(QUERIES)[:, [0, 3, 45]].any()
    agrees(both, singles)


@pytest.mark.parametrize("precision", mostly_long(["float16", "int4"], "int4"))
def test_a_killed_build_or_update_goes_on(tmp_path: Path, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = runs(tmp_path)
    write, left = completion.write_rows, [0]

    def killed(*arguments: Any, **options: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return write(*arguments, **options)

    third = tiny.checkpoints(task(), tmp_path / "2", 2, seed=2)
    for way, shards in (
        (lambda path: built(found, path, precision=precision), (10, 1, 2)),
        (lambda path: add_run(path, task(), third, progress=False), (3, 0)),
    ):
        way(tmp_path / "whole")
        for written in shards:
            left[0] = written
            monkeypatch.setattr(completion, "write_rows", killed)
            with pytest.raises(KeyboardInterrupt):
                way(tmp_path / "killed")
            monkeypatch.setattr(completion, "write_rows", write)
        way(tmp_path / "killed")
        assert tiny.files(tmp_path / "killed") == tiny.files(tmp_path / "whole")


def test_a_run_that_is_given_up_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = runs(tmp_path)
    built(found[0], tmp_path / "index", precision="int4")
    before = tiny.files(tmp_path / "index")
    monkeypatch.setattr(completion, "write_rows", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        add_run(tmp_path / "index", task(), found[1], progress=False)
    discard(tmp_path / "index")
    assert tiny.files(tmp_path / "index") == before


def test_weights_that_were_moved_are_named_by_run(tmp_path: Path) -> None:
    built(runs(tmp_path), tmp_path / "index")
    moved = [(tmp_path / name).rename(tmp_path / f"moved-{name}") for name in ("0", "1")]
    assert open_index(tmp_path / "index", task(), checkpoints=moved).rows == 50
    with pytest.raises(CheckpointError, match=r"1 directories .* 2 training run\(s\)"):
        open_index(tmp_path / "index", task(), checkpoints=moved[0])


def test_the_same_run_twice_is_refused(tmp_path: Path) -> None:
    own = runs(tmp_path)[0]
    with pytest.raises(CheckpointError, match="given twice"):
        built([own, own], tmp_path / "index")
