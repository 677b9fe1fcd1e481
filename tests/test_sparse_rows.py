"""Indexes of sparse rows: scores against whole gradients by autograd, and the index's life."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

import tiny
from gradtrace import CorruptIndexError, Index, LossError, QueryError, StoreError, Task, open_index
from gradtrace.errors import SharedPositionsError
from gradtrace.gradients.reference import gradients_reference
from gradtrace.methods import sparse_scoring
from gradtrace.models.full_gradients import full_gradients
from gradtrace.models.gradient_model import GradientModel
from gradtrace.sparse.defaults import default_rows
from gradtrace.sparse.strongest import StrongestOfEach
from gradtrace.sparse.vectors import SparseRows, SparseVectors
from gradtrace.store.manifest_file import read_manifest
from gradtrace_indexer import (
    add_checkpoints,
    add_kernels,
    append_rows,
    build_index,
    compact,
    delete_rows,
    set_searcher,
    verify,
)
from test_strongest import by_coordinate

Doubles = NDArray[np.float64]
RATES = (0.1, 0.05)


class Words(nn.Module):
    """Predicts each token from those before."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.words, self.mix, self.head = nn.Embedding(13, 6), nn.Linear(6, 6), nn.Linear(6, 13, bias=False)
        if tied:
            self.head.weight = self.words.weight

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.words(tokens)
        means = hidden.cumsum(1) / torch.arange(1, tokens.shape[1] + 1)[:, None]
        logits: Tensor = self.head(torch.tanh(self.mix(means)))
        return logits


class WordsTask(Task):
    def __init__(self, rows: int = 40, tied: bool = False, labelled: bool = False) -> None:
        self.tied = tied
        generator = torch.Generator().manual_seed(0)
        self.train = [torch.randint(13, (6,), generator=generator) for _ in range(rows)]

    def model(self) -> nn.Module:
        return Words(self.tied)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        logits = model(batch[:, :-1])
        return F.cross_entropy(logits.mT, batch[:, 1:], reduction="none").mean(1)


def build(task: Task, directory: Path, count: int = 2, **arguments: Any) -> Index:
    found = tiny.checkpoints(task, directory / "checkpoints", count)
    return build_index(task, found, directory / "index", progress=False, **{"rows": "sparse", **arguments})


class Reference:
    """Whole gradients by autograd in float64, and what the documentation says of sparse rows.

    gradients: at each checkpoint of all rows, then of the queries [examples, coordinates]
    whitening: at each checkpoint [coordinates]
    """

    def __init__(self, index: Index, task: Task, queries: list[Any], kept: int, query_kept: int = 4096) -> None:
        self.rows, self.kept, self.query_kept = len(task.train), kept, query_kept
        self.gradients, self.whitening, self.squares, self.means = [], [], [], []
        for model in index.contents.models:
            trained = model.task.model()
            trained.load_state_dict(model.model.state_dict())
            exact = gradients_reference(task, trained, [*task.train, *queries])
            gradients = by_coordinate(model, exact).numpy()
            squares = (gradients[: self.rows] ** 2).mean(0)
            sizes = [layer.size for layer in model.plan.layers]
            means = np.concatenate([np.full(len(v), v.mean()) for v in np.split(squares, np.cumsum(sizes)[:-1])])
            self.gradients.append(gradients)
            self.squares.append(squares)
            self.means.append(means)
            with np.errstate(divide="ignore"):
                self.whitening.append(np.where(means > 0, 1 / np.sqrt(squares + means), 0.0))

    def scores(self, factors: list[Doubles | float], normalized: bool = False) -> Doubles:
        """[queries, rows]"""
        total = np.zeros((len(self.gradients[0]) - self.rows, self.rows))
        squares = np.zeros(len(self.gradients[0]))
        for gradients, w, factor in zip(self.gradients, self.whitening, factors, strict=True):
            stored = strongest(gradients[: self.rows] * w, self.kept)
            with np.errstate(divide="ignore", invalid="ignore"):
                asked = np.where(w > 0, gradients[self.rows :] * factor / w, 0.0)
            total += strongest(asked, self.query_kept) @ stored.T
            squares += (gradients**2).sum(1)
        return total / np.sqrt(np.outer(squares[self.rows :], squares[: self.rows])) if normalized else total

    def inverse(self, damping: float) -> list[Doubles | float]:
        return [1 / (v + damping * m) for v, m in zip(self.squares, self.means, strict=True)]


def strongest(vectors: Doubles, count: int) -> Doubles:
    order = np.argsort(-np.abs(vectors), axis=1, kind="stable")[:, :count]
    cut = np.zeros_like(vectors)
    np.put_along_axis(cut, order, np.take_along_axis(vectors, order, axis=1), axis=1)
    return cut


def near(scores: NDArray[np.float32], exact: Doubles) -> None:
    """Up to the rounding of rows to 127 steps of their largest value."""
    assert scores.shape == exact.shape
    np.testing.assert_allclose(scores, exact, rtol=0, atol=0.02 * np.abs(exact).max())
    assert np.corrcoef(scores.ravel(), exact.ravel())[0, 1] > 0.999


@pytest.mark.parametrize("kept", [5, 20, 500])
@pytest.mark.parametrize("tied", [False, True])
def test_scores_are_those_of_the_strongest_whitened_coordinates(tmp_path: Path, kept: int, tied: bool) -> None:
    task = WordsTask(tied=tied)
    queries = [torch.tensor([1, 2, 3, 4, 5, 6]), torch.tensor([7, 7, 7, 0, 1, 12]), torch.tensor([0, 9, 9, 2, 2, 3])]
    index = build(task, tmp_path, dimensions=kept)
    reference = Reference(index, task, queries, kept)
    coordinates = reference.gradients[0].shape[1]
    assert index.manifest.basis.dimensions == min(kept, coordinates)
    assert {"tracin", "graddot", "cosine", "influence", "source"} <= set(index.methods)
    rates = list(RATES)
    near(index.scores(queries), reference.scores(rates))
    near(index.scores(queries, method="graddot"), reference.scores([0.0, 1.0]))
    near(index.scores(queries, method="influence"), reference.scores(reference.inverse(1.0)))
    near(index.scores(queries, method="influence", damping=0.1), reference.scores(reference.inverse(0.1)))
    last = index.manifest.checkpoints[-1].name
    inverse = reference.inverse(1.0)
    near(index.scores(queries, method="influence", checkpoints=[last]), reference.scores([0.0, inverse[1]]))
    # One segment a checkpoint, each of learning rates that sum to 1: exp(-x) and (1 - exp(-x)) / v, with x = v.
    first, second = reference.squares
    share = [-np.expm1(-v) / np.where(v > 0, v, 1) + (v == 0) for v in (first, second)]
    near(index.scores(queries, method="source"), reference.scores([np.exp(-second) * share[0], share[1]]))
    only_last = Reference(index, task, queries, kept)
    for kind in (only_last.gradients, only_last.whitening, only_last.squares, only_last.means):
        del kind[0]
    near(index.scores(queries, method="cosine"), only_last.scores([1.0], normalized=True))


def test_all_coordinates_give_the_uncompressed_scores(tmp_path: Path) -> None:
    task = tiny.ClassTask(tiny.mlp, tiny.classes(30))
    index = build(task, tmp_path, dimensions=10_000)
    queries = tiny.classes(4, seed=1)
    reference = Reference(index, task, queries, 10_000)
    exact = sum(rate * g[30:] @ g[:30].T for rate, g in zip(RATES, reference.gradients, strict=True))
    near(index.scores(queries), np.asarray(exact))
    np.testing.assert_allclose(
        index.influence(queries, k=3, rescore=True)[0].proponents[0].score,
        exact[0].max(),
        rtol=1e-4,
    )


def test_a_query_is_cut_to_its_strongest_coordinates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_scoring, "QUERY_COORDINATES", 15)
    task, queries = WordsTask(), [torch.tensor([1, 2, 3, 4, 5, 6]), torch.tensor([7, 7, 7, 0, 1, 12])]
    index = build(task, tmp_path, dimensions=20)
    reference = Reference(index, task, queries, 20, query_kept=15)
    near(index.scores(queries, method="influence"), reference.scores(reference.inverse(1.0)))


def test_examples_that_share_positions_are_differentiated_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a router sends tokens of several examples to one expert together."""
    task, queries = WordsTask(12), [torch.tensor([1, 2, 3, 4, 5, 6]), torch.tensor([7, 7, 7, 0, 1, 12])]
    index = build(task, tmp_path / "together", dimensions=20)
    expected = index.scores(queries, method="influence"), index.pairs(task.train[:3], queries)

    def refuses_batches(model: GradientModel, batch: Any, measure: Any = None) -> Any:
        if len(batch) > 1:
            raise SharedPositionsError("a position is of several examples")
        return full_gradients(model, batch, measure)

    monkeypatch.setattr("gradtrace.sparse.strongest.full_gradients", refuses_batches)
    alone = build(task, tmp_path / "alone", dimensions=20)
    for scores, wanted in zip(
        (alone.scores(queries, method="influence"), alone.pairs(task.train[:3], queries)), expected, strict=True
    ):
        np.testing.assert_allclose(scores, wanted, rtol=0, atol=0.01 * np.abs(wanted).max())


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Index, WordsTask, Path]:
    directory, task = tmp_path_factory.mktemp("small"), WordsTask()
    return build(task, directory, dimensions=20), task, directory


QUERIES = [torch.tensor([1, 2, 3, 4, 5, 6]), torch.tensor([7, 7, 7, 0, 1, 12])]


def test_answers_have_what_dense_ones_have(small: tuple[Index, WordsTask, Path]) -> None:
    index, _, _ = small
    for method in ("tracin", "influence", "cosine"):
        scores = index.scores(QUERIES, method=method)
        answers = index.influence(
            QUERIES, k=4, method=method, include=["layers", "percentiles", "histogram", "clusters"]
        )
        for row_scores, answer in zip(scores, answers, strict=True):
            best, worst = tiny.ends(row_scores, 4)
            assert [hit.row for hit in answer.proponents] == best
            assert [hit.row for hit in answer.opponents] == worst
            assert answer.exact
            assert answer.rows_searched == 40
            for hit in [*answer.proponents, *answer.opponents]:
                assert hit.layers is not None
                assert set(hit.layers) == {"words", "mix", "head"}
                assert sum(hit.layers.values()) == pytest.approx(hit.score, rel=1e-4, abs=1e-6)
                assert sum(hit.parts.values()) == pytest.approx(hit.score, rel=1e-4)
                below = 100 * (row_scores < hit.score).mean()
                assert hit.percentile == pytest.approx(below, abs=100 / 40 + 1e-9)
                assert hit.cluster == hit.row
    allowed = index.influence(QUERIES, k=3, filter={"rows": [3, 5, 8]})
    assert {hit.row for answer in allowed for hit in [*answer.proponents, *answer.opponents]} <= {3, 5, 8}
    (mean,) = index.influence(QUERIES, k=4, aggregate="mean", method="influence")
    expected = index.scores(QUERIES, method="influence").mean(0)
    assert [hit.row for hit in mean.proponents] == tiny.ends(expected, 4)[0]
    assert mean.proponents[0].score == pytest.approx(expected.max(), rel=1e-4)


def test_near_duplicates_share_a_cluster(tmp_path: Path) -> None:
    task = WordsTask(10)
    task.train += [task.train[3], task.train[3]]
    index = build(task, tmp_path, dimensions=20)
    (answer,) = index.influence([task.train[3]], k=3, include=["clusters"], method="influence")
    assert {hit.row for hit in answer.proponents} == {3, 10, 11}
    assert {hit.cluster for hit in answer.proponents} == {answer.proponents[0].row}


def test_self_influence_pairs_and_removal(small: tuple[Index, WordsTask, Path]) -> None:
    index, task, _ = small
    reference = Reference(index, task, QUERIES, 20)
    exact = sum(rate * (g[:40] ** 2).sum(1) for rate, g in zip(RATES, reference.gradients, strict=True))
    np.testing.assert_allclose(index.self_influence(), exact, rtol=1e-3)  # from the whole gradients' norms
    stored = [strongest(g[:40] * w, 20) for g, w in zip(reference.gradients, reference.whitening, strict=True)]
    own = sum((s**2).sum(1) for s in stored)  # at the damping of the rows the factors are those of the whitening
    np.testing.assert_allclose(index.self_influence(method="influence"), own, rtol=0.02)
    assert (index.self_influence(method="cosine") == 1).all()
    for method in ("tracin", "influence", "cosine"):
        scores, some = index.scores(QUERIES, method=method), [0, 7, 31]
        pairs = index.pairs([task.train[row] for row in some], QUERIES, method=method)
        np.testing.assert_allclose(pairs, scores[:, some], atol=0.02 * np.abs(scores).max())
    removed = index.removal([1, 2, 3], QUERIES, method="influence")
    sums = index.scores(QUERIES, method="influence")[:, [1, 2, 3]].sum(1)
    assert [effect.score_sum for effect in removed] == pytest.approx(sums.tolist(), rel=1e-4)
    changes = [effect.predicted_change for effect in removed]
    assert changes == pytest.approx((sums / 40 / 2).tolist(), rel=1e-4)


def test_it_lives_as_dense_indexes_do(tmp_path: Path) -> None:
    """Built at once, or in steps: the same answers; deleted rows are never found, and compaction changes nothing."""
    task, grown = WordsTask(30), WordsTask(40)
    assert all(torch.equal(a, b) for a, b in zip(task.train, grown.train, strict=False))
    checkpoints = tiny.checkpoints(task, tmp_path / "checkpoints", 3)
    path = tmp_path / "index"
    build_index(task, checkpoints[:2], path, rows="sparse", dimensions=20, progress=False)
    append_rows(path, grown, progress=False)
    add_checkpoints(path, grown, checkpoints, progress=False)
    delete_rows(path, [0, 17, 35])
    index = open_index(path, grown)
    scores = index.scores(QUERIES, method="influence")
    answers = index.influence(QUERIES, k=40, method="influence")
    assert not {0, 17, 35} & {hit.row for answer in answers for hit in [*answer.proponents, *answer.opponents]}
    assert len(index.contents.store.segments(0)) == 2  # type: ignore[union-attr]
    compact(path, progress=False)
    after = open_index(path, grown)
    assert len(after.contents.store.segments(0)) == 1  # type: ignore[union-attr]
    np.testing.assert_array_equal(after.scores(QUERIES, method="influence"), scores)
    np.testing.assert_array_equal(after.self_influence(method="influence"), index.self_influence(method="influence"))
    assert verify(path, all_generations=True, progress=False) == []


def test_an_interrupted_build_resumes_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = WordsTask()
    monkeypatch.setattr("gradtrace_indexer.build.begin.default_segment_rows", lambda count: 15)
    build(task, tmp_path / "whole", dimensions=20, batch_size=8)
    encode, calls_left = GradientModel.backpropagate, [0]

    def killed(self: GradientModel, *arguments: Any) -> Tensor:
        calls_left[0] -= 1
        if not calls_left[0]:
            raise KeyboardInterrupt
        return encode(self, *arguments)

    for calls in range(2, 12, 3):
        shutil.rmtree(tmp_path / "broken", ignore_errors=True)
        calls_left[0] = calls
        monkeypatch.setattr(GradientModel, "backpropagate", killed)
        with pytest.raises(KeyboardInterrupt):
            build(task, tmp_path / "broken", dimensions=20, batch_size=8)
        monkeypatch.setattr(GradientModel, "backpropagate", encode)
        build(task, tmp_path / "broken", dimensions=20, batch_size=8)
        names = [path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole/index").rglob("*.rows")]
        assert len(names) == 6
        for name in names:
            assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("fault", ["a layer is missing", "rows depend on their batch"])
def test_rows_that_are_not_their_gradients_are_not_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    right = StrongestOfEach.encode

    def wrong(self: StrongestOfEach, model: GradientModel, batch: Any, measure: Any) -> Any:
        rows, losses = right(self, model, batch, measure)
        values = rows.vectors.values.copy()
        if fault == "a layer is missing":
            values[rows.vectors.coordinates < 13 * 6] = 0
        else:
            values *= 1 + 0.1 * len(batch)
        return SparseRows(SparseVectors(rows.vectors.coordinates, values), rows.norms), losses

    monkeypatch.setattr(StrongestOfEach, "encode", wrong)
    with pytest.raises(LossError, match="another gradient in a batch than alone"):
        build(WordsTask(), tmp_path, dimensions=60)


def test_bad_rows_are_zeros_that_are_never_found(tmp_path: Path) -> None:
    task = tiny.ClassTask(tiny.mlp, tiny.classes(20))
    task.train[6] = (torch.full((5,), float("nan")), 1)
    with pytest.raises(LossError, match=r"row\(s\) 6"):
        build(task, tmp_path / "refused", dimensions=10)
    index = build(task, tmp_path, dimensions=10, skip_bad_rows=True)
    assert not index.present[6]
    assert not index.scores(tiny.classes(2, seed=1))[:, 6].any()


def test_what_does_not_go_with_sparse_rows_is_refused_in_words(
    small: tuple[Index, WordsTask, Path], tmp_path: Path
) -> None:
    index, task, directory = small
    for options, words in (
        ({"basis": "spectral"}, "sparse rows have no basis"),
        ({"precision": "float16"}, "stored as int8"),
        ({"searcher": "annoy:10"}, "no other searcher"),
        ({"dimensions": 0}, "at least 1"),
        ({"rows": "thin"}, "one of dense, sparse"),
        ({"rows": None, "basis": "sparse"}, 'build with rows="sparse"'),
    ):
        with pytest.raises(StoreError, match=words):
            build(task, tmp_path, **options)  # type: ignore[arg-type]
    assert not (tmp_path / "index").exists()
    with pytest.raises(StoreError, match="its rows are sparse"):
        add_kernels(directory / "index", progress=False)
    with pytest.raises(StoreError, match="their search is exact"):
        set_searcher(directory / "index", task, "annoy:10", progress=False)
    for method in ("trak", "hydra"):
        with pytest.raises(QueryError, match="its rows are sparse"):
            index.influence(QUERIES, method=method)
    with pytest.raises(StoreError, match="another index"):
        build(task, directory, rows="dense")


@pytest.fixture
def damaged(small: tuple[Index, WordsTask, Path], tmp_path: Path) -> tuple[Path, WordsTask]:
    _, task, directory = small
    shutil.copytree(directory, tmp_path / "copy")
    return tmp_path / "copy" / "index", task


@pytest.mark.parametrize("kind", ["rows", "curvature", "bases", "columns"])
def test_damage_is_found(damaged: tuple[Path, WordsTask], kind: str) -> None:
    path, task = damaged
    name = next(iter(sorted((path / kind).rglob("*.*"))))
    name = name if name.is_file() else next(file for file in sorted(name.rglob("*")) if file.is_file())
    content = bytearray(name.read_bytes())
    content[len(content) // 2] ^= 0x41
    name.write_bytes(content)
    with pytest.raises(CorruptIndexError, match="damaged"):
        open_index(path, task)
    assert verify(path, progress=False)
    name.write_bytes(content[:-8])
    with pytest.raises(CorruptIndexError):
        open_index(path, task, verify=False)


def test_models_that_predict_the_tokens_they_read_get_sparse_rows(tmp_path: Path) -> None:
    assert default_rows(WordsTask()) == default_rows(WordsTask(tied=True)) == "sparse"
    assert default_rows(tiny.ClassTask(tiny.mlp, [])) == "dense"

    class Frozen(WordsTask):
        def model(self) -> nn.Module:
            model = super().model()
            model.get_submodule("words").requires_grad_(False)
            return model

    assert default_rows(Frozen()) == "dense"
    task = WordsTask(12)
    found = tiny.checkpoints(task, tmp_path / "checkpoints", 1)
    index = build_index(task, found, tmp_path / "index", progress=False)
    assert read_manifest(tmp_path / "index").basis.kind == "sparse"
    assert "1 checkpoints x" in repr(index)
    dense = build_index(task, found, tmp_path / "dense", rows="dense", dimensions=32, progress=False)
    assert dense.manifest.basis.kind == "gauss-newton"
