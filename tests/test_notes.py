"""Ends by sign, what a result says of missing hits and zero gradients, and deleted rows in arrays of scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tiny
from gradtrace import Index, RowFilter, open_index
from gradtrace_client.request_schemas import InfluenceRequest
from gradtrace_client.schemas import InfluenceAnswer
from gradtrace_indexer import delete_rows, fit_representer
from gradtrace_indexer.build.row_check import zero_rows_message
from gradtrace_service.answers.influence import influence
from gradtrace_service.console import print_answer
from tiny import ClassTask, PairTask

ROWS, QUERIES = tiny.classes(40), tiny.classes(6, seed=5)


class Saturated(ClassTask):
    """So sure of everything that the loss of a right prediction is 0 in float32."""

    query = QUERIES

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]) * 1e5, batch[1], reduction="none")


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Index:
    directory = tmp_path_factory.mktemp("notes")
    task = ClassTask(tiny.mlp, ROWS)
    task.query = QUERIES  # type: ignore[attr-defined]
    tiny.build(task, directory)
    fit_representer(directory / "index")
    return open_index(directory / "index", task)


def right(task: ClassTask, directory: Path) -> tuple[Tensor, int]:
    """A query that the last checkpoint predicts rightly."""
    model = tiny.loaded(task, tiny.checkpoints(task, directory / "again")[-1])
    x = QUERIES[0][0]
    return x, int(model(x[None]).argmax())


@pytest.mark.parametrize("method", ["tracin", "cosine", "graddot", "representer"])
def test_ends_hold_the_rows_of_their_sign(index: Index, method: str) -> None:
    scores = index.scores(QUERIES, method=method)
    for row, result in zip(scores, index.influence(QUERIES, method=method, k=40), strict=True):
        best, worst = tiny.ends(row, 40)
        assert [hit.row for hit in result.proponents] == best
        assert [hit.row for hit in result.opponents] == worst
        assert result.exact
        assert result.note == (
            f"only {len(best)} of 40 proponents: no other of the 40 rows searched has a positive score; "
            f"only {len(worst)} of 40 opponents: no other of the 40 rows searched has a negative score"
        )
    assert index.influence(QUERIES[:1], method=method, k=2)[0].note is None


def test_an_end_may_be_empty(index: Index) -> None:
    scores = index.scores(QUERIES[:1])[0]
    positive = np.flatnonzero(scores > 0)[:3]
    (result,) = index.influence(QUERIES[:1], k=2, filter=RowFilter(rows=positive))
    assert (len(result.proponents), result.opponents) == (2, [])
    assert result.note == "no opponents: none of the 3 rows searched has a negative score"
    (rescored,) = index.influence(QUERIES[:1], k=2, filter=RowFilter(rows=positive), rescore=True)
    assert rescored.note == "no opponents: none of the 3 rows rescored has a negative score"
    (mean,) = index.influence(QUERIES, k=40, aggregate="mean", include=["percentiles"])
    assert all(hit.score > 0 and hit.percentile is not None for hit in mean.proponents)
    assert all(hit.score < 0 for hit in mean.opponents)


@pytest.mark.parametrize("similarity", ["cosine", "dot", "l2"])
def test_likeness_has_two_ends_whatever_the_signs(index: Index, similarity: str) -> None:
    (result,) = index.influence(QUERIES[:1], k=30, method="repsim", similarity=similarity)
    assert (len(result.proponents), len(result.opponents), result.note) == (30, 30, None)
    (few,) = index.influence(QUERIES[:1], k=30, method="repsim", filter=RowFilter(rows=[1, 2]))
    assert few.note == "only 2 of 30 rows at either end: no more were searched"


def test_a_query_whose_loss_is_zero_says_so(tmp_path: Path) -> None:
    task = Saturated(tiny.mlp, ROWS)
    index = tiny.build(task, tmp_path, count=1)
    sure = right(task, tmp_path)
    sure = (sure[0], int(index.influence([(sure[0], None)], k=1)[0].prediction or 0))
    (result,) = index.influence([sure], k=3)
    assert (result.loss, result.proponents, result.opponents) == (0.0, [], [])
    assert result.note is not None
    assert result.note.startswith("the gradient of this query is zero at every checkpoint used (its loss is 0")
    (mean,) = index.influence([sure, sure], k=3, aggregate="mean")
    assert mean.note is not None
    assert "the gradients of these 2 queries add up to zero" in mean.note


def test_an_approximate_search_claims_no_more_than_it_knows(tmp_path: Path) -> None:
    pytest.importorskip("faiss", reason="faiss is not installed")
    rows = tiny.classes(300)
    index = tiny.build(ClassTask(tiny.mlp, rows), tmp_path, searcher="faiss:IVF4,Flat;nprobe=1")
    scores = index.scores(QUERIES[:1])[0]
    k = int(np.count_nonzero(scores > 0)) // 8
    seen = [index.influence([query], k=k)[0] for query in QUERIES]
    assert all(hit.score > 0 for result in seen for hit in result.proponents)
    notes = [result.note for result in seen if not result.exact and len(result.proponents) < k]
    assert all(note is not None and "the approximate search found no" in note for note in notes)


def test_recall_is_shown_for_what_it_was_measured_with_alone(tmp_path: Path) -> None:
    pytest.importorskip("faiss", reason="faiss is not installed")
    rows = tiny.classes(300)
    index = tiny.build(ClassTask(tiny.mlp, rows), tmp_path, searcher="faiss:Flat")

    def recall(**asked: Any) -> object:
        (result,) = index.influence(QUERIES[:1], **asked)
        assert not result.exact
        return result.recall

    assert recall() is not None
    assert recall(filter=RowFilter()) is not None
    unlike: list[dict[str, Any]] = [
        {"k": 5}, {"weights": "equal"}, {"checkpoints": ["1.pt"]}, {"filter": RowFilter(rows=range(290))},
        {"rescore": True}, {"aggregate": "mean"}, {"target": "loss"},
    ]  # fmt: skip
    assert [recall(**asked) for asked in unlike] == [None] * len(unlike)


def test_methods_whose_recall_cannot_be_measured_are_named(tmp_path: Path) -> None:
    pytest.importorskip("faiss", reason="faiss is not installed")

    def loss(model: nn.Module, batch: Any) -> Tensor:
        """Of no known kind, so that nothing is predicted and queries without labels cannot be explained."""
        logits = model(batch[0])
        return logits.square().sum(1) - logits.gather(1, batch[1][:, None])[:, 0]

    task = PairTask(tiny.mlp, tiny.classes(60), loss)
    task.query = [(x, None) for x, _ in QUERIES]
    with pytest.warns(
        UserWarning, match=r"no recall of the searcher was measured for tracin, graddot, cosine: .*label"
    ):
        index = tiny.build(task, tmp_path, searcher="faiss:Flat")
    assert index.manifest.searcher is not None
    assert index.manifest.searcher.recall == {}


def test_an_answer_carries_the_note_to_the_terminal(index: Index, capsys: pytest.CaptureFixture[str]) -> None:
    request = InfluenceRequest(query_rows=[0], k=40)
    (served,) = influence(index, [request], [0.0])
    assert isinstance(served, InfluenceAnswer)
    answer = InfluenceAnswer.model_validate_json(served.model_dump_json())
    note = answer.results[0].note
    assert note == index.influence(QUERIES[:1], k=40)[0].note
    assert note in answer.results[0]._repr_html_()
    print_answer(answer)
    assert "Note: only" in capsys.readouterr().out


def test_a_build_of_zero_gradients_is_told(tmp_path: Path) -> None:
    def flat_loss(model: nn.Module, batch: Any) -> Tensor:
        return model(batch[0]).sum(1) * 0.0

    with pytest.warns(UserWarning, match="gradients of all 40 training rows are zero"):
        index = tiny.build(PairTask(tiny.mlp, ROWS, flat_loss), tmp_path / "flat")
    message = zero_rows_message(index.contents.store, index.manifest)
    assert message is not None
    assert "gradients of all 40 training rows are zero" in message
    index = tiny.build(ClassTask(tiny.mlp, ROWS), tmp_path / "usual")
    assert zero_rows_message(index.contents.store, index.manifest) is None


@pytest.mark.parametrize("asked", [{}, {"method": "cosine"}, {"method": "repsim", "similarity": "l2"}], ids=str)
def test_deleted_rows_win_no_order(tmp_path: Path, asked: dict[str, Any]) -> None:
    task = ClassTask(tiny.mlp, ROWS)
    whole = tiny.build(task, tmp_path)
    scores, selfs = whole.scores(QUERIES, **asked), whole.self_influence(**asked)
    gone = sorted({int(scores[0].argmax()), int(scores[0].argmin()), int(selfs.argmax())})
    delete_rows(tmp_path / "index", gone)
    index = open_index(tmp_path / "index", task)
    scores, selfs = index.scores(QUERIES, **asked), index.self_influence(**asked)
    left = np.setdiff1d(np.arange(40), gone)
    for row in scores:
        tops = [np.argsort(-row)[:5], np.argsort(row)[::-1][:5], torch.from_numpy(row).topk(5).indices.numpy()]
        best = set(left[np.argsort(-row[left])[:5]])
        assert [set(top) for top in tops] == [best] * 3
        if asked.get("method") != "repsim":
            assert set(np.argsort(row)[:5]) == set(left[np.argsort(row[left])[:5]])
    for top in (
        np.argsort(-selfs)[:37],
        np.argsort(selfs)[::-1][:37],
        torch.from_numpy(selfs).topk(37).indices.numpy(),
    ):
        assert set(top[: len(left)]) <= set(left)
    assert set(np.flatnonzero(np.isneginf(selfs))) == set(gone)
