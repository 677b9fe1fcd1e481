"""Gauss-Newton coordinates against matrices by autograd in float64, closed forms, and sums written down once more."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

import tiny
from damaged_index import seal
from gradtrace import (
    Checkpoint,
    CheckpointRecorder,
    CorruptIndexError,
    Index,
    gradients_reference,
    load_checkpoints,
    open_index,
)
from gradtrace.errors import StoreError
from gradtrace.fitted import gauss_newton
from gradtrace.fitted.gauss_newton import SecondMoments, coordinates_before, leading_eigenvectors, rotation
from gradtrace.models.gradient_model import GradientModel
from gradtrace.models.loss_output import loss_output
from gradtrace.store.index_files import hash_file
from gradtrace.store.manifest import Output
from gradtrace_indexer import add_checkpoints, append_rows, build_index, compact, delete_rows, verify
from tiny import ClassTask, PairTask, ValueTask

CPU = torch.device("cpu")
ROWS, QUERIES = tiny.classes(60), tiny.classes(5, seed=5)
LARGE = 1100  # more than are decomposed in full
ALL = 1000  # dimensions: more than the small models have
Loss = Callable[[Tensor, Tensor], Tensor]


# The matrix of the rows


def matrix(rows: Tensor, losses: Tensor, output: Output | None, batch: int = 1000, seed: int = 0) -> Tensor:
    """K of rows [n, coordinates] that come in batches. [coordinates, coordinates]."""
    moments = SecondMoments(rows.shape[1], len(rows), output, CPU, seed, stream=3)
    for part, part_losses in zip(rows.split(batch), losses.split(batch), strict=True):
        moments.add(part.float(), part_losses)
    return moments.total().double() / moments.count


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    assert (found.double() - expected.double()).norm() <= tolerance * expected.double().norm()


def log_odds(model: nn.Module, batch: Any) -> Tensor:
    """Of the label's class."""
    logits, label = model(batch[0]), (batch[1][:, None] == torch.arange(3)).to(batch[0].dtype)
    return (logits * label).sum(1) - (logits - 1e9 * label).logsumexp(1)


def one_checkpoint(task: PairTask, directory: Path) -> nn.Module:
    return tiny.loaded(task, tiny.checkpoints(task, directory, 1)[0])


def test_of_a_classifier_it_is_the_gauss_newton_matrix_of_the_log_odds(tmp_path: Path) -> None:
    rows = ROWS[:30]  # no more than the 39 coordinates: all count
    task = ClassTask(tiny.mlp, rows)
    model = one_checkpoint(task, tmp_path).double()
    phi = tiny.flat(gradients_reference(task, model, rows, log_odds))
    gradients = tiny.flat(gradients_reference(task, model, rows))
    labels, inputs = torch.tensor([label for _, label in rows]), torch.stack([x for x, _ in rows]).double()
    p = model(inputs).softmax(1).gather(1, labels[:, None])[:, 0].detach()
    close(matrix(gradients, -p.log(), "log odds"), (phi * (p * (1 - p))[:, None]).T @ phi / 30)


@pytest.mark.parametrize("c", [0.5, 1.0, 3.0])
def test_of_a_squared_error_it_is_2_c_phi_phi(tmp_path: Path, c: float) -> None:
    rows = tiny.values(20)
    task = ValueTask(tiny.value_mlp, rows)
    task.c = c
    model = one_checkpoint(task, tmp_path).double()
    phi = tiny.flat(gradients_reference(task, model, rows, task.predict))
    gradients = tiny.flat(gradients_reference(task, model, rows))
    inputs, labels = (torch.stack(side).double() for side in zip(*rows, strict=True))
    losses = task.loss(model, (inputs, labels)).detach()
    close(matrix(gradients, losses, "value"), 2 * c * phi.T @ phi / len(rows))


def test_of_other_losses_it_is_the_mean_of_squared_gradients() -> None:
    torch.manual_seed(0)
    rows, losses = torch.randn(9, 9), torch.randn(9)  # a loss may be below zero
    close(matrix(rows, losses, None), rows.double().T @ rows.double() / 9)


def test_losses_of_zero_and_huge_ones_add_nothing_and_no_nan() -> None:
    rows, losses = torch.ones(4, 4), torch.tensor([0.0, 1e4, 0.5, 0.5])
    rows[0] = 0
    weight = 1 / np.expm1(0.5)
    close(matrix(rows, losses, "log odds"), torch.full((4, 4), 2 * weight / 4))
    close(matrix(rows, losses.clamp_max(0.5), "value"), torch.full((4, 4), 3 / 4))
    for output in ("log odds", "value", None):
        for count in (1, 4, 50):
            zero = matrix(torch.zeros(count, 4), torch.zeros(count), output)  # type: ignore[arg-type]
            assert torch.equal(zero, torch.zeros(4, 4).double())


# Which rows are in it


@pytest.fixture
def _few_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as there are coordinates."""
    monkeypatch.setattr(gauss_newton, "_FEWEST_DRAWN", 1)
    monkeypatch.setattr(gauss_newton, "_FIRST_ROWS", 3)


def uneven(count: int, coordinates: int) -> tuple[Tensor, Tensor]:
    """Rows whose squared norms span five orders of magnitude, and losses."""
    torch.manual_seed(1)
    return torch.randn(count, coordinates) * torch.logspace(-2.5, 0, count)[torch.randperm(count), None], torch.rand(
        count
    )


@pytest.mark.usefixtures("_few_are_drawn")
def test_drawn_rows_give_the_matrix_in_expectation() -> None:
    rows, losses = uneven(60, 6)
    weighted = rows.double() * (1 / losses.double().expm1())[:, None].sqrt()
    seeds = 400
    found = torch.stack([matrix(rows, losses, "log odds", seed=seed) for seed in range(seeds)])
    assert found.std(0).max() > 0  # not all are drawn
    error = (found.mean(0) - weighted.T @ weighted / 60).abs()
    assert (error <= 5 * found.std(0) / seeds**0.5 + 1e-6 * found.abs().max()).all()


@pytest.mark.usefixtures("_few_are_drawn")
def test_all_rows_are_taken_where_there_are_no_more_than_coordinates() -> None:
    rows, losses = uneven(6, 6)
    for seed in range(5):
        close(matrix(rows, losses, None, seed=seed), rows.double().T @ rows.double() / 6, 1e-6)


@pytest.mark.usefixtures("_few_are_drawn")
def test_a_row_with_most_of_the_energy_is_always_in_it() -> None:
    rows, losses = uneven(200, 5)
    for place in (0, 2, 120):  # also where no mean is known yet
        rows[:, 4] = 0
        rows[place] = torch.tensor([0.0, 0, 0, 0, 100])
        for seed in range(20):
            assert float(matrix(rows, losses, None, seed=seed)[4, 4]) == pytest.approx(100**2 / 200, rel=1e-5)


def test_more_coordinates_than_can_be_rotated_are_refused() -> None:
    gauss_newton.check_rotation(gauss_newton.coordinates_before(8_192))
    with pytest.raises(StoreError, match=r"at most 8,192 dimensions.*not 9,000: .*basis='spectral'"):
        gauss_newton.check_rotation(gauss_newton.coordinates_before(9_000))


@pytest.mark.usefixtures("_few_are_drawn")
@pytest.mark.parametrize("batch", [1, 7, 59])
def test_draws_do_not_depend_on_the_batch(batch: int) -> None:
    rows, losses = uneven(60, 6)
    for seed in range(10):
        close(matrix(rows, losses, "value", batch, seed), matrix(rows, losses, "value", 60, seed), 1e-5)


def test_of_few_coordinates_thousands_of_rows_are_taken() -> None:
    """All that there are, or about 4,096."""
    torch.manual_seed(0)
    rows = torch.randn(20_000, 2)
    exact = rows[:4096].double().T @ rows[:4096].double() / 4096
    close(matrix(rows[:4096], torch.ones(4096), None), exact, 1e-5)
    found = torch.stack([matrix(rows, torch.ones(20_000), None, seed=seed) for seed in range(20)])
    spread = float(found.diagonal(dim1=1, dim2=2).sum(1).std())  # of a mean over 4,096 drawn rows
    assert 0 < spread < 4 * 2 / 4096**0.5


def test_large_blocks_are_added_up(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, losses = uneven(50, 50)
    monkeypatch.setattr(gauss_newton, "_BLOCK_VALUES", 64)
    close(matrix(rows, losses, None, 3), rows.double().T @ rows.double() / 50, 1e-5)


# The rotation


def symmetric(size: int, decay: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A matrix with eigenvalues 1, decay, decay^2, ... and its eigenvectors as columns. float32, float64"""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
    return ((vectors * decay ** torch.arange(size)) @ vectors.T).float(), vectors


def is_orthonormal_in_order(vectors: Tensor, total: Tensor) -> None:
    """And the matrix is diagonal there."""
    count = vectors.shape[1]
    assert vectors.dtype == torch.float32
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(count), atol=1e-4, rtol=0)
    inside = vectors.double().T @ total.double() @ vectors.double()
    energies = inside.diagonal()
    scale = float(energies.max())
    assert (energies[1:] <= energies[:-1] + 1e-5 * scale).all()
    assert (inside - energies.diag()).abs().max() <= 1e-4 * scale


def test_the_rotation_is_that_of_the_sum_of_matrices_of_trace_one() -> None:
    """Their sizes do not count, and a zero one adds nothing."""
    (first, _), (second, _) = symmetric(30, 0.7), symmetric(30, 0.6, seed=1)
    found = rotation(iter([1e4 * first, torch.zeros(30, 30), 1e-4 * second]), 12)
    total = first.double() / first.double().trace() + second.double() / second.double().trace()
    is_orthonormal_in_order(found, total)
    expected = np.linalg.eigh(total.numpy())[1][:, ::-1][:, :12]
    np.testing.assert_allclose(np.abs(expected.T @ found.double().numpy()), np.eye(12), atol=1e-3)


def test_all_vectors_of_a_small_matrix_are_given() -> None:
    total, vectors = symmetric(20, 0.7)
    found = leading_eigenvectors(total, 20)
    is_orthonormal_in_order(found, total)
    assert (vectors.T @ found.double())[:8, :8].abs().diagonal() == pytest.approx(np.ones(8), abs=1e-3)


def test_the_leading_vectors_of_a_large_matrix_are_found_by_iteration() -> None:
    total, vectors = symmetric(LARGE, 0.9)
    found = leading_eigenvectors(total, 40)
    is_orthonormal_in_order(found, total)
    overlap = (vectors[:, :20].T @ found[:, :20].double()).abs()
    torch.testing.assert_close(overlap, torch.eye(20).double(), atol=0.05, rtol=0)
    captured = float((found.double().T @ total.double() @ found.double()).trace())
    assert captured >= 0.995 * float((0.9 ** torch.arange(40)).sum())


@pytest.mark.parametrize("size", [20, LARGE])
def test_where_no_row_has_a_gradient_the_rotation_is_still_one(size: int) -> None:
    is_orthonormal_in_order(rotation([torch.zeros(size, size)], 10), torch.zeros(size, size))


def test_a_large_matrix_of_low_rank_still_gives_orthonormal_vectors() -> None:
    torch.manual_seed(0)
    rows = torch.randn(5, LARGE)
    found = leading_eigenvectors(rows.T @ rows, 20)
    torch.testing.assert_close(found.T @ found, torch.eye(20), atol=1e-4, rtol=0)
    close((rows @ found).norm(), rows.norm())


@pytest.mark.parametrize(("dimensions", "coordinates"), [(1, 8), (64, 512), (512, 4096), (1024, 4096), (4096, 8192)])
def test_how_many_coordinates_are_rotated(dimensions: int, coordinates: int) -> None:
    assert coordinates_before(dimensions) == coordinates


# What a loss is of


def task_with(rows: Sequence[Any], make: Callable[[], nn.Module], loss: Loss, predicts: bool = False) -> PairTask:
    kind = ClassTask if predicts else PairTask
    return kind(make, rows, lambda model, batch: loss(model(batch[0]), batch[1]))


def values_task(loss: Loss, make: Callable[[], nn.Module] = tiny.value_mlp) -> PairTask:
    return task_with(tiny.values(40), make, lambda outputs, y: loss(outputs.flatten(), y))


def by_hand(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.logsumexp(1) - (logits * F.one_hot(labels, 3)).sum(1)


def positions() -> nn.Module:
    """Logits [batch, 3 classes, 2 positions]."""
    return nn.Sequential(nn.Linear(5, 6), nn.Unflatten(1, (3, 2)))


def cross_entropy(**settings: Any) -> Loss:
    return lambda logits, labels: F.cross_entropy(logits, labels, reduction="none", **settings)


def squared(factor: float = 1.0) -> Loss:
    return lambda values, y: factor * F.mse_loss(values, y, reduction="none")


BINARY = [(x, float(label > 0)) for x, label in ROWS]
PAIRS = [(x, torch.tensor([label, (label + 1) % 3])) for x, label in ROWS]
TWO_VALUES = [(x, x[:2]) for x, _ in ROWS]
one_logit = tiny.value_mlp

OUTPUTS: dict[str, tuple[Output | None, Callable[[], PairTask]]] = {
    "cross entropy": ("log odds", lambda: task_with(ROWS, tiny.mlp, cross_entropy())),
    "cross entropy with predict": ("log odds", lambda: task_with(ROWS, tiny.mlp, cross_entropy(), predicts=True)),
    "nll of log-probabilities": (
        "log odds",
        lambda: task_with(ROWS, tiny.mlp, lambda z, y: F.nll_loss(z.log_softmax(1), y, reduction="none")),
    ),
    "binary, logits": (
        "log odds",
        lambda: task_with(
            BINARY,
            one_logit,
            lambda z, y: F.binary_cross_entropy_with_logits(z.flatten(), y.float(), reduction="none"),
        ),
    ),
    "binary, probabilities": (
        "log odds",
        lambda: task_with(
            BINARY,
            one_logit,
            lambda z, y: F.binary_cross_entropy(z.flatten().sigmoid(), y.float(), reduction="none"),
        ),
    ),
    "by hand with predict": ("log odds", lambda: task_with(ROWS, tiny.mlp, by_hand, predicts=True)),
    "squared error": ("value", lambda: values_task(squared())),
    "half a squared error": ("value", lambda: values_task(squared(0.5))),
    "many squared errors": ("value", lambda: values_task(squared(37.0))),
    "squared error by hand": ("value", lambda: values_task(lambda z, y: 3 * (z - y).square())),
    "squared error by hand with predict": ("value", lambda: ValueTask(tiny.value_mlp, tiny.values(40))),
    "in a small unit": ("value", lambda: values_task(squared(1e-8))),
    "twice the cross entropy": (None, lambda: task_with(ROWS, tiny.mlp, lambda z, y: 2 * cross_entropy()(z, y))),
    "label smoothing": (None, lambda: task_with(ROWS, tiny.mlp, cross_entropy(label_smoothing=0.1))),
    "class weights": (
        None,
        lambda: task_with(ROWS, tiny.mlp, cross_entropy(weight=torch.tensor([1.0, 2.0, 3.0]))),
    ),
    "two labels": (None, lambda: task_with(PAIRS, positions, lambda z, y: cross_entropy()(z, y).mean(1))),
    "two squared errors": (
        None,
        lambda: task_with(TWO_VALUES, lambda: nn.Linear(5, 2), lambda z, y: squared()(z, y).mean(1)),
    ),
    "absolute error": (None, lambda: values_task(lambda z, y: F.l1_loss(z, y, reduction="none"))),
    "Huber": (None, lambda: values_task(lambda z, y: F.huber_loss(z, y, reduction="none", delta=0.1))),
    "further terms": (
        None,
        lambda: task_with(ROWS, tiny.mlp, lambda z, y: cross_entropy()(z, y) + z.square().mean(1) / 10),
    ),
    "further terms, squared": (None, lambda: values_task(lambda z, y: squared()(z, y) + z.abs())),
    "further terms, in a small unit": (None, lambda: values_task(lambda z, y: 1e-8 * (squared()(z, y) + z.abs()))),
    "focal": (
        None,
        lambda: task_with(
            ROWS, tiny.mlp, lambda z, y: (1 - (-cross_entropy()(z, y)).exp()) ** 2 * cross_entropy()(z, y)
        ),
    ),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_what_a_loss_is_of_is_seen_from_losses(name: str, tmp_path: Path) -> None:
    expected, make = OUTPUTS[name]
    task = make()
    examples = [task.train[row] for row in range(40)]
    (checkpoint,) = tiny.checkpoints(task, tmp_path, 1)
    assert loss_output(GradientModel(task, checkpoint, CPU, examples[:8]), examples) == expected


def test_the_manifest_says_it(tmp_path: Path) -> None:
    for name, words in (
        ("cross entropy", "Gauss-Newton matrix: of the log odds of each row's label"),
        ("half a squared error", "Gauss-Newton matrix: of the predicted values"),
        ("Huber", "empirical Fisher information, with the rows' own labels: the loss is neither"),
    ):
        output, make = OUTPUTS[name]
        fisher = tiny.build(make(), tmp_path / name, basis="gauss-newton", dimensions=8).manifest.fisher
        assert fisher is not None
        assert (fisher.source, fisher.output) == ("rows", output)
        assert fisher.sentence.startswith(words)


# An index


def built(task: PairTask, directory: Path, count: int = 2, dimensions: int = ALL, **arguments: Any) -> Index:
    return tiny.build(task, directory, count, basis="gauss-newton", dimensions=dimensions, **arguments)


def mlp_task(rows: Sequence[Any] = ROWS) -> ClassTask:
    return ClassTask(tiny.mlp, list(rows))


def test_it_is_the_default(tmp_path: Path) -> None:
    task = mlp_task()
    index = build_index(task, tiny.checkpoints(task, tmp_path), tmp_path / "index", dimensions=4, progress=False)
    assert index.manifest.basis.kind == "gauss-newton"
    assert (index.contents.bases[0].coordinates, index.contents.bases[0].dimensions) == (32, 4)


def test_tracin_is_unchanged_where_all_coordinates_are_kept(tmp_path: Path) -> None:
    rotated, plain = (
        tiny.build(mlp_task(), tmp_path / basis, basis=basis, dimensions=ALL) for basis in ("gauss-newton", "none")
    )
    expected = plain.scores(QUERIES)
    np.testing.assert_allclose(rotated.scores(QUERIES), expected, atol=2e-3 * float(np.abs(expected).max()))
    np.testing.assert_allclose(rotated.self_influence(), plain.self_influence(), rtol=2e-3)


def weights(index: Index, checkpoint: int) -> NDArray[np.float64]:
    """w of all stored rows, from their stored losses. [rows]"""
    return 1 / np.expm1(index.contents.store.columns(checkpoint)["loss"].astype(np.float64))


def mean_squares(index: Index, checkpoint: int, rows: Sequence[int]) -> NDArray[np.float64]:
    """Weighted, of these stored rows."""
    squares = tiny.stored(index)[:, checkpoint].double().square().numpy()
    return (weights(index, checkpoint)[rows] @ squares[rows]) / len(rows)  # type: ignore[no-any-return]


def test_stored_eigenvalues_are_weighted_mean_squares_of_the_stored_rows(tmp_path: Path) -> None:
    index = built(mlp_task(), tmp_path, dimensions=6, precision="int8")
    for checkpoint, curvature in enumerate(index.contents.curvature):
        expected = mean_squares(index, checkpoint, range(60))
        np.testing.assert_allclose(curvature.eigenvalues, expected, rtol=1e-5)
        np.testing.assert_allclose(curvature.means, np.full(6, expected.sum() / 39), rtol=1e-5)  # of 39 parameters


def test_eigenvalues_are_those_of_the_log_odds(tmp_path: Path) -> None:
    """By gradients of the log odds, which no row is one of."""
    index = built(mlp_task(), tmp_path)
    for checkpoint, curvature in enumerate(index.contents.curvature):
        model = index.contents.models[checkpoint]
        phi = model.encode(index.contents.bases[0], model.batch(ROWS), log_odds)[0].double().numpy()
        p = np.exp(-index.contents.store.columns(checkpoint)["loss"].astype(np.float64))
        expected = (p * (1 - p)) @ phi**2 / 60
        np.testing.assert_allclose(curvature.eigenvalues, expected, rtol=5e-3, atol=1e-5 * expected.max())


def test_appended_and_deleted_rows_do_not_count(tmp_path: Path) -> None:
    built(mlp_task(), tmp_path, dimensions=6)
    path, grown = tmp_path / "index", [*ROWS, *tiny.classes(20, seed=9)]
    append_rows(path, mlp_task(grown), progress=False)
    delete_rows(path, [3, 59, 65])
    three = tiny.checkpoints(mlp_task(), tmp_path / "checkpoints", 3)
    index = add_checkpoints(path, mlp_task(grown), three, progress=False)
    live = [row for row in range(60) if row not in (3, 59)]
    for checkpoint, rows in ((0, range(60)), (2, live)):
        expected = mean_squares(index, checkpoint, rows)
        np.testing.assert_allclose(index.contents.curvature[checkpoint].eigenvalues, expected, rtol=1e-5)
    compact(path, progress=False)
    four = tiny.checkpoints(mlp_task(), tmp_path / "checkpoints", 4)
    index = add_checkpoints(path, mlp_task(grown), four, progress=False)
    expected = mean_squares(index, 3, range(58))  # positions, after the compaction
    np.testing.assert_allclose(index.contents.curvature[3].eigenvalues, expected, rtol=1e-5)


def test_later_rows_and_checkpoints_use_the_stored_rotation(tmp_path: Path) -> None:
    built(mlp_task(), tmp_path, dimensions=6)
    path, grown = tmp_path / "index", [*ROWS, *tiny.classes(20, seed=9)]
    before = tiny.files(path / "bases")
    append_rows(path, mlp_task(grown), progress=False)
    three = tiny.checkpoints(mlp_task(), tmp_path / "checkpoints", 3)
    index = add_checkpoints(path, mlp_task(grown), three, progress=False)
    assert tiny.files(path / "bases") == before
    chosen = index.contents.bases[0]
    for checkpoint, model in enumerate(index.contents.models):
        rows = model.encode(chosen, model.batch(grown))[0]
        torch.testing.assert_close(tiny.stored(index)[:, checkpoint], rows, rtol=2e-3, atol=1e-4)


def test_rows_are_rotated_spectral_coordinates(tmp_path: Path) -> None:
    """Those of a spectral index of the same task, times the rotation, which is the eigenbasis of K there."""
    index = built(mlp_task(ROWS[:30]), tmp_path, dimensions=6)
    spectral = tiny.build(mlp_task(ROWS[:30]), tmp_path / "spectral", basis="spectral", dimensions=ALL)
    rotated = index.contents.bases[0].rotation
    assert rotated is not None
    total = torch.zeros(39, 39, dtype=torch.float64)
    for checkpoint in range(2):
        rows = tiny.stored(spectral)[:, checkpoint].double()
        close(tiny.stored(index)[:, checkpoint], rows @ rotated.double(), 2e-3)
        k = (rows.T * torch.from_numpy(weights(spectral, checkpoint))) @ rows
        total += k / k.trace()
    expected = np.linalg.eigh(total.numpy())[1][:, ::-1][:, :6]
    np.testing.assert_allclose(np.abs(expected.T @ rotated.double().numpy()), np.eye(6), atol=0.02)


def test_shares_by_layer_are_the_products_of_their_gradients(tmp_path: Path) -> None:
    """Where nothing is cut off."""
    task = mlp_task()
    index = built(task, tmp_path)
    expected = {name: np.zeros((5, 60)) for name in ("0", "2")}
    for checkpoint in tiny.checkpoints(task, tmp_path / "checkpoints"):
        q, g = (gradients_reference(task, tiny.loaded(task, checkpoint), some) for some in (QUERIES, ROWS))
        for name, total in expected.items():
            for kind in ("weight", "bias"):
                a, b = (side[f"{name}.{kind}"].flatten(1).numpy() for side in (q, g))
                total += checkpoint.learning_rate * a @ b.T
    scale = sum(np.abs(total).max() for total in expected.values())
    for number, result in enumerate(index.influence(QUERIES, k=60, include=["layers"])):
        for hit in [*result.proponents, *result.opponents]:
            assert hit.layers is not None
            assert sum(hit.layers.values()) == pytest.approx(hit.score, rel=1e-4, abs=1e-5 * scale)
            for name, total in expected.items():
                assert hit.layers[name] == pytest.approx(total[number, hit.row], abs=2e-3 * scale)


@pytest.mark.parametrize("method", ["influence", "source", "tracin"])
def test_shares_by_layer_sum_to_the_score_where_most_is_cut_off(tmp_path: Path, method: str) -> None:
    index = built(mlp_task(), tmp_path, dimensions=3)
    for result in index.influence(QUERIES, k=60, method=method, include=["layers"]):
        hits = [*result.proponents, *result.opponents]
        scale = max(abs(share) for hit in hits for share in (hit.layers or {}).values())
        for hit in hits:
            assert sum((hit.layers or {}).values()) == pytest.approx(hit.score, rel=1e-4, abs=1e-5 * scale)


# Methods


def columns_of(index: Index, checkpoint: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Of the queries and of the stored rows at a checkpoint. [queries, D], [rows, D]."""
    model = index.contents.models[checkpoint]
    queries = model.encode(index.contents.bases[0], model.batch(QUERIES))[0]
    return queries.double().numpy(), tiny.stored(index)[:, checkpoint].double().numpy()


def test_influence_is_the_sum_over_all_checkpoints(tmp_path: Path) -> None:
    index = built(mlp_task(), tmp_path, count=3, dimensions=12)
    parts = []
    for checkpoint in range(3):
        eigenvalues = mean_squares(index, checkpoint, range(60))
        q, g = columns_of(index, checkpoint)
        parts.append((q / (eigenvalues + 0.3 * eigenvalues.sum() / 39)) @ g.T)
    for names, expected in ((None, sum(parts)), (["2.pt"], parts[1])):
        scores = index.scores(QUERIES, method="influence", damping=0.3, checkpoints=names)
        np.testing.assert_allclose(scores, expected, rtol=1e-3, atol=1e-4 * float(np.abs(expected).max()))
    (result,) = index.influence(QUERIES[:1], k=1, method="influence")
    assert set(result.proponents[0].parts) == {"1.pt", "2.pt", "3.pt"}


def test_source_takes_each_checkpoints_own_query(tmp_path: Path) -> None:
    index = built(mlp_task(), tmp_path, dimensions=12)
    first, second = (mean_squares(index, checkpoint, range(60)) for checkpoint in (0, 1))
    lengths = [0.1 * 10, 0.05 * 20]  # learning rate times steps
    ahead = np.exp(-lengths[1] * second)  # what the later segment leaves of the earlier one
    factors = [
        ahead * (1 - np.exp(-lengths[0] * first)) / first,
        (1 - np.exp(-lengths[1] * second)) / second,
    ]
    expected = np.zeros((5, 60))
    for checkpoint in (0, 1):
        q, g = columns_of(index, checkpoint)
        expected += (q * factors[checkpoint]) @ g.T
    scores = index.scores(QUERIES, method="source", segments=2)
    np.testing.assert_allclose(scores, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("damping", [1e-4, 0.1, 10.0])
def test_influence_on_a_linear_regression_is_the_closed_form(tmp_path: Path, damping: float) -> None:
    """With all rows and all coordinates the curvature is diagonal, so nothing is approximated."""
    rows = [(x * torch.tensor([1.0, 0.3, 2.0, 0.1, 0.6]), y) for x, y in tiny.values(80)]
    queries = tiny.values(7, seed=5)
    x, y = (torch.stack(side).double() for side in zip(*rows, strict=True))
    at, labels = (torch.stack(side).double() for side in zip(*queries, strict=True))
    hessian = 2 * x.T @ x / len(x)
    theta = torch.linalg.solve(hessian, 2 * x.T @ y / len(x))
    torch.save({"weight": theta[None].float()}, tmp_path / "1.pt")
    task = ValueTask(lambda: nn.Linear(5, 1, bias=False), rows)
    index = build_index(task, [Checkpoint(tmp_path / "1.pt", 1, 0.1)], tmp_path / "index", precision="float16",
                        progress=False)  # fmt: skip
    damped = hessian + damping * hessian.diagonal().mean() * torch.eye(5)
    q, g = 2 * (at @ theta - labels)[:, None] * at, 2 * (x @ theta - y)[:, None] * x
    expected = (q @ torch.linalg.solve(damped, g.T)).numpy()
    scores = index.scores(queries, method="influence", damping=damping)
    assert np.linalg.norm(scores - expected) <= 5e-3 * np.linalg.norm(expected)


# Little data, and little in it


@pytest.mark.parametrize("rows", [1, 2])
def test_very_few_rows(tmp_path: Path, rows: int) -> None:
    index = built(mlp_task(ROWS[:rows]), tmp_path, dimensions=8)
    for method in ("tracin", "influence", "source"):
        scores = index.scores(QUERIES, method=method)
        assert scores.shape == (5, rows)
        assert np.isfinite(scores).all()
    exact = tiny.build(mlp_task(ROWS[:rows]), tmp_path / "none").scores(QUERIES)
    np.testing.assert_allclose(index.scores(QUERIES), exact, atol=5e-3 * float(np.abs(exact).max()))


def test_one_parameter(tmp_path: Path) -> None:
    """Influence is q g / (lambda (1 + damping)), by hand."""
    rows = [(x[:1], y) for x, y in tiny.values(20)]
    task = ValueTask(lambda: nn.Linear(1, 1, bias=False), rows)
    index = built(task, tmp_path, count=1, dimensions=2048)
    assert index.manifest.basis.dimensions == 1
    model = one_checkpoint(task, tmp_path / "checkpoints")
    theta = float(next(model.parameters()).detach())
    x, y = (torch.stack(side).double().numpy() for side in zip(*rows, strict=True))
    g = 2 * (theta * x[:, 0] - y) * x[:, 0]
    expected = np.outer(g[:3], g) / (2 * (x**2).mean() * 1.5)
    scores = index.scores(rows[:3], method="influence", damping=0.5)
    np.testing.assert_allclose(scores, expected, rtol=5e-3, atol=1e-4 * np.abs(expected).max())


def test_rows_without_loss_or_gradient(tmp_path: Path) -> None:
    """Labels that are hit exactly, and inputs of zero."""
    task = ValueTask(lambda: nn.Linear(5, 1, bias=False), tiny.values(40))
    model = one_checkpoint(task, tmp_path / "checkpoints")
    with torch.no_grad():
        hit = [(x, model(x[None])[0, 0]) for x, _ in task.train[:10]]
    task.train = [*hit, *[(torch.zeros(5), y) for _, y in task.train[10:15]], *task.train[15:]]
    index = built(task, tmp_path, count=1)
    scores = index.scores(tiny.values(4, seed=5), method="influence")
    assert np.isfinite(scores).all()
    assert not scores[:, 10:15].any()
    assert np.abs(scores[:, :10]).max() < 1e-4 * np.abs(scores).max()


def test_an_index_without_any_gradient_scores_zero(tmp_path: Path) -> None:
    """Nothing is divided by zero."""
    task = ValueTask(lambda: nn.Linear(5, 1, bias=False), [(torch.zeros(5), y) for _, y in tiny.values(20)])
    with pytest.warns(UserWarning, match="zero"):
        index = built(task, tmp_path, count=1)
    for method in ("tracin", "influence", "source"):
        assert not index.scores(tiny.values(3, seed=5), method=method).any()


# Second moments


def adam_run(directory: Path) -> list[Checkpoint]:
    task = mlp_task()
    torch.manual_seed(0)
    model, batch = task.model(), task.collate(list(task.train))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-4)
    recorder = CheckpointRecorder(directory, every=5, optimizer_state=True)
    for _ in range(10):
        optimizer.zero_grad()
        task.loss(model, batch).mean().backward()
        optimizer.step()
        recorder.step(model, optimizer)
    return load_checkpoints(directory)


def test_the_preconditioner_is_rotated_as_a_diagonal(tmp_path: Path) -> None:
    """Of coordinate k, the mean over its weights; of a column, the mean over its coordinates."""
    task, found = mlp_task(), adam_run(tmp_path / "checkpoints")
    index = build_index(task, found, tmp_path / "index", dimensions=5, progress=False)
    moments, basis = found[0].second_moments(task.model()), index.contents.bases[0]
    assert moments is not None
    assert basis.rotation is not None
    of_coordinates = torch.full((basis.coordinates,), torch.nan, dtype=torch.float64)
    for layer in ("0", "2"):
        p = [1 / (moments.by_name[f"{layer}.{kind}"].double().sqrt() + 1e-4) for kind in ("weight", "bias")]
        whole: Any = basis.layers[layer]
        inputs, outputs = whole.bases.inputs[0].double(), whole.bases.outputs[0].double()
        means = outputs.square().T @ torch.cat([p[0], p[1][:, None]], dim=1) @ inputs.square()  # [out, in]
        of_coordinates[whole.columns] = means.flatten()[whole.kept]
    stored = index.contents.curvature[0].preconditioner
    assert stored is not None
    close(stored, basis.rotation.double().square().T @ of_coordinates)
    for method in ("source", "tracin-adam"):
        assert np.isfinite(index.scores(QUERIES, method=method)).all()


# Damage


@pytest.fixture(scope="module")
def undamaged_rotation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("rotation")
    built(mlp_task(), directory)
    return directory


@pytest.fixture
def path(undamaged_rotation: Path) -> Iterator[Path]:
    """The index, which is restored afterwards."""
    path = undamaged_rotation / "index"
    before = {name: (path / name).read_bytes() for name in ("manifest.json", "bases/0.1.safetensors")}
    yield path
    for name, content in before.items():
        (path / name).write_bytes(content)


def refused(path: Path) -> None:
    assert any("bases/0.1.safetensors" in problem for problem in verify(path, progress=False))
    with pytest.raises(CorruptIndexError, match=r"bases/0\.1\.safetensors"):
        open_index(path, mlp_task())


def test_a_changed_byte_of_the_rotation_is_found(path: Path) -> None:
    file = path / "bases/0.1.safetensors"
    content = bytearray(file.read_bytes())
    rotated = safetensors.torch.load(bytes(content))["rotation"].numpy().tobytes()
    content[content.index(rotated) + len(rotated) // 2] ^= 1
    file.write_bytes(content)
    refused(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda rotated: None,
        lambda rotated: rotated[:-1],
        lambda rotated: rotated[:, :-1],
        lambda rotated: rotated.double(),
        lambda rotated: rotated[:, :, None],
        lambda rotated: rotated[0, 0],
    ],
    ids=["none", "a coordinate less", "a column less", "float64", "three axes", "a number"],
)
def test_a_rotation_that_does_not_fit_is_refused_whatever_its_checksum(
    path: Path, change: Callable[[Tensor], Tensor | None]
) -> None:
    file = path / "bases/0.1.safetensors"
    tensors = safetensors.torch.load(file.read_bytes())
    changed = change(tensors.pop("rotation"))
    if changed is not None:
        tensors["rotation"] = changed.contiguous()
    file.write_bytes(safetensors.torch.save(tensors))
    manifest = json.loads((path / "manifest.json").read_bytes())
    manifest["basis"]["files"][0] |= {"bytes": file.stat().st_size, "xxh3": hash_file(file)}
    seal(path / "manifest.json", manifest)
    refused(path)
