"""Last hidden representations: found, stored and kept through an index's life; and the methods that compare them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

import tiny
from gradtrace import Index, QueryError, RowFilter, StoreError, Task, TaskError, open_index
from gradtrace.models.representations import TASK_HOOK, find_representation
from gradtrace.store.manifest_file import read_manifest
from gradtrace_indexer import (
    add_checkpoints,
    append_rows,
    compact,
    delete_rows,
    fit_representer,
    prune,
    roll_back,
    verify,
)
from gradtrace_indexer.build import begin
from tiny import ClassTask, ValueTask

ROWS, QUERIES = [*tiny.classes(57), *tiny.classes(3)], tiny.classes(5, seed=5)  # the last three are the first again
Compare = Callable[[Tensor, Tensor], Tensor]

SIMILARITIES: dict[str, Compare] = {
    "cosine": lambda q, r: F.cosine_similarity(q[:, None], r[None], dim=2),
    "dot": lambda q, r: q @ r.T,
    "l2": lambda q, r: -torch.cdist(q, r).square(),
}


def hidden(task: Task, directory: Path, number: int, examples: list[Any]) -> Tensor:
    """What goes into the last layer of tiny's networks at a checkpoint. [n, 4] float64."""
    found = tiny.checkpoints(task, directory / "checkpoints", number)
    model = tiny.loaded(task, found[-1]).double()
    with torch.no_grad():
        return model[:-1](torch.stack([x for x, _ in examples]).double())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ClassTask, Index]:
    directory, task = tmp_path_factory.mktemp("representations"), ClassTask(tiny.mlp, ROWS)
    tiny.build(task, directory)
    fit_representer(directory / "index")
    return directory, task, open_index(directory / "index", task)


def agree(found: NDArray[np.float32], expected: Tensor) -> None:
    """Within the rounding of float16 rows."""
    np.testing.assert_allclose(found, expected.numpy(), rtol=2e-3, atol=2e-3 * float(expected.abs().max()) + 1e-9)


# repsim


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_similarities(run: tuple[Path, ClassTask, Index], similarity: str) -> None:
    directory, task, index = run
    compare, asked = SIMILARITIES[similarity], {"method": "repsim", "similarity": similarity}
    q, r = (hidden(task, directory, 2, examples) for examples in (QUERIES, ROWS))
    scores = index.scores(QUERIES, **asked)
    agree(scores, compare(q, r))
    agree(index.self_influence(**asked), compare(r, r).diagonal())
    for row, result in zip(scores, index.influence(QUERIES, k=60, **asked), strict=True):
        assert [hit.row for hit in result.proponents] == np.argsort(-row, kind="stable").tolist()
        assert [hit.row for hit in result.opponents] == np.argsort(row, kind="stable").tolist()
        assert result.exact
        assert all(hit.parts == {"2.pt": hit.score} for hit in result.proponents)


@pytest.mark.parametrize("asked", [*({"method": "repsim", "similarity": s} for s in SIMILARITIES),
                                   {"method": "representer"}], ids=str)  # fmt: skip
def test_questions(run: tuple[Path, ClassTask, Index], asked: dict[str, Any]) -> None:
    """Filters, means of several queries, percentiles, hypothetical rows, and the same answers alone."""
    _, _, index = run
    scores = index.scores(QUERIES, **asked)
    (mean,) = index.influence(QUERIES, k=3, aggregate="mean", include=["percentiles"], **asked)
    expected = scores.mean(0)
    np.testing.assert_allclose([hit.score for hit in mean.proponents], np.sort(expected)[:-4:-1], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose([hit.score for hit in mean.opponents], np.sort(expected)[:3], rtol=1e-4, atol=1e-6)
    assert all(hit.percentile is not None and hit.percentile > 90 for hit in mean.proponents)
    (found,) = index.influence(QUERIES[:1], k=2, filter=RowFilter(rows=[5, 9, 11]), **asked)
    assert {hit.row for hit in found.proponents + found.opponents} == {5, 9, 11}
    alone = [index.influence([query], k=4, **asked)[0] for query in QUERIES]
    for one, other in zip(index.influence(QUERIES, k=4, **asked), alone, strict=True):
        np.testing.assert_allclose([h.score for h in one.proponents], [h.score for h in other.proponents], rtol=1e-5)
    agree(scores[:, :7], torch.from_numpy(index.pairs(ROWS[:7], QUERIES, **asked)))


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"similarity": "euclid"}, "unknown similarity 'euclid'.*cosine, dot, l2"),
        ({"rescore": True}, "leave rescore out"),
        ({"include": ["layers"]}, "compares no gradients"),
        ({"checkpoints": ["1.pt"]}, "takes no checkpoints"),
        ({"k": 0}, "at least 1"),
    ],
)
def test_what_repsim_does_not_have(run: tuple[Path, ClassTask, Index], asked: dict[str, Any], words: str) -> None:
    with pytest.raises(QueryError, match=words):
        run[2].influence(QUERIES, method="repsim", **asked)


# representer


def test_representer_values_are_the_decomposition_of_the_refitted_layer(run: tuple[Path, ClassTask, Index]) -> None:
    """Theorem 3.1 of Yeh et al. 2018: over all rows they sum to the output for the class; and scikit-learn's layer."""
    linear = pytest.importorskip("sklearn.linear_model")
    directory, task, index = run
    entry = index.manifest.representer
    assert entry is not None
    assert entry.residual <= 1e-4
    r, q = (F.pad(hidden(task, directory, 2, rows), (0, 1), value=1.0) for rows in (ROWS, QUERIES))
    labels = np.array([y for _, y in ROWS])
    # (1/n) sum L + l2 |w|^2, as scikit-learn writes it: 1/2 |w|^2 + C sum L
    fit = linear.LogisticRegression(C=1 / (2 * 0.003 * 60), fit_intercept=False, tol=1e-10, max_iter=10_000)
    fit.fit(r.numpy(), labels)
    logits = q @ torch.from_numpy(fit.coef_).T
    for number in range(3):
        asked = [(x, number) for x, _ in QUERIES]
        agree(index.scores(asked, method="representer").sum(1), logits[:, number])
    slopes = (F.one_hot(torch.from_numpy(labels), 3) - (r @ torch.from_numpy(fit.coef_).T).softmax(1)) / (
        2 * 0.003 * 60
    )
    own = torch.tensor([y for _, y in QUERIES])
    agree(index.scores(QUERIES, method="representer"), slopes[:, own].T * (q @ r.T))
    agree(index.self_influence(method="representer"), slopes[range(60), labels] * r.square().sum(1))


def test_an_unlabelled_query_is_explained_for_its_predicted_class(run: tuple[Path, ClassTask, Index]) -> None:
    index = run[2]
    x = QUERIES[0][0]
    (result,) = index.influence([(x, None)], method="representer", k=3)
    assert result.prediction is not None
    (same,) = index.influence([(x, result.prediction)], method="representer", k=3)
    assert [hit.score for hit in result.proponents] == [hit.score for hit in same.proponents]


def test_a_query_of_an_unknown_class_is_refused(tmp_path: Path) -> None:
    """Also where the task's loss takes it."""

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1].clamp(max=2), reduction="none")

    task = ClassTask(tiny.mlp, ROWS, loss)
    tiny.build(task, tmp_path)
    fit_representer(tmp_path / "index")
    with pytest.raises(QueryError, match="classes 0 to 2"):
        open_index(tmp_path / "index", task).influence([(QUERIES[0][0], 7)], method="representer")


def test_representer_values_of_a_regression(tmp_path: Path) -> None:
    """Ridge regression in closed form."""
    rows, queries = tiny.values(40), tiny.values(4, seed=3)
    task = ValueTask(tiny.value_mlp, rows)
    tiny.build(task, tmp_path)
    fit_representer(tmp_path / "index", l2=0.01)
    index = open_index(tmp_path / "index", task)
    r, q = (F.pad(hidden(task, tmp_path, 2, some), (0, 1), value=1.0) for some in (rows, queries))
    y = torch.stack([value for _, value in rows]).double()
    weights = torch.linalg.solve(r.T @ r / 40 + 0.01 * torch.eye(5), r.T @ y / 40)
    scores = index.scores(queries, method="representer")
    agree(scores.sum(1), q @ weights)
    agree(scores, (y - r @ weights) / (0.01 * 40) * (q @ r.T))


def test_a_refit_of_other_rows_does_not_answer(tmp_path: Path) -> None:
    path, task = tmp_path / "index", ClassTask(tiny.mlp, ROWS[:30])
    index = tiny.build(task, tmp_path)
    assert "representer" not in index.methods
    with pytest.raises(QueryError, match="run `gradtrace representer`"):
        index.influence(QUERIES, method="representer")
    fit_representer(path)
    before = open_index(path, task)
    delete_rows(path, [3, 4])
    with pytest.raises(QueryError, match="on other rows"):
        open_index(path, task).scores(QUERIES, method="representer")
    fit_representer(path, l2=0.1)
    without = open_index(path, task).scores(QUERIES, method="representer")
    assert not without[:, [3, 4]].any()
    compact(path, progress=False)
    assert "representer" not in open_index(path, task).methods
    fit_representer(path, l2=0.1)
    np.testing.assert_allclose(open_index(path, task).scores(QUERIES, method="representer"), without, rtol=2e-3)
    append_rows(path, ClassTask(tiny.mlp, ROWS), progress=False)
    assert "representer" not in open_index(path, ClassTask(tiny.mlp, ROWS)).methods
    roll_back(path, 2)
    again = open_index(path, task)
    np.testing.assert_array_equal(
        again.scores(QUERIES, method="representer"), before.scores(QUERIES, method="representer")
    )
    assert verify(path, all_generations=True) == []
    prune(path)
    assert len(list((path / "representer").iterdir())) == 1


def test_refits_that_cannot_be(tmp_path: Path) -> None:
    task = ClassTask(tiny.mlp, ROWS[:9])
    tiny.build(task, tmp_path)
    with pytest.raises(StoreError, match="above zero"):
        fit_representer(tmp_path / "index", l2=0)
    sequence = ClassTask(Sequences, [(torch.randn(3, 5), y) for _, y in ROWS[:9]])
    tiny.build(sequence, tmp_path / "sequences")
    with pytest.raises(StoreError, match="define representation"):
        fit_representer(tmp_path / "sequences" / "index")


# How representations are found


class Sequences(nn.Module):
    """One vector for each position, whose outputs are averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).tanh()).mean(1)


class Repeated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x))


class MeanTask(ClassTask):
    def representation(self, model: nn.Module, batch: Any) -> Tensor:
        return model.first(batch[0]).tanh().mean(1)  # type: ignore[operator, no-any-return]


def test_models_without_one_vector_for_each_example(tmp_path: Path) -> None:
    rows = [(torch.randn(3, 5), y) for _, y in ROWS[:9]]
    index = tiny.build(ClassTask(Sequences, rows), tmp_path)
    assert index.manifest.representations is None
    with pytest.raises(QueryError, match=r"define representation\(self, model, batch\)"):
        index.influence(rows[:1], method="repsim")
    defined = tiny.build(MeanTask(Sequences, rows), tmp_path / "defined")
    entry = defined.manifest.representations
    assert entry is not None
    assert (entry.source, entry.dimensions) == (TASK_HOOK, 4)
    assert defined.influence(rows[4:5], method="repsim", k=1)[0].proponents[0].row == 4
    with pytest.raises(QueryError, match="put Task"):
        open_index(tmp_path / "defined" / "index", ClassTask(Sequences, rows)).scores(rows[:1], method="repsim")


def test_what_counts_as_the_last_layer() -> None:
    batch = (torch.randn(2, 5), torch.tensor([0, 1]))
    single = find_representation(ClassTask(lambda: nn.Linear(5, 3), ROWS), nn.Linear(5, 3), [batch])
    assert single is not None
    assert (single.source, single.dimensions) == ("", 5)
    assert find_representation(ClassTask(Repeated, ROWS), Repeated(), [batch]) is None
    convolution = nn.Sequential(nn.Unflatten(1, (1, 5)), nn.Conv1d(1, 3, 5))
    assert find_representation(ClassTask(lambda: convolution, ROWS), convolution, [batch]) is None


def test_representations_of_another_shape_are_refused() -> None:
    class Wrong(ClassTask):
        def representation(self, model: nn.Module, batch: Any) -> Tensor:
            return batch[0].sum(1)

    with pytest.raises(TaskError, match=r"gives \[2\] values.*return one vector for each"):
        find_representation(Wrong(tiny.mlp, ROWS), tiny.mlp(), [(torch.randn(2, 5), torch.tensor([0, 1]))])


# Through an index's life


def test_representations_follow_rows_and_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(begin, "_SHARD_ROWS", 8)
    path, task, few = tmp_path / "index", ClassTask(tiny.mlp, ROWS), ClassTask(tiny.mlp, ROWS[:40])
    tiny.build(few, tmp_path, batch_size=8)
    append_rows(path, task, progress=False)
    add_checkpoints(path, task, tiny.checkpoints(task, tmp_path / "checkpoints", 3), progress=False)
    manifest = read_manifest(path)
    assert {shard.checkpoint for shard in manifest.shards if shard.representations is not None} == {2}
    delete_rows(path, [0, 1, 41])
    before = open_index(path, task)
    scores = before.scores(QUERIES, method="repsim", similarity="dot")
    assert np.flatnonzero(np.isneginf(scores[0])).tolist() == [0, 1, 41]
    q, r = (hidden(task, tmp_path, 3, examples) for examples in (QUERIES, ROWS))
    left = np.isfinite(scores[0])
    agree(scores[:, left], (q @ r.T)[:, left])
    compact(path, progress=False)
    prune(path)
    assert verify(path) == []
    after = open_index(path, task)
    np.testing.assert_array_equal(after.scores(QUERIES, method="repsim", similarity="dot"), scores)
    np.testing.assert_array_equal(before.scores(QUERIES, method="repsim", similarity="dot"), scores)  # still open
    assert after.influence(QUERIES, method="repsim", k=60)[0].proponents[-1].row not in (0, 1, 41)


def test_damage_is_found(tmp_path: Path) -> None:
    task = ClassTask(tiny.mlp, ROWS)
    tiny.build(task, tmp_path)
    file = next((tmp_path / "index" / "representations").rglob("*.rows"))
    content = bytearray(file.read_bytes())
    content[5] ^= 1
    file.write_bytes(content)
    assert any("representations/2.pt" in problem for problem in verify(tmp_path / "index"))
