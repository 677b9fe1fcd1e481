"""Bases against independent computations: exact gradients in float64, NumPy's eigenvectors, statistics over seeds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tiny
from gradtrace import Checkpoint, StoreError, gradients_reference, random_numbers
from gradtrace.basis import Basis, ChosenCoordinates, load_basis
from gradtrace.fitted import ekfac
from gradtrace.fitted.ekfac import curvature
from gradtrace.fitted.fisher_batches import fisher_batches
from gradtrace.gradients.reference import vmapped_gradients
from gradtrace.layers import Layer, base
from gradtrace.models.gradient_model import GradientModel
from gradtrace.store.manifest import BasisKind
from gradtrace.task import Task
from gradtrace_indexer.build.fit import FitSpec, Samples, fit_basis, rotated_basis, write_basis
from tiny import ClassTask, PairTask, ValueTask

CPU = torch.device("cpu")


class Fit:
    """A task with checkpoints at random weights, and bases fitted to it."""

    def __init__(self, task: Task, directory: Path, count: int = 2) -> None:
        self.task, self.samples = task, Samples(task, 0, len(task.train))
        self.rows = [task.train[row] for row in range(len(task.train))]
        self.checkpoints: list[Checkpoint] = tiny.checkpoints(task, directory, count)

    def models(self) -> Iterator[GradientModel]:
        return (GradientModel(self.task, checkpoint, CPU, self.rows[:2]) for checkpoint in self.checkpoints)

    @cached_property
    def reference(self) -> GradientModel:
        return list(self.models())[-1]

    def basis(self, kind: BasisKind, dimensions: int = 10**6, seed: int = 0) -> Basis:
        spec = FitSpec(kind, dimensions, seed, "int8")
        basis = fit_basis(spec, self.reference, self.models, self.samples)
        if kind != "gauss-newton":
            return basis
        rows = (self.encode(basis, model) for model in self.models())
        return rotated_basis(basis, dimensions, (of_one.T @ of_one for of_one in rows))

    def encode(self, basis: Basis, model: GradientModel | None = None) -> Tensor:
        model = model or self.reference
        return model.encode(basis, model.batch(self.rows))[0]

    def exact(self, checkpoint: int = -1) -> dict[str, Tensor]:
        return gradients_reference(self.task, tiny.loaded(self.task, self.checkpoints[checkpoint]), self.rows)


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.output = nn.Embedding(7, 4, padding_idx=0), nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.output(self.embedding(tokens).tanh().mean(1))


class Shared(nn.Module):
    """One layer used twice, and a parameter that no layer owns."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.output, self.scale = nn.Linear(5, 5), nn.Linear(5, 3), nn.Parameter(torch.ones(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.layer(self.layer(x).tanh()).tanh() * self.scale)


def tokens(rows: int) -> list[Any]:
    torch.manual_seed(0)
    return [(torch.randint(7, (6,)), row % 3) for row in range(rows)]


def chain(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers)


MODELS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "linear": (tiny.mlp, tiny.classes(40)),
    "linear, positions": (
        lambda: chain(nn.Linear(5, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)),
        tiny.classes(40, (4, 5)),
    ),
    "convolution": (
        lambda: chain(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)),
        tiny.classes(40, (2, 3, 3)),
    ),
    "grouped convolution": (
        lambda: chain(nn.Conv1d(4, 6, 2, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(18, 3)),
        tiny.classes(40, (4, 4)),
    ),
    "norms": (
        lambda: chain(nn.Linear(5, 4), nn.LayerNorm(4), nn.BatchNorm1d(4), nn.Linear(4, 3, bias=False)),
        tiny.classes(40),
    ),
    "embedding": (Tokens, tokens(40)),
    "shared and stray": (Shared, tiny.classes(40)),
    "one layer": (lambda: nn.Linear(5, 3), tiny.classes(40)),
}


@pytest.fixture(params=MODELS)
def fit(request: pytest.FixtureRequest, tmp_path: Path) -> Fit:
    make, rows = MODELS[request.param]
    return Fit(ClassTask(make, rows), tmp_path)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-4) -> None:
    assert (a.double() - b.double()).norm() <= tolerance * b.double().norm()


# Spectral coordinates


def test_all_spectral_coordinates_keep_every_inner_product(fit: Fit) -> None:
    """The rotations are orthogonal."""
    basis = fit.basis("spectral")
    exact = tiny.flat(fit.exact())
    assert basis.dimensions == exact.shape[1]
    rows = fit.encode(basis)
    close(rows @ rows.T, exact @ exact.T)


def in_full(basis: Basis, layers: list[Layer], gradients: dict[str, Tensor]) -> Tensor:
    """Exact gradients by parameter [batch, ...] in the columns of a basis that keeps all coordinates. float64."""
    columns = torch.full((len(next(iter(gradients.values()))), basis.dimensions), torch.nan, dtype=torch.float64)
    for layer in layers:
        chosen = basis.layers[layer.name]
        assert isinstance(chosen, ChosenCoordinates)
        gradient = matrix(layer, gradients)
        if chosen.bases.inputs is not None:
            gradient = gradient @ chosen.bases.inputs.double()
        if chosen.bases.outputs is not None:
            gradient = chosen.bases.outputs.double().transpose(1, 2) @ gradient
        columns[:, chosen.columns] = gradient.flatten(1)[:, chosen.kept]
    return columns


def matrix(layer: Layer, gradients: dict[str, Tensor]) -> Tensor:
    """A layer's exact gradient as [batch, groups, out, in], its bias the last column."""
    parts = [gradients[name] for name in layer.names]
    kind = type(layer.module).__name__
    if kind == "Embedding":
        parts[0] = parts[0].transpose(1, 2)
    shaped = [part.reshape(len(part), layer.groups, layer.outputs, -1) for part in parts]
    return torch.cat(shaped, dim=3)


def test_kept_are_the_coordinates_with_the_largest_mean_square(fit: Fit) -> None:
    """Over all checkpoints, in falling order, against exact gradients in the same rotations."""
    full, reference = fit.basis("spectral"), fit.reference
    energy = sum(in_full(full, reference.plan.layers, fit.exact(number)).square().mean(0) for number in range(2))
    assert isinstance(energy, Tensor)
    assert (energy[1:] <= energy[:-1] * (1 + 1e-4) + 1e-7 * energy[0]).all()
    rows = fit.encode(full)
    for dimensions in (1, 7, full.dimensions // 2):
        kept = fit.basis("spectral", dimensions)
        assert kept.dimensions == dimensions
        torch.testing.assert_close(fit.encode(kept), rows[:, :dimensions], rtol=1e-4, atol=1e-6)
        close(fit.encode(kept), in_full(full, reference.plan.layers, fit.exact())[:, :dimensions])


def every_class(fit: Fit) -> tuple[nn.Module, Any, Tensor]:
    """The reference model in float64, all examples with each class in turn, and the class's probability for each."""
    model = tiny.loaded(fit.task, fit.checkpoints[-1]).double()
    inputs = torch.stack([x for x, _ in fit.rows])
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    chances = fit.task.predict(model, (inputs, None)).softmax(1).detach()  # [n, classes]
    labels = torch.arange(chances.shape[1]).repeat_interleave(len(inputs))
    return model, (inputs.repeat(chances.shape[1], *(1,) * (inputs.dim() - 1)), labels), chances.T.flatten()


def test_rotations_are_the_eigenvectors_of_kronecker_factors(tmp_path: Path) -> None:
    """E[a aT] and E[d dT] from a forward and backward pass written out, diagonalised by NumPy."""
    fit = Fit(ClassTask(tiny.mlp, tiny.classes(300)), tmp_path)
    model, batch, weights = every_class(fit)
    hidden = model[0](batch[0])
    out = model[2](hidden.tanh())
    losses = fit.task.loss(lambda _: out, batch)
    for layer, a, d in zip(
        ("0", "2"), (batch[0], hidden.tanh()), torch.autograd.grad(losses.sum(), (hidden, out)), strict=True
    ):
        chosen = fit.basis("spectral").layers[layer]
        assert isinstance(chosen, ChosenCoordinates)
        for side, found in ((torch.cat([a, torch.ones(len(a), 1)], 1), chosen.bases.inputs), (d, chosen.bases.outputs)):
            assert found is not None
            _, vectors = np.linalg.eigh((weights * side.T @ side).detach().numpy())
            if layer == "2" and found is chosen.bases.outputs:
                vectors = vectors[:, 1:]  # gradients of logits sum to zero: one eigenvalue is
                found = found[:, :, :2]
            overlap = np.abs(vectors[:, ::-1].T @ found[0].double().numpy())
            np.testing.assert_allclose(overlap, np.eye(len(overlap)), atol=2e-3)


def test_curvature_is_the_mean_square_over_all_labels(fit: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradtrace.fitted.fisher_batches._NEGLIGIBLE", 0)
    basis, reference = fit.basis("spectral"), fit.reference
    found = curvature(reference, basis, fit.samples, 0)
    model, batch, weights = every_class(fit)
    gradients = vmapped_gradients(model, fit.task.loss, batch, list(fit.exact()))
    close(found["eigenvalues"], weights @ in_full(basis, reference.plan.layers, gradients).square() / 40)
    by_name = {layer.name: layer for layer in reference.plan.layers}
    squares = [matrix(by_name[name], gradients).square().flatten(1).mean(1) for name in sorted(basis.layers)]
    close(found["layer_means"], torch.stack(squares) @ weights / 40)


def test_classes_left_out_are_negligible(tmp_path: Path) -> None:
    """Of a confident model, most pairs of example and class are left out, and less than 1 % of the trace with them."""
    fit = Fit(ClassTask(lambda: nn.Linear(5, 12), tiny.classes(500, labels=12)), tmp_path, 1)
    state = torch.load(fit.checkpoints[0].path)
    torch.save({name: 30 * value for name, value in state.items()}, fit.checkpoints[0].path)
    basis = fit.basis("spectral")
    pairs = sum(len(labelled.weights) for labelled in fisher_batches(fit.reference, fit.samples, 0))
    assert pairs < 3 * 500
    model, batch, weights = every_class(fit)
    squares = tiny.flat(gradients_reference(fit.task, model, list(zip(*batch, strict=True)))).square().sum(1)
    found = float(curvature(fit.reference, basis, fit.samples, 0)["eigenvalues"].double().sum())
    assert 0.99 <= found / float(weights @ squares / 500) <= 1.0001


def drawn_classes(fit: Fit, seed: int) -> Tensor:
    """Of p - e_y only the drawn class's is below zero."""
    drawn: list[Tensor] = []
    for batch, weights, measure in fisher_batches(fit.reference, fit.samples, seed):
        assert weights.eq(1).all()
        fit.reference.backpropagate(batch, lambda layer, x, d: drawn.append(d.argmin(1)), measure)
    return torch.cat(drawn)


def test_many_classes_have_labels_drawn_by_their_probability(tmp_path: Path) -> None:
    """Same seed, same labels; over many examples their share is the predicted one."""
    fit = Fit(ClassTask(lambda: nn.Linear(5, 21), [(torch.ones(5), 0)] * 2000), tmp_path, 1)
    labels, other = (drawn_classes(fit, seed) for seed in (0, 1))
    assert torch.equal(labels, drawn_classes(fit, 0))
    assert len(labels) == 2000
    assert not torch.equal(labels, other)
    chances = tiny.loaded(fit.task, fit.checkpoints[0]).double()(torch.ones(5).double()).softmax(0)
    shares = torch.bincount(labels, minlength=21) / 2000
    assert ((shares - chances).abs() <= 5 * (chances * (1 - chances) / 2000).sqrt()).all()


@pytest.mark.parametrize(("c", "factor"), [(1.0, 2.0), (0.5, 1.0)])
def test_curvature_of_a_squared_error_is_its_gauss_newton_matrix(tmp_path: Path, c: float, factor: float) -> None:
    """c (f - y)^2 has the Gauss-Newton matrix 2 c E[J JT], whatever labels were drawn."""
    task = ValueTask(tiny.value_mlp, tiny.values(2000))
    task.c = c
    fit = Fit(task, tmp_path, 1)
    basis = fit.basis("spectral")
    found = curvature(fit.reference, basis, fit.samples, 0)["eigenvalues"]
    jacobian = tiny.flat(gradients_reference(task, tiny.loaded(task, fit.checkpoints[0]), fit.rows, task.predict))
    close(found.double().sum(), factor * jacobian.square().sum(1).mean())


# Wide layers


@pytest.mark.parametrize("case", ["linear", "linear, positions", "convolution", "grouped convolution", "embedding"])
def test_wide_sides_are_sketched(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No matrix as wide as the layer is formed; what is kept is still a part of an orthogonal rotation."""
    monkeypatch.setattr(ekfac, "_WIDEST", 4)
    monkeypatch.setattr(ekfac, "_SKETCH", 2)
    decomposed: list[int] = []
    eigh = torch.linalg.eigh

    def recorded(matrix: Tensor) -> Any:
        decomposed.append(matrix.shape[-1])
        return eigh(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", recorded)
    make, rows = MODELS[case]
    fit = Fit(ClassTask(make, rows), tmp_path)
    basis = fit.basis("spectral")
    assert max(decomposed) <= 2 * 2 + 1
    gradients, layers = fit.exact(), {layer.name: layer for layer in fit.reference.plan.layers}
    found = fit.encode(basis).double()
    for name, chosen in basis.layers.items():
        assert isinstance(chosen, ChosenCoordinates)
        gradient = matrix(layers[name], gradients)
        for side, wide in ((chosen.bases.inputs, layers[name].inputs), (chosen.bases.outputs, layers[name].outputs)):
            if side is not None:
                assert side.shape[2] <= (2 if wide > 4 else wide)
                assert len(side) == layers[name].groups
                torch.testing.assert_close(
                    side.transpose(1, 2) @ side, torch.eye(side.shape[2]).expand(len(side), -1, -1), atol=1e-4, rtol=0
                )
        if chosen.bases.inputs is not None:
            gradient = gradient @ chosen.bases.inputs.double()
        if chosen.bases.outputs is not None:
            gradient = chosen.bases.outputs.double().transpose(1, 2) @ gradient
        close(found[:, chosen.columns], gradient.flatten(1)[:, chosen.kept])


def test_energies_need_no_more_memory_for_more_slices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices of one example each give the same energies as one slice."""
    make, rows = MODELS["convolution"]
    fit = Fit(ClassTask(make, rows), tmp_path)
    whole = fit.encode(fit.basis("spectral", 20))
    monkeypatch.setattr(base, "SLICE_VALUES", 1)
    torch.testing.assert_close(fit.encode(fit.basis("spectral", 20)), whole, rtol=1e-3, atol=1e-5)


# Random projections


@pytest.mark.parametrize("kind", ["two-sided", "gaussian", "rademacher"])
@pytest.mark.parametrize(
    "case", ["linear", "convolution", "grouped convolution", "norms", "embedding", "shared and stray"]
)
def test_random_projections_keep_inner_products_in_expectation(kind: BasisKind, case: str, tmp_path: Path) -> None:
    make, rows = MODELS[case]
    fit = Fit(ClassTask(make, rows[:6]), tmp_path, 1)
    exact = tiny.flat(fit.exact())
    expected = exact @ exact.T
    model, seeds = fit.reference, 100
    found = torch.stack([
        rows @ rows.T for rows in (fit.encode(fit.basis(kind, 24, seed), model).double() for seed in range(seeds))
    ])  # fmt: skip
    assert ((found.mean(0) - expected).abs() <= 5 * found.std(0) / seeds**0.5 + 1e-6 * expected.abs().max()).all()


def test_dense_projection_is_the_same_in_small_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit = Fit(ClassTask(*MODELS["linear"]), tmp_path, 1)
    whole = fit.encode(fit.basis("gaussian", 8))
    monkeypatch.setattr("gradtrace.basis._DENSE_BLOCK", 24)
    monkeypatch.setattr("gradtrace.basis._DENSE_CACHE", 0)
    basis = fit.basis("gaussian", 8)
    for _ in range(2):
        torch.testing.assert_close(fit.encode(basis), whole, rtol=1e-5, atol=1e-6)


def test_dimensions_that_a_projection_cannot_have(tmp_path: Path) -> None:
    fit = Fit(ClassTask(*MODELS["norms"]), tmp_path, 1)
    with pytest.raises(StoreError, match="at least"):
        fit.basis("two-sided", 2)
    for kind in ("two-sided", "gaussian", "rademacher", "none"):
        assert fit.basis(kind, 10**6).dimensions == sum(layer.size for layer in fit.reference.plan.layers)


@pytest.mark.parametrize("draw", [random_numbers.gaussian, random_numbers.rademacher, random_numbers.random_integers])
def test_random_numbers_are_a_function_of_their_position(draw: Callable[..., Tensor]) -> None:
    whole = draw(3, 5, 0, 1000)
    parts = [draw(3, 5, start, 250) for start in (750, 500, 250, 0)]
    assert torch.equal(torch.cat(parts[::-1]), whole)
    assert not torch.equal(draw(4, 5, 0, 1000), whole)
    assert not torch.equal(draw(3, 6, 0, 1000), whole)


def test_random_numbers_have_their_moments() -> None:
    count = 1 << 18
    for seed in range(3):
        normal, sign = random_numbers.gaussian(seed, 1, 0, count).double(), random_numbers.rademacher(seed, 1, 0, count)
        for power, (mean, variance) in {1: (0, 1), 2: (1, 2), 3: (0, 15), 4: (3, 96)}.items():
            assert abs(float(normal.pow(power).mean()) - mean) <= 5 * (variance / count) ** 0.5
        assert set(sign.tolist()) == {-1.0, 1.0}
        assert abs(float(sign.mean())) <= 5 / count**0.5
        other = random_numbers.gaussian(seed, 2, 0, count).double()
        for a, b in ((normal, other), (normal[1:], normal[:-1]), (normal[1024:], normal[:-1024])):
            assert abs(float((a * b).mean())) <= 5 / len(a) ** 0.5


def mixed(z: int) -> int:
    """SplitMix64's finaliser, on Python's integers."""
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return z ^ z >> 31


@pytest.mark.parametrize(
    ("seed", "stream", "position"), [(0, 0, 0), (7, 2, 10**12), (-3, 1, 5), (2**63 - 1, 2**40, 2**40)]
)
def test_random_numbers_stay_what_they_are(seed: int, stream: int, position: int) -> None:
    """On every machine and in every release: an index stores the seed, not the numbers."""
    key = mixed((mixed(seed % 2**64) + stream * 2 + 1) % 2**64)
    expected = mixed(mixed((position + 1) * 0x9E3779B97F4A7C15 % 2**64) ^ key)
    assert random_numbers.random_integers(seed, stream, position, 1).item() % 2**64 == expected


# On disk


@pytest.mark.parametrize("kind", ["gauss-newton", "spectral", "two-sided", "gaussian", "rademacher", "none"])
@pytest.mark.parametrize("case", ["norms", "shared and stray"])
def test_saved_and_loaded_bases_are_equal(kind: BasisKind, case: str, tmp_path: Path) -> None:
    fit = Fit(ClassTask(*MODELS[case]), tmp_path / "checkpoints")
    basis = fit.basis(kind, 20, seed=9)
    entry = write_basis(tmp_path, "0.1", basis)
    loaded = load_basis(tmp_path / entry.path, kind, basis.dimensions, 9)
    torch.testing.assert_close(fit.encode(loaded), fit.encode(basis), rtol=1e-6, atol=1e-7)
    if kind not in ("gaussian", "rademacher"):
        assert torch.equal(loaded.layer_of_coordinates(), basis.layer_of_coordinates())
    saved = safetensors.torch.load((tmp_path / entry.path).read_bytes())
    assert set(saved) == set(basis.tensors())


def test_what_does_not_reach_a_layer_has_zeros_there(tmp_path: Path) -> None:
    """A measurement of the hidden activations: the output layer's coordinates are zero."""
    fit = Fit(ClassTask(*MODELS["linear"]), tmp_path)
    basis, model = fit.basis("spectral"), fit.reference
    rows, _ = model.encode(basis, model.batch(fit.rows), lambda m, batch: m[0](batch[0]).square().sum(1))
    first, last = basis.layers["0"].columns, basis.layers["2"].columns
    assert (rows[:, first] != 0).any()
    assert (rows[:, last] == 0).all()
    only_last = Basis("spectral", len(last), 0, {"2": replace(basis.layers["2"], columns=torch.arange(len(last)))})
    rows, _ = model.encode(only_last, model.batch(fit.rows), lambda m, batch: m[0](batch[0]).square().sum(1))
    assert rows.shape == (40, len(last))
    assert (rows == 0).all()


def test_predictions_are_not_needed_for_the_curvature(fit: Fit, tmp_path: Path) -> None:
    """The loss says what labels the model would give: with predictions or without, it is the same to the last bit."""
    without = Fit(PairTask(fit.task.model, fit.task.train), tmp_path / "without")
    basis = fit.basis("spectral")
    assert not without.task.has_predict
    for name, values in curvature(fit.reference, basis, fit.samples, 0).items():
        assert torch.equal(curvature(without.reference, basis, without.samples, 0)[name], values)


def test_labels_by_predictions_give_the_same_curvature(tmp_path: Path) -> None:
    """Where the loss calls no loss function, predictions and with_label do as well."""

    def by_hand(model: nn.Module, batch: Any) -> Tensor:
        logits = model(batch[0])
        return logits.logsumexp(1) - (logits * F.one_hot(batch[1], logits.shape[1])).sum(1)

    fit, other = (Fit(ClassTask(*MODELS["linear"], loss), tmp_path) for loss in (None, by_hand))
    assert (fit.reference.outputs.source, other.reference.outputs.source) == ("loss", "predict")
    have_the_same_curvature(fit, other)


def have_the_same_curvature(fit: Fit, other: Fit) -> None:
    basis = fit.basis("spectral")
    for name, values in curvature(fit.reference, basis, fit.samples, 0).items():
        close(curvature(other.reference, basis, other.samples, 0)[name], values)


def test_terms_beside_the_loss_functions_are_not_in_the_curvature(tmp_path: Path) -> None:
    def penalized(model: nn.Module, batch: Any) -> Tensor:
        logits = model(batch[0])
        return F.cross_entropy(logits, batch[1], reduction="none") + logits.exp().sum(1) / 10

    fit, other = (Fit(PairTask(*MODELS["linear"], loss), tmp_path) for loss in (None, penalized))
    assert other.reference.outputs.loss is not None
    assert other.reference.outputs.loss.has_other_terms
    have_the_same_curvature(fit, other)


def test_several_outputs_add_up(tmp_path: Path) -> None:
    """A class and two values an example: the trace over drawn labels is that of the Gauss-Newton matrix, on average."""

    def loss(model: nn.Module, batch: Any) -> Tensor:
        outputs = model(batch[0])
        values = F.mse_loss(outputs[:, 3:], batch[0][:, :2], reduction="none").mean(1)
        return F.cross_entropy(outputs[:, :3], batch[1], reduction="none") + values

    fit = Fit(PairTask(lambda: nn.Linear(5, 5), tiny.classes(2000), loss), tmp_path, 1)
    found = curvature(fit.reference, fit.basis("spectral"), fit.samples, 0)["eigenvalues"].double().sum()
    inputs = torch.stack([x for x, _ in fit.rows]).double()
    chances = tiny.loaded(fit.task, fit.checkpoints[0]).double()(inputs)[:, :3].softmax(1).detach()
    of_outputs = 1 - chances.square().sum(1) + 2  # trace of diag p - p pT, and 2 / 2 for each of two values
    expected = (of_outputs * (inputs.square().sum(1) + 1)).mean()
    assert float(found) == pytest.approx(float(expected), rel=0.03)


def test_where_nothing_is_known_of_the_labels_the_rows_have_their_own(tmp_path: Path) -> None:
    fit = Fit(PairTask(*MODELS["linear"], lambda model, batch: focal(model(batch[0]), batch[1])), tmp_path)
    assert fit.reference.outputs.source == "empirical"
    (labelled,) = fisher_batches(fit.reference, fit.samples, 0)
    assert labelled.batch.collated[1].tolist() == [label for _, label in fit.rows]
    assert labelled.weights.tolist() == [1] * 40
    assert labelled.measure is None


def focal(logits: Tensor, labels: Tensor) -> Tensor:
    losses = F.cross_entropy(logits, labels, reduction="none")
    return (1 - (-losses).exp()) ** 2 * losses
