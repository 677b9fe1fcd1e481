from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from math import factorial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ridge_task
import tiny
from conftest import wait_until
from gradtrace import EvaluationError, LossError, MismatchError, QueryError, StoreError, TaskError, open_index
from gradtrace_indexer import (
    Retrainings,
    SubsetOutputs,
    delete_rows,
    downsampling,
    leave_one_out,
    shapley,
    subset_outputs,
)
from gradtrace_indexer.evaluation.evaluate import evaluate
from gradtrace_indexer.evaluation.ground_truth import Walk, marginal_values, random_subsets
from gradtrace_indexer.evaluation.retraining import Trainer, Training
from ridge_task import PENALTY, Ridge
from tiny import ClassTask


def opened(task: Ridge | str, path: Path, **arguments: Any) -> Retrainings:
    return Retrainings(task, path, progress=False, **arguments)


def losses_of(task: Ridge, rows: Any) -> Any:
    """Of the queries, from NumPy's least squares on the rows with the penalty as further rows."""
    inputs, labels = (part.numpy() for part in task.collate(task.train))
    queries, wanted = (part.numpy() for part in task.collate(task.query))
    extended = np.vstack([inputs[list(rows)], np.sqrt(PENALTY) * np.eye(3)])
    weights = np.linalg.lstsq(extended, np.concatenate([labels[list(rows)], np.zeros(3)]), rcond=None)[0]
    return (queries @ weights - wanted) ** 2


def test_leaving_one_out_of_a_ridge_regression_is_its_closed_form(tmp_path: Path) -> None:
    task = Ridge()
    inputs, labels = (part.numpy() for part in task.collate(task.train))
    queries, wanted = (part.numpy() for part in task.collate(task.query))
    inverse = np.linalg.inv(inputs.T @ inputs + PENALTY * np.eye(3))
    weights = inverse @ inputs.T @ labels
    leverage = np.einsum("ni,ij,nj->n", inputs, inverse, inputs)
    without = weights - (inverse @ inputs.T * ((labels - inputs @ weights) / (1 - leverage))).T  # Sherman-Morrison
    expected = (queries @ without.T - wanted[:, None]) ** 2 - (queries @ weights - wanted)[:, None] ** 2
    retrainings = opened(task, tmp_path)
    np.testing.assert_allclose(leave_one_out(retrainings), expected, rtol=1e-4, atol=1e-6)
    some = leave_one_out(retrainings, rows=[7, 2])
    np.testing.assert_allclose(some[:, [2, 7]], expected[:, [2, 7]], rtol=1e-4, atol=1e-6)
    assert np.isnan(np.delete(some, [2, 7], axis=1)).all()


def test_seeds_are_averaged_and_the_same_with_and_without_a_row(tmp_path: Path) -> None:
    noisy = leave_one_out(opened(Ridge(noise=0.02), tmp_path / "noisy"), seeds=10)
    exact = leave_one_out(opened(Ridge(), tmp_path / "exact"))
    assert np.corrcoef(noisy.ravel(), exact.ravel())[0, 1] > 0.99


def enumerated_shapley(task: Ridge) -> Any:
    """Over all subsets: sum_S |S|! (n - |S| - 1)! / n! (v(S + row) - v(S)), v the negative loss. [queries, rows]"""
    rows = range(len(task.train))
    values = {
        some: -losses_of(task, some) for size in range(len(rows) + 1) for some in itertools.combinations(rows, size)
    }
    found = np.zeros((3, len(rows)))
    for some, value in values.items():
        weight = factorial(len(some)) * factorial(max(0, len(rows) - len(some) - 1)) / factorial(len(rows))
        for row in set(rows) - set(some):
            found[:, row] += weight * (values[tuple(sorted({*some, row}))] - value)
    return found


def test_the_marginal_values_of_all_permutations_average_to_the_enumerated_shapley_values(tmp_path: Path) -> None:
    task = Ridge(rows=4)
    trainer = Trainer(task, tmp_path, "query", [0, 1, 2], None)
    walks = [Walk(np.array(order), 0, 0.0) for order in itertools.permutations(range(4))]
    found = np.mean([marginal_values(trainer, walk) for walk in walks], axis=0)
    np.testing.assert_allclose(found, enumerated_shapley(task), atol=1e-6)


def test_shapley_values_by_sampling_are_as_near_as_their_errors_say(tmp_path: Path) -> None:
    task = Ridge(rows=5)
    found = shapley(opened(task, tmp_path), 40, tolerance=0.0)
    expected = enumerated_shapley(task)
    assert (np.abs(found.values - expected) < 4 * found.errors + 1e-6).all()
    assert np.corrcoef(found.values.ravel(), expected.ravel())[0, 1] > 0.95
    np.testing.assert_allclose(found.values.sum(1), losses_of(task, []) - losses_of(task, range(5)), rtol=1e-4)


def test_a_walk_ends_where_nothing_is_left_to_gain(tmp_path: Path) -> None:
    task = Ridge()
    trainer = Trainer(task, tmp_path, "query", [0, 1, 2], None)
    order = np.arange(12)
    full, cut = (marginal_values(trainer, Walk(order, 0, tolerance)) for tolerance in (0.0, 0.2))
    means = [losses_of(task, order[:count]).mean() for count in range(13)]
    left = [abs(mean - means[12]) < 0.2 * abs(means[0] - means[12]) for mean in means]
    stop = left.index(True)
    assert 1 < stop < 11
    np.testing.assert_array_equal(cut[:, :stop], full[:, :stop])
    assert (cut[:, stop:] == 0).all()
    with pytest.raises(EvaluationError, match="give at least 2"):
        shapley(opened(task, tmp_path / "others"), 1)


def test_downsampling_over_all_subsets_of_an_additive_model_is_its_closed_form() -> None:
    rows, size = 6, 3
    values = np.random.default_rng(0).standard_normal((2, rows))
    subsets = np.array([[row in some for row in range(rows)] for some in itertools.combinations(range(rows), size)])
    outputs = np.repeat(-(subsets @ values.T)[:, None], 2, axis=1).astype(np.float32)
    others = (values.sum(1, keepdims=True) - values) / (rows - 1)  # a subset without a row has one more of the others
    np.testing.assert_allclose(downsampling(SubsetOutputs(subsets, outputs)), values - others, atol=1e-5)
    kept = subsets[:, 0]
    lacking = downsampling(SubsetOutputs(subsets[kept], outputs[kept]))
    assert np.isnan(lacking[:, 0]).all()
    assert np.isfinite(lacking[:, 1:]).all()


def test_subsets_are_measured_as_retrained_and_more_of_them_go_on_where_fewer_ended(tmp_path: Path) -> None:
    task = Ridge(log=tmp_path / "log")
    retrainings = opened(task, tmp_path / "truth")
    first = subset_outputs(retrainings, 3, seeds=2)
    assert first.subsets.sum(1).tolist() == [6, 6, 6]
    for subset, outputs in zip(first.subsets, first.outputs, strict=True):
        expected = losses_of(task, np.flatnonzero(subset))
        np.testing.assert_allclose(outputs, [expected, expected], rtol=1e-5)
    more = subset_outputs(retrainings, 4, seeds=3)
    np.testing.assert_array_equal(more.subsets[:3], first.subsets)
    np.testing.assert_array_equal(more.outputs[:3, :2], first.outputs)
    trained = (tmp_path / "log").read_text().splitlines()
    assert len(trained) == len(set(trained)) == 12


def test_halves_are_drawn_evenly() -> None:
    some = random_subsets(10, 200, 0.5, 5, among=np.array([0, 3, 4, 9]))
    assert (some.sum(1) == 2).all()
    assert some.any(0).tolist() == [row in (0, 3, 4, 9) for row in range(10)]
    subsets = random_subsets(10, 2_000, 0.3, seed=5)
    assert (subsets.sum(1) == 3).all()
    np.testing.assert_allclose(subsets.mean(0), 0.3, atol=0.05)


@pytest.mark.long
def test_processes_give_what_this_one_gives(tmp_path: Path) -> None:
    alone = subset_outputs(opened(ridge_task.NOISY, tmp_path / "1"), 3, seeds=2)
    together = subset_outputs(opened(f"{ridge_task.__file__}:NOISY", tmp_path / "2", workers=2), 3, seeds=2)
    np.testing.assert_array_equal(alone.outputs, together.outputs)
    assert len(np.unique(alone.outputs[:, :, 0])) == 6


def running(log: Path) -> set[int]:
    """Processes named in the log that are alive."""
    processes = {int(line.split()[0]) for line in log.read_text().splitlines()}
    return {process for process in processes if Path(f"/proc/{process}").exists()}


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
def test_killed_it_goes_on_where_it_stood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log"
    monkeypatch.setenv("RIDGE_LOG", str(log))
    monkeypatch.setenv("RIDGE_LAST", "8")
    killed = subprocess.Popen([sys.executable, ridge_task.__file__, str(tmp_path / "truth")], env=dict(os.environ))
    trainings = tmp_path / "truth" / "trainings"
    wait_until(lambda: len(list(trainings.rglob("*.npy"))) >= 5)
    assert killed.poll() is None
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    wait_until(lambda: not running(log))  # its processes do not outlive it
    finished, begun = len(list(trainings.rglob("*.npy"))), len(log.read_text().splitlines())
    assert 5 <= finished < 30
    monkeypatch.delenv("RIDGE_LAST")
    task = ridge_task.logged()
    resumed = subset_outputs(opened(task, tmp_path / "truth"), 15, seeds=2)
    assert len(log.read_text().splitlines()) == begun + 30 - finished
    undisturbed = subset_outputs(opened(Ridge(noise=0.001), tmp_path / "undisturbed"), 15, seeds=2)
    np.testing.assert_array_equal(resumed.outputs, undisturbed.outputs)


class Tuned(Ridge):
    def fit(self, rows: Any, seed: int) -> Any:
        return super().fit(rows, seed + 1)


def test_trainings_of_something_else_are_refused(tmp_path: Path) -> None:
    subset_outputs(opened(Ridge(), tmp_path, queries=[0, 2]), 2, seeds=1)
    assert opened(Ridge(), tmp_path).queries == [0, 2]
    for changed, what in (
        (lambda: opened(Ridge(), tmp_path, queries=[0, 1]), "queries, query_examples"),
        (lambda: opened(Ridge(), tmp_path, target="loss"), "target"),
        (lambda: opened(Ridge(rows=11), tmp_path), "train_rows, .*query_examples"),
        (lambda: opened(Tuned(), tmp_path), "task, fit"),
        (lambda: opened(Ridge(), tmp_path, split="train"), "split"),
    ):
        with pytest.raises(MismatchError, match=rf"something else \(other .*{what}.*\): make the task"):
            changed()


def test_what_cannot_be_retrained_says_why(tmp_path: Path) -> None:
    class NoFit(Ridge):
        has_fit = False

    with pytest.raises(TaskError, match="NoFit cannot be retrained: define fit"):
        opened(NoFit(), tmp_path)
    task = Ridge()
    task.query = None
    with pytest.raises(TaskError, match="has no query data"):
        opened(task, tmp_path)
    with pytest.raises(QueryError, match="unknown target 'margin'"):
        opened(Ridge(), tmp_path, target="margin")
    with pytest.raises(TaskError, match=r"cannot be sent to other processes .*workers=1"):
        leave_one_out(opened(NoPickle(), tmp_path, workers=2))
    with pytest.raises(TaskError, match=r"Broken.fit failed on 6 rows with seed \d+: RuntimeError: out of luck"):
        subset_outputs(opened(Broken(), tmp_path / "broken"), 2)
    with pytest.raises(TaskError, match=r"Forgetful.fit must return the trained model, .* not NoneType"):
        subset_outputs(opened(Forgetful(), tmp_path / "forgetful"), 2)
    with pytest.raises(LossError, match="NaN or infinite"):
        subset_outputs(opened(Diverging(), tmp_path / "diverging"), 2)


class NoPickle(Ridge):
    def __init__(self) -> None:
        super().__init__()
        self.hook = lambda: None


class Forgetful(Ridge):
    def fit(self, rows: Any, seed: int) -> Any:
        super().fit(rows, seed)


class Broken(Ridge):
    def fit(self, rows: Any, seed: int) -> Any:
        raise RuntimeError("out of luck")


class Diverging(Ridge):
    def fit(self, rows: Any, seed: int) -> Any:
        model = self.model()
        torch.nn.init.constant_(model.weight, torch.nan)  # type: ignore[arg-type]
        return model


class Ending(Ridge):
    def fit(self, rows: Any, seed: int) -> Any:
        os._exit(1)


def test_a_process_that_dies_and_a_damaged_result_name_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"ended from outside: .* fewer workers .* it resumes"):
        subset_outputs(opened(Ending(), tmp_path / "ending", workers=2), 2, seeds=1)
    retrainings = opened(Ridge(), tmp_path)
    subset_outputs(retrainings, 2, seeds=1)
    path = next((tmp_path / "trainings").rglob("*.npy"))
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(StoreError, match=r"is damaged .* delete it"):
        subset_outputs(retrainings, 2, seeds=1)
    identity = tmp_path / "retrainings.json"
    identity.write_text("{")
    with pytest.raises(StoreError, match=r"is damaged .* another directory"):
        opened(Ridge(), tmp_path)
    identity.unlink()
    with pytest.raises(StoreError, match=r"No such file.* restore it"):
        opened(Ridge(), tmp_path)


def test_the_same_rows_in_any_order_are_the_same_training() -> None:
    assert Training([3, 1, 2], 0).name == Training((1, 2, 3), 0).name
    assert Training([1, 2, 3], 0).name != Training([1, 2, 3], 1).name != Training([1, 2], 1).name


def test_trainings_that_had_deleted_rows_are_refused(tmp_path: Path) -> None:
    task = ClassTask(tiny.mlp, tiny.classes(20))
    tiny.build(task, tmp_path)
    delete_rows(tmp_path / "index", [3])
    index = open_index(tmp_path / "index", task)
    subsets = random_subsets(20, 4, 0.5, 0)
    truth = SubsetOutputs(subsets, np.zeros((4, 1, 2), np.float32))
    with pytest.raises(EvaluationError, match="deleted from the index: draw the subsets from the others"):
        next(evaluate(index, task.train[:2], truth, ["tracin"]))
