"""What leaving rows out of the training is predicted to do: against sums of scores, float64 gradients, retraining."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from conftest import DigitsRun
from digits_task import TASK
from gradtrace import Checkpoint, Index, QueryError, open_index
from gradtrace.methods import METHODS
from gradtrace_client import Client, InvalidRequestError
from gradtrace_indexer import build_index, delete_rows
from gradtrace_service.app import create_app
from gradtrace_service.server import serving
from gradtrace_service.settings import Settings
from ridge_task import Ridge

ROWS = [3, 5, 8, 13, 21]
QUERIES = [TASK.query[row] for row in range(6)]
N = 400


def test_predicted_changes_are_shares_of_the_sums_of_scores(index: Index) -> None:
    """Of `influence`, three checkpoints estimate the same change; of `source`, they are one estimate together."""
    for method, divisor in (("influence", 3 * N), ("source", N), ("tracin", None), ("cosine", None)):
        sums = index.scores(QUERIES, method=method)[:, ROWS].sum(1, dtype=np.float64)
        effects = index.removal([*ROWS, *ROWS], QUERIES, method=method)
        np.testing.assert_allclose([effect.score_sum for effect in effects], sums, rtol=1e-5)
        changes = [effect.predicted_change for effect in effects]
        if divisor is None:
            assert changes == [None] * 6
        else:
            np.testing.assert_allclose(np.array(changes, dtype=float), sums / divisor, rtol=1e-5)
        losses = [hits.loss for hits in index.influence(QUERIES, k=1)]
        np.testing.assert_allclose([effect.loss for effect in effects], losses, rtol=1e-6)


def test_a_method_says_what_it_predicts_where_it_predicts() -> None:
    assert {name for name, method in METHODS.items() if method.removal} == {
        "influence",
        "source",
        "fast-source",
        "hydra",
    }
    assert all(method.forecasts for method in METHODS.values() if method.removal)


def test_of_runs_with_unequal_numbers_of_checkpoints_each_is_a_mean(tmp_path: Path) -> None:
    task = tiny.ClassTask(tiny.mlp, tiny.classes(30))
    runs = [tiny.checkpoints(task, tmp_path / str(run), count, seed=run) for run, count in enumerate((3, 1))]
    index = build_index(task, runs, tmp_path / "index", dimensions=30, progress=False)
    queries, names = tiny.classes(4, seed=7), [entry.name for entry in index.manifest.checkpoints]
    first, second = (
        index.scores(queries, method="influence", checkpoints=chosen)[:, [2, 4]].sum(1)
        for chosen in (names[:3], names[3:])
    )
    effects = index.removal([2, 4], queries)
    wanted = (first / 3 + second) / 2 / 30
    np.testing.assert_allclose([effect.predicted_change for effect in effects], wanted, rtol=1e-4)


class LeastSquares(Ridge):
    """Without penalty, so that the mean loss on the rows is what its training minimises."""

    def fit(self, rows: Any, seed: int) -> torch.nn.Module:
        inputs, labels = self.collate([self.train[row] for row in rows])
        model = self.model()
        model.weight.data[0] = torch.linalg.lstsq(inputs, labels[:, None]).solution[:, 0]
        return model


@pytest.mark.parametrize("copies", [1, 2])
def test_predictions_are_those_of_retraining(tmp_path: Path, copies: int) -> None:
    """Least squares in closed form: at the optimum and without damping, the first order of what retraining gives. Where
    a checkpoint is there twice, scores double and predictions stay."""
    task = LeastSquares(rows=300)
    trained = task.fit(range(300), 0)
    found = []
    for copy in range(copies):
        torch.save(trained.state_dict(), tmp_path / f"{copy}.pt")
        found.append(Checkpoint(tmp_path / f"{copy}.pt", copy + 1, 0.1))
    index = build_index(task, found, tmp_path / "index", dimensions=3, progress=False)
    removed = [row for row in range(300) if row % 60 == 7]
    remaining = [row for row in range(300) if row not in removed]
    queries = [task.query[row] for row in range(3)]
    with torch.no_grad():
        batch = task.collate(queries)
        measured = (task.loss(task.fit(remaining, 0), batch) - task.loss(trained, batch)).numpy()
    effects = index.removal(removed, queries, method="influence", damping=1e-6)
    predicted = np.array([effect.predicted_change for effect in effects])
    first_order = of_first_order(task, trained, removed, queries)
    np.testing.assert_allclose(predicted, first_order, rtol=0.03, atol=1e-5)
    np.testing.assert_allclose(predicted, measured, rtol=0.2, atol=3e-4)


def of_first_order(task: Ridge, model: Any, removed: list[int], queries: list[Any]) -> Any:
    """q . H^-1 sum of g / rows, H the mean Hessian 2 x xT, all in float64."""
    inputs, labels = task.collate(task.train)
    residuals = (model(inputs)[:, 0] - labels).detach()
    gradients = 2 * residuals[:, None] * inputs
    hessian = 2 * inputs.T @ inputs / len(inputs)
    moved = torch.linalg.solve(hessian, gradients[removed].sum(0)) / len(inputs)
    asked, wanted = task.collate(queries)
    return (2 * (model(asked)[:, 0] - wanted).detach()[:, None] * asked @ moved).numpy()


def test_over_http_the_answer_is_the_library_s(index: Index, client: Client) -> None:
    effects = index.removal(ROWS, QUERIES)
    answer = client.removal(ROWS, query_rows=range(6))
    assert (answer.method, answer.rows, answer.index.generation) == ("influence", 5, 1)
    assert [result.query.row for result in answer.results] == list(range(6))
    assert {result.target for result in answer.results} == {"loss"}
    for name in ("loss", "score_sum", "predicted_change"):
        wanted = [getattr(effect, name) for effect in effects]
        np.testing.assert_allclose([getattr(result, name) for result in answer.results], wanted, rtol=1e-5)
        assert getattr(answer.mean, name) == pytest.approx(np.mean(wanted), rel=1e-5)
    for said in ("had the model been trained to its optimum", "would be worse without", "400 rows", "divided by"):
        assert said in answer.convention
    assert list(answer.to_pandas()["row"]) == list(range(6))
    assert "Without 5 training rows" in answer._repr_html_()


def test_without_a_forecast_there_are_sums_alone(index: Index, client: Client) -> None:
    answer = client.removal(ROWS, train_rows=[1, 2], method="tracin")
    sums = index.scores([TASK.train[row] for row in (1, 2)])[:, ROWS].sum(1)
    np.testing.assert_allclose([result.score_sum for result in answer.results], sums, rtol=1e-5)
    assert answer.mean.predicted_change is None
    assert "It is not a forecast" in answer.convention
    assert "in order only, and nothing is predicted" in answer.convention
    assert "Without 5 training rows" in answer._repr_html_()


def test_the_query_s_own_example_and_options_are_taken(index: Index, client: Client) -> None:
    image = TASK.normalise.inverse(TASK.query[3][0])[:, :, 0]
    answer = client.removal([7], {"image": image, "label": "four"}, method="source", segments=2)
    (effect,) = index.removal([7], [(TASK.query[3][0], 4)], method="source", segments=2)
    assert answer.results[0].predicted_change == pytest.approx(effect.predicted_change, rel=1e-4)
    assert client.removal([7], {"image": image}).results[0].target == "loss at the predicted label"


def test_many_queries_are_answered_in_passes_of_a_batch(digits_index: DigitsRun, index: Index) -> None:
    with serving(create_app(digits_index.open(), Settings(batch_size=4))) as url, Client(url) as client:
        answer = client.removal(ROWS, query_rows=range(10))
    effects = index.removal(ROWS, [TASK.query[row] for row in range(10)])
    wanted = [effect.predicted_change for effect in effects]
    # Another batch rounds differently, and the terms of a sum nearly cancel.
    np.testing.assert_allclose([result.predicted_change for result in answer.results], wanted, rtol=1e-4, atol=1e-6)
    assert answer.mean.predicted_change == pytest.approx(np.mean(np.array(wanted, dtype=float)), rel=1e-4)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"rows": []}, "rows"),
        ({"rows": [0, 400]}, "rows[1]"),
        ({"rows": [-1]}, "rows[0]"),
        ({"query_rows": None}, ""),
        ({"example": {"image": [[0] * 8] * 8}}, ""),
        ({"query_rows": [60]}, "query_rows[0]"),
        ({"method": "trak"}, "method"),
        ({"checkpoints": ["none"]}, "checkpoints[0]"),
        ({"k": 3}, "k"),
    ],
)
def test_what_cannot_be_asked_is_refused_by_its_field(url: str, client: Client, fields: Any, field: str) -> None:
    body = {"rows": [3], "query_rows": [1], **fields}
    refused = client._http.post("/influence/removal", json=body)
    assert refused.status_code == 422, refused.text
    assert [problem["field"] for problem in refused.json()["errors"]] == [field]


def test_deleted_rows_cannot_be_left_out_again(tmp_path: Path) -> None:
    task = tiny.ClassTask(tiny.mlp, tiny.classes(30))
    index = tiny.build(task, tmp_path, basis="gauss-newton", dimensions=20)
    before = index.removal([4], tiny.classes(2, seed=5))
    delete_rows(tmp_path / "index", [3])
    reopened = open_index(tmp_path / "index", task)
    assert reopened.removal([4], tiny.classes(2, seed=5)) == before  # of all rows that the model was trained on
    refusals: list[Callable[[], object]] = [
        lambda: reopened.removal([4, 3], tiny.classes(2, seed=5)),
        lambda: reopened.removal([30], tiny.classes(2, seed=5)),
        lambda: reopened.removal([-1], tiny.classes(2, seed=5)),
        lambda: reopened.removal([], tiny.classes(2, seed=5)),
    ]
    for refused in refusals:
        with pytest.raises(QueryError, match="row"):
            refused()
    with (
        serving(create_app(reopened)) as url,
        Client(url) as client,
        pytest.raises(InvalidRequestError, match=r"rows\[1\].*deleted"),
    ):
        client.removal([4, 3], train_rows=[0])
