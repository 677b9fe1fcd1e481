"""SOURCE against the derivative of unrolled training, closed forms, and its factors calculated a second time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import tiny
from gradtrace import Checkpoint, CheckpointError, Index, QueryError, gradients_reference, load_checkpoints
from gradtrace.checkpoints import Optimizer
from gradtrace.checkpoints.learning_rates import stretch_sums
from gradtrace.checkpoints.recorder import CheckpointRecorder
from gradtrace.checkpoints.second_moments import SecondMoments
from gradtrace.fitted.adam import preconditioner
from gradtrace.methods.source import unrolled
from gradtrace_indexer import add_checkpoints, build_index, prune
from tiny import ClassTask, PairTask

Doubles = NDArray[np.float64]
RATE, STEPS = 2e-3, 600  # so small a rate that steps are nearly a flow, as the theory takes them
BEST = torch.tensor([1.0, -2.0, 0.5, 0.0, 1.5]).double()
POINTS = torch.stack([x for x, _ in tiny.classes(30)]).double() * torch.tensor([1.0, 0.3, 2.0, 0.1, 0.6])
# Each point twice, with labels above and below the line by so much that squared gradients are the curvature: a task
# that predicts nothing has its Fisher from its own labels.
OFF = torch.tensor([0.5**0.5, -(0.5**0.5)]).double().repeat_interleave(len(POINTS))
QUERIES = tiny.values(4, seed=5)


class Data(NamedTuple):
    """inputs [n, 5], labels [n]; the curvature of the mean squared error [5, 5]"""

    inputs: Tensor
    labels: Tensor

    @property
    def curvature(self) -> Tensor:
        return 2 * self.inputs.T @ self.inputs / len(self.inputs)


DATA = Data(POINTS.repeat(2, 1), POINTS.repeat(2, 1) @ BEST + OFF)


class Line(PairTask):
    def __init__(self) -> None:
        rows = list(zip(DATA.inputs.float(), DATA.labels.float(), strict=True))
        super().__init__(lambda: nn.Linear(5, 1, bias=False), rows, self.squared_error)

    def squared_error(self, model: nn.Module, batch: list[Tensor]) -> Tensor:
        return (model(batch[0]).flatten() - batch[1]).square()


def trained(
    start: Tensor,
    momentum: float = 0.0,
    decay: float = 0.0,
    gain: Tensor | float = 1.0,
    beside: float = 0.0,
    weights: Tensor | None = None,
    data: Data = DATA,
    rates: Sequence[float] = (RATE,) * STEPS,
) -> list[Tensor]:
    """Full-batch gradient descent on the mean squared error, each row's loss times its weight: the weights [5] of every
    step. `decay` is in the loss, `beside` is not; `gain` is a preconditioner; `rates` are the steps'."""
    inputs, labels = data
    weights = torch.ones(len(inputs)).double() if weights is None else weights
    path, velocity = [start], torch.zeros_like(start)
    for rate in rates:
        gradient = 2 * ((path[-1] @ inputs.T - labels) * weights) @ inputs / len(inputs) + decay * path[-1]
        velocity = momentum * velocity + gain * gradient + beside * path[-1]
        path.append(path[-1] - rate * velocity)
    return path


def unrolled_influence(start: Tensor, data: Data = DATA, **settings: float | Tensor | list[float]) -> Tensor:
    """- d (query's loss after training) / d (weight of a row), times the number of rows. [queries, rows]."""
    weights = torch.ones(len(data.inputs)).double().requires_grad_(True)
    final = trained(start, weights=weights, data=data, **settings)[-1]  # type: ignore[arg-type]
    losses = [(x.double() @ final - y.double()).square() for x, y in QUERIES]
    return torch.stack([-len(weights) * torch.autograd.grad(loss, weights, retain_graph=True)[0] for loss in losses])


class Course(NamedTuple):
    """A training as `unrolled` takes it."""

    lengths: Doubles
    eigenvalues: Doubles
    gains: Doubles
    decays: Doubles


def gradients(weights: Tensor, data: Data = DATA) -> tuple[Tensor, Tensor]:
    """Of queries and rows. [queries, 5], [rows, 5]."""
    x, y = torch.stack([x for x, _ in QUERIES]).double(), torch.stack([y for _, y in QUERIES]).double()
    return 2 * (x @ weights - y)[:, None] * x, 2 * (data.inputs @ weights - data.labels)[:, None] * data.inputs


def source(
    path: list[Tensor], steps: list[int], course: Course, segments: int, axes: Tensor, data: Data = DATA
) -> Tensor:
    """Scores by exact gradients in the eigenvectors of the curvature. [queries, rows]."""
    factors = torch.from_numpy(unrolled(*course, segments))
    query = gradients(path[-1], data)[0] @ axes
    rows = [gradients(path[step], data)[1] @ axes for step in steps]
    return sum(query * f @ row.T for f, row in zip(factors, rows, strict=True))  # type: ignore[return-value]


def difference(found: Tensor | NDArray[np.float32], expected: Tensor) -> float:
    """Relative, over all of them."""
    return float((torch.as_tensor(found) - expected).norm() / expected.norm())


def course(lengths: list[float], eigenvalues: Tensor, gains: Tensor | None = None, decay: float = 0.0) -> Course:
    """With the same curvature everywhere."""
    shape = (len(lengths), len(eigenvalues))
    gains = torch.ones(5) if gains is None else gains
    return Course(
        np.array(lengths),
        np.broadcast_to(eigenvalues.numpy(), shape),
        np.broadcast_to(gains.double().numpy(), shape),
        np.full(len(lengths), decay),
    )


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_an_index_of_a_converged_quadratic_gives_the_unrolled_training(tmp_path: Path, momentum: float) -> None:
    """There gradients and curvature stay, so that the theory lacks nothing but the steps' finite size. Training has not
    gone on for long enough for the inverse of the curvature to be right."""
    torch.save({"weight": BEST[None].float()}, tmp_path / "a.pt")
    checkpoint = Checkpoint(tmp_path / "a.pt", STEPS, RATE, Optimizer("sgd", momentum))
    index = build_index(Line(), [checkpoint], tmp_path / "index", precision="float16", basis="spectral", progress=False)
    expected = unrolled_influence(BEST, momentum=momentum)
    assert difference(index.scores(QUERIES, method="source"), expected) < 0.02
    query, rows = gradients(BEST)
    assert difference(query @ torch.linalg.inv(DATA.curvature) @ rows.T, expected) > 0.2


@pytest.mark.parametrize("settings", [{}, {"momentum": 0.9}, {"decay": 0.5}, {"momentum": 0.5, "decay": 0.5}], ids=str)
def test_one_segment_of_a_converged_quadratic(settings: dict[str, float]) -> None:
    decay, momentum = settings.get("decay", 0.0), settings.get("momentum", 0.0)
    eigenvalues, axes = torch.linalg.eigh(DATA.curvature + decay * torch.eye(5))
    best = torch.linalg.solve(DATA.curvature + decay * torch.eye(5), DATA.curvature @ BEST)
    found = source([best], [0], course([RATE * STEPS / (1 - momentum)], eigenvalues), 1, axes)
    assert difference(found, unrolled_influence(best, **settings)) < 0.02


@pytest.mark.parametrize(("count", "error"), [(3, 0.3), (60, 0.02)])
def test_many_segments_follow_a_training_from_random_weights(count: int, error: float) -> None:
    """The more there are, the less a gradient changes within one."""
    path, length = trained(torch.arange(5).double() - 2), STEPS // count
    eigenvalues, axes = torch.linalg.eigh(DATA.curvature)
    steps = list(range(length, STEPS + 1, length))
    found = source(path, steps, course([RATE * length] * count, eigenvalues), count, axes)
    assert error / 3 < difference(found, unrolled_influence(path[0])) < error


TO_ZERO = [2 * RATE * (1 - step / (STEPS - 1)) for step in range(STEPS)]  # the last step's is zero


def recorded(directory: Path, path: list[Tensor], every: int, momentum: float = 0.0) -> list[Checkpoint]:
    """What the recorder keeps of a training at the rates of TO_ZERO; `path` are the weights [5] of every step."""
    model = nn.Linear(5, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, momentum=momentum)
    recorder = CheckpointRecorder(directory, every=every)
    for weights, rate in zip(path[1:], TO_ZERO, strict=True):
        with torch.no_grad():
            model.weight.copy_(weights[None])
        optimizer.param_groups[0]["lr"] = rate
        recorder.step(model, optimizer)
    return load_checkpoints(directory)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_learning_rate_that_falls_to_zero_is_summed(tmp_path: Path, momentum: float) -> None:
    """A checkpoint's own rate says nothing of the steps before it: the last one's would make its stretch vanish."""
    best = [BEST] * (STEPS + 1)
    found = recorded(tmp_path / "checkpoints", best, STEPS // 3, momentum)
    index = build_index(Line(), found, tmp_path / "index", precision="float16", basis="spectral", progress=False)
    expected = unrolled_influence(BEST, momentum=momentum, rates=TO_ZERO)
    assert difference(index.scores(QUERIES, method="source"), expected) < 0.02
    guessed = [Checkpoint(one.path, one.step, one.learning_rate, one.optimizer) for one in found]
    with pytest.warns(UserWarning, match="the learning rate changes"):
        index = build_index(
            Line(), guessed, tmp_path / "guessed", precision="float16", basis="spectral", progress=False
        )
    assert difference(index.scores(QUERIES, method="source"), expected) > 0.1


def test_many_segments_follow_a_training_whose_rate_falls_to_zero(tmp_path: Path) -> None:
    count = 60
    path = trained(torch.arange(5).double() - 2, rates=TO_ZERO)
    found = recorded(tmp_path, path, STEPS // count)
    eigenvalues, axes = torch.linalg.eigh(DATA.curvature)
    lengths = course(stretch_sums(found).tolist(), eigenvalues)
    scores = source(path, [one.step for one in found], lengths, count, axes)
    assert difference(scores, unrolled_influence(path[0], rates=TO_ZERO)) < 0.04


@pytest.mark.parametrize("beside", [0.0, 0.5])
def test_a_preconditioner_and_decay_beside_the_loss(beside: float) -> None:
    """Where the basis keeps the weights apart and the curvature is diagonal, nothing is approximated but steps."""
    gain = torch.tensor([3.0, 0.5, 1.0, 8.0, 0.1]).double()
    inputs = torch.cat([torch.eye(5), -torch.eye(5), torch.eye(5) * 2]).double()
    data = Data(inputs, inputs @ BEST + torch.linspace(-1, 1, 15).double())
    eigenvalues = data.curvature.diagonal()
    pull = gain * (2 * data.labels @ inputs / len(inputs))
    best = torch.linalg.solve((gain * eigenvalues + beside).diag(), pull)
    training = course([RATE * STEPS], eigenvalues, gain, beside)
    found = source([best], [0], training, 1, torch.eye(5).double(), data)
    assert difference(found, unrolled_influence(best, data, gain=gain, beside=beside)) < 0.02


def test_one_segment_is_an_influence_function_of_damping_one_over_rate_times_steps() -> None:
    """(1 - exp(-t l)) / l is 1 / (l + 1 / t) where t l is large or small, and at most 1.3 times that between."""
    length, eigenvalues = 7.0, torch.logspace(-9, 5, 200).double()
    factors = unrolled(np.array([length]), eigenvalues[None].numpy(), np.ones((1, 200)), np.zeros(1), 1)[0]
    ratio = factors * (eigenvalues.numpy() + 1 / length)
    assert ((ratio >= 1 - 1e-9) & (ratio < 1.3)).all()
    assert ratio[[0, -1]] == pytest.approx(1, rel=1e-5)
    forever = unrolled(np.array([1e9]), np.array([[0.0, 1e-3, 2.0]]), np.ones((1, 3)), np.zeros(1), 1)[0]
    np.testing.assert_allclose(forever, [1e9, 1e3, 0.5])


# --- A classifier's index against the formula, written down once more from the files


ROWS, ASKED = tiny.classes(60), tiny.classes(7, seed=5)


def formula(index: Index, names: list[str], segments: list[list[int]], lengths: list[float], decay: float) -> Doubles:
    """Scores from the stored rows and eigenvalues. [queries, rows]."""
    contents = index.contents
    at = [[entry.name for entry in index.manifest.checkpoints].index(name) for name in names]
    rows = tiny.stored(index).double().numpy()[:, at]
    last = contents.models[contents.manifest.last_checkpoint]
    query = last.encode(contents.bases[0], last.batch(ASKED))[0].double().numpy()
    values = [contents.curvature[position].eigenvalues.double().numpy() + decay for position in at]
    total, vector = np.zeros((len(query), len(rows))), query
    for segment in segments[::-1]:
        curvature = sum(values[number] for number in segment) / len(segment)
        length = sum(lengths[number] for number in segment)
        mean = rows[:, segment].mean(1)
        total += (vector * (1 - np.exp(-length * curvature)) / curvature) @ mean.T
        vector = vector * np.exp(-length * curvature)
    return total


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Index:
    directory = tmp_path_factory.mktemp("classifier")
    task = ClassTask(tiny.mlp, ROWS)
    found = tiny.checkpoints(task, directory / "checkpoints", 4)  # steps 10, 30, 60, 100; rates 0.1 / number
    about = {"optimizer": {"name": "sgd", "momentum": 0.5, "weight_decay": 0.01}}
    keys = ("step", "learning_rate", "learning_rate_sum")
    listed = [{"file": c.path.name} | {key: getattr(c, key) for key in keys} for c in found]
    (directory / "checkpoints/checkpoints.json").write_text(json.dumps(about | {"checkpoints": listed}))
    loaded = load_checkpoints(directory / "checkpoints")
    return build_index(
        task, loaded, directory / "index", precision="float16", basis="spectral", progress=False, dimensions=1000
    )


NAMES = ["1.pt", "2.pt", "3.pt", "4.pt"]
LENGTHS = [2 * 0.1 * 10, 2 * 0.05 * 20, 2 * 0.1 / 3 * 30, 2 * 0.025 * 40]


@pytest.mark.parametrize(
    ("segments", "parts"),
    [(None, [[0, 1], [2], [3]]), (1, [[0, 1, 2, 3]]), (2, [[0, 1], [2, 3]]), (9, [[0], [1], [2], [3]])],
)
def test_scores_of_segments(classifier: Index, segments: int | None, parts: list[list[int]]) -> None:
    expected = formula(classifier, NAMES, parts, LENGTHS, 0.01)
    scores = classifier.scores(ASKED, method="source", segments=segments)
    np.testing.assert_allclose(scores, expected, rtol=1e-3, atol=1e-5 * np.abs(expected).max())


def test_checkpoints_attribute_to_the_data_of_one_stage(classifier: Index) -> None:
    """Their parts of the score alone; the later segments still pass on, or forget, what they did."""
    first = classifier.scores(ASKED, method="source", segments=2, checkpoints=NAMES[:2])
    second = classifier.scores(ASKED, method="source", segments=2, checkpoints=NAMES[2:])
    whole = classifier.scores(ASKED, method="source", segments=2)
    np.testing.assert_allclose(first + second, whole, rtol=1e-4, atol=1e-5 * np.abs(whole).max())
    hit = classifier.influence(ASKED[:1], method="source", segments=2, k=1)[0].proponents[0]
    assert sum(hit.parts[name] for name in NAMES[:2]) == pytest.approx(float(first[0, hit.row]), rel=1e-3)


def test_self_influence_takes_the_row_for_the_query(classifier: Index) -> None:
    scores = classifier.scores(ROWS[:5], method="source")
    np.testing.assert_allclose(classifier.self_influence(method="source")[:5], scores.diagonal(), rtol=1e-2)


def test_what_source_needs_is_said(classifier: Index, tmp_path: Path) -> None:
    with pytest.raises(QueryError, match=r"fast-source.*average_segments=3"):
        classifier.scores(ASKED, method="fast-source")
    with pytest.raises(QueryError, match="takes no damping"):
        classifier.scores(ASKED, method="source", damping=0.1)
    with pytest.raises(QueryError, match="inner product of full gradients"):
        classifier.influence(ASKED, method="source", rescore=True)
    uncompressed = tiny.build(ClassTask(tiny.mlp, ROWS), tmp_path)
    with pytest.raises(QueryError, match="basis='gauss-newton' or 'spectral'"):
        uncompressed.scores(ASKED, method="source")


def adam_run(directory: Path, moments: bool) -> list[Checkpoint]:
    task = ClassTask(tiny.mlp, ROWS)
    torch.manual_seed(0)
    model, batch = task.model(), task.collate(list(task.train))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1, eps=1e-4)
    recorder = CheckpointRecorder(directory, every=5, optimizer_state=moments)
    for _ in range(20):
        optimizer.zero_grad()
        task.loss(model, batch).mean().backward()
        optimizer.step()
        recorder.step(model, optimizer)
    return load_checkpoints(directory)


def test_adam_without_its_moments_is_refused(tmp_path: Path) -> None:
    found = adam_run(tmp_path / "checkpoints", moments=False)
    index = build_index(ClassTask(tiny.mlp, ROWS), found, tmp_path / "index", progress=False)
    assert "source" not in index.methods
    with pytest.raises(QueryError, match=r"steps of adamw .*CheckpointRecorder\(optimizer_state=True\)"):
        index.scores(ASKED, method="source")


def test_the_preconditioner_is_a_mean_over_the_weights_of_a_coordinate(tmp_path: Path) -> None:
    """Its sum over a layer's coordinates is that over the weights; it is taken once more by rotating the matrix."""
    task, found = ClassTask(tiny.mlp, ROWS), adam_run(tmp_path / "checkpoints", moments=True)
    index = build_index(task, found, tmp_path / "index", dimensions=1000, basis="spectral", progress=False)
    moments = found[0].second_moments(task.model())
    assert moments is not None
    stored, basis = index.contents.curvature[0].preconditioner, index.contents.bases[0]
    for layer in ("0", "2"):
        p = [1 / (moments.by_name[f"{layer}.{kind}"].double().sqrt() + 1e-4) for kind in ("weight", "bias")]
        matrix = torch.cat([p[0], p[1][:, None]], dim=1)
        chosen = basis.layers[layer]
        inputs, outputs = chosen.bases.inputs[0].double(), chosen.bases.outputs[0].double()  # type: ignore[union-attr]
        for column, kept in list(zip(chosen.columns.tolist(), chosen.kept.tolist(), strict=True))[:7]:  # type: ignore[union-attr]
            u = torch.outer(outputs[:, kept // inputs.shape[1]], inputs[:, kept % inputs.shape[1]])
            assert float(stored[column]) == pytest.approx(float((u.square() * matrix).sum()), rel=1e-4)


def test_the_preconditioner_is_all_of_it_where_the_basis_keeps_weights_as_they_are(tmp_path: Path) -> None:
    task = ClassTask(tiny.mlp, ROWS)
    index = tiny.build(task, tmp_path, count=1)
    model, basis = index.contents.models[0], index.contents.bases[0]
    exact = gradients_reference(task, tiny.loaded(task, load_one(tmp_path)), ROWS[:1])
    squares = {name: torch.rand(value.shape[1:]) for name, value in exact.items() if name != "2.bias"}
    found = preconditioner(model, basis, SecondMoments(squares, 0.999, 1e-3))
    scaled = {name: exact[name] / (square.sqrt() + 1e-3) for name, square in squares.items()}
    coordinates = model.encode(basis, model.batch(ROWS[:1]))[0][0] * found
    wanted = torch.cat([tiny.flat(scaled)[0].float(), torch.zeros(3)])  # what never had a gradient does not move
    torch.testing.assert_close(coordinates.sort()[0], wanted.sort()[0])


def test_moments_of_other_parameters_are_refused(tmp_path: Path) -> None:
    index = tiny.build(ClassTask(tiny.mlp, ROWS), tmp_path, count=1)
    model, basis = index.contents.models[0], index.contents.bases[0]
    for strange in ({"2.weigth": torch.rand(3, 4)}, {"2.weight": torch.rand(4, 3)}):
        with pytest.raises(CheckpointError, match=rf"of other parameters than the model's \({next(iter(strange))}\)"):
            preconditioner(model, basis, SecondMoments(strange, 0.999, 1e-8))


def load_one(directory: Path) -> Checkpoint:
    return Checkpoint(directory / "checkpoints/1.pt", 10, 0.1)


# --- Averaged weights


class Normalized(ClassTask):
    def __init__(self) -> None:
        super().__init__(lambda: nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)), ROWS)


def test_fast_source_is_source_at_the_averages(tmp_path: Path) -> None:
    task = Normalized()
    found = tiny.checkpoints(task, tmp_path / "checkpoints", 4)
    arguments = {"precision": "float16", "basis": "spectral", "dimensions": 1000, "progress": False}
    index = build_index(task, found, tmp_path / "index", average_segments=2, **arguments)  # type: ignore[arg-type]
    entries = index.manifest.checkpoints
    assert [(entry.kind, entry.step) for entry in entries] == [("average", 30), ("average", 100), ("weights", 100)]
    states = [checkpoint.load() for checkpoint in found]
    for block, pair in enumerate((states[:2], states[2:])):
        stored = index.contents.models[block].model.state_dict()
        for name in ("0.weight", "1.running_var", "3.bias"):
            torch.testing.assert_close(stored[name], (pair[0][name] + pair[1][name]) / 2)
        assert stored["1.num_batches_tracked"] == pair[1]["1.num_batches_tracked"]
    names = [entry.name for entry in entries[:2]]
    expected = formula(index, names, [[0], [1]], [0.1 * 10 + 0.05 * 20, 0.1 / 3 * 30 + 0.025 * 40], 0.0)
    scores = index.scores(ASKED, method="fast-source")
    np.testing.assert_allclose(scores, expected, rtol=1e-3, atol=1e-5 * np.abs(expected).max())
    changes = [effect.predicted_change for effect in index.removal([0, 3, 7, 3], ASKED, method="fast-source")]
    wanted = expected[:, [0, 3, 7]].sum(1) / len(ROWS)
    np.testing.assert_allclose(changes, wanted, rtol=1e-3, atol=1e-5 * np.abs(expected).max())


def test_other_methods_pass_over_averages(tmp_path: Path) -> None:
    task = ClassTask(tiny.mlp, ROWS)
    found = tiny.checkpoints(task, tmp_path / "checkpoints", 4)
    index = build_index(task, found, tmp_path / "index", average_segments=2, progress=False)
    assert {"tracin", "cosine", "source", "fast-source"} <= set(index.methods)
    for method in ("tracin", "graddot", "cosine", "source"):
        parts = index.influence(ASKED[:1], method=method, k=1)[0].proponents[0].parts
        assert set(parts) == {"4.pt"}
    average = index.manifest.checkpoints[0].name
    with pytest.raises(QueryError, match=r"unknown checkpoint.*choose from 4\.pt"):
        index.scores(ASKED, checkpoints=[average])
    assert set(index.influence(ASKED[:1], method="fast-source", checkpoints=[average])[0].proponents[0].parts) == {
        average
    }


def test_averages_live_with_their_index(tmp_path: Path) -> None:
    """They are kept when others' files are swept away, resumed builds use them, and later checkpoints outdate them."""
    task = ClassTask(tiny.mlp, ROWS)
    found = tiny.checkpoints(task, tmp_path / "checkpoints", 5)
    build_index(task, found[:4], tmp_path / "index", average_segments=2, progress=False)
    kept = sorted((tmp_path / "index/averages").iterdir())
    prune(tmp_path / "index")
    assert sorted((tmp_path / "index/averages").iterdir()) == kept
    index = build_index(task, found[:4], tmp_path / "index", average_segments=2, progress=False)
    assert "fast-source" in index.methods
    index = add_checkpoints(tmp_path / "index", task, found[4:], progress=False)
    assert "fast-source" not in index.methods
    with pytest.raises(QueryError, match="averaged weights end at step 100"):
        index.scores(ASKED, method="fast-source")


def test_more_averages_than_checkpoints_are_refused(tmp_path: Path) -> None:
    task = ClassTask(tiny.mlp, ROWS)
    found = tiny.checkpoints(task, tmp_path / "checkpoints", 2)
    with pytest.raises(CheckpointError, match=r"average_segments=3: give a number from 1 to .*, 2"):
        build_index(task, found, tmp_path / "index", average_segments=3, progress=False)
