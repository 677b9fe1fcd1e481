"""Sums of the learning rate over stretches of a training: recorded, read, guessed, and what methods make of them."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tiny
from gradtrace import Checkpoint, CheckpointError, CheckpointRecorder, load_checkpoints, open_index
from gradtrace.checkpoints import Optimizer
from gradtrace.checkpoints.indexed import checkpoint_entries
from gradtrace.checkpoints.learning_rates import stretch_sums
from gradtrace.checkpoints.readers import transformers
from gradtrace.checkpoints.readers.base import NextRate, Reading, described
from gradtrace.checkpoints.readers.schedule import KnownRates, with_rates_of_steps
from gradtrace.methods.tracin import checkpoint_weights
from gradtrace.store.manifest import by_run
from gradtrace_indexer import build_index
from gradtrace_indexer.evaluation.select import selection_index
from tiny import PairTask

pytestmark = pytest.mark.unit

TO_ZERO = [0.1 * (1 - step / 12) for step in range(12)]  # the rate of each step


def record(
    directory: Path, rates: list[float], first: int = 0, resume: bool = False, loss: bool = False, **settings: int
) -> None:
    """A training of these rates, the first of them at step `first` + 1."""
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    recorder = CheckpointRecorder(directory, **{"every": 3, "resume": resume, **settings})  # type: ignore[arg-type]
    recorder.steps = first
    for number, rate in enumerate(rates):
        optimizer.param_groups[0]["lr"] = rate
        recorder.step(model, optimizer, float(len(rates) - number) if loss else None)
    recorder.save(model)


def sums(directory: Path) -> dict[int, float | None]:
    return {one.step: one.learning_rate_sum for one in load_checkpoints(directory)}


def test_the_recorder_adds_up_the_rates_of_all_steps(tmp_path: Path) -> None:
    record(tmp_path, TO_ZERO[:11])
    assert sums(tmp_path) == {step: pytest.approx(sum(TO_ZERO[:step])) for step in (3, 6, 9, 11)}


def test_a_last_stretch_that_ends_at_a_rate_of_zero_has_a_length(tmp_path: Path) -> None:
    record(tmp_path, [0.1, 0.1, 0.1, 0.2, 0.1, 0.0])
    last = load_checkpoints(tmp_path)[-1]
    assert (last.learning_rate, last.learning_rate_sum) == (0.1, pytest.approx(0.6))


def test_sums_go_on_where_training_resumes(tmp_path: Path) -> None:
    record(tmp_path, TO_ZERO[:6])
    record(tmp_path, TO_ZERO[6:], first=6, resume=True)
    assert sums(tmp_path) == {step: pytest.approx(sum(TO_ZERO[:step])) for step in (3, 6, 9, 12)}
    record(tmp_path, TO_ZERO[3:], first=3, resume=True)  # from an earlier state: the same once more
    assert sums(tmp_path) == {step: pytest.approx(sum(TO_ZERO[:step])) for step in (3, 6, 9, 12)}


def test_steps_that_the_recorder_did_not_see_are_told(tmp_path: Path) -> None:
    record(tmp_path, TO_ZERO[:3])
    with pytest.warns(UserWarning, match=r"rates of the 2 steps up to step 5 were not recorded.*0\.05"):
        record(tmp_path, [0.05, 0.04], first=5, resume=True)
    assert sums(tmp_path)[6] == pytest.approx(sum(TO_ZERO[:3]) + 3 * 0.05)


def test_what_given_up_checkpoints_closed_goes_to_the_next(tmp_path: Path) -> None:
    record(tmp_path, TO_ZERO, every=1, keep=3, loss=True)
    kept = load_checkpoints(tmp_path)
    assert len(kept) == 3
    stretches = np.diff([0, *(one.step for one in kept)])
    assert stretches.max() > 1
    ends = [sum(TO_ZERO[: one.step]) for one in kept]
    np.testing.assert_allclose(stretch_sums(kept), np.diff([0, *ends]))


def test_recorded_lists_without_sums_are_read_and_gone_on_with(tmp_path: Path) -> None:
    record(tmp_path, [0.1] * 6)
    file = tmp_path / "checkpoints.json"
    content = json.loads(file.read_text())
    for entry in content["checkpoints"]:
        del entry["learning_rate_sum"]
    file.write_text(json.dumps(content))
    assert sums(tmp_path) == {3: None, 6: None}
    record(tmp_path, [0.2, 0.2, 0.1], first=6, resume=True)
    np.testing.assert_allclose(stretch_sums(load_checkpoints(tmp_path)), [0.3, 0.3, 0.5])


def test_a_choice_among_checkpoints_keeps_the_whole_path(tmp_path: Path) -> None:
    record(tmp_path / "checkpoints", TO_ZERO)
    found = load_checkpoints(tmp_path / "checkpoints")
    index = selection_index(found, [1, 3], tmp_path / "checkpoints")
    np.testing.assert_allclose(stretch_sums(index.checkpoints), [sum(TO_ZERO[:6]), sum(TO_ZERO[6:])])


def test_a_list_whose_sums_fall_is_refused(tmp_path: Path) -> None:
    for name in ("a.pt", "b.pt"):
        torch.save({"w": torch.zeros(1)}, tmp_path / name)
    entries = [
        {"file": "b.pt", "step": 20, "learning_rate": 0.1, "learning_rate_sum": 0.5},  # of its stretch, not from step 0
        {"file": "a.pt", "step": 10, "learning_rate": 0.1, "learning_rate_sum": 1.0},
    ]
    (tmp_path / "checkpoints.json").write_text(json.dumps({"checkpoints": entries}))
    with pytest.raises(CheckpointError, match="learning_rate_sum falls from step 10 to step 20"):
        load_checkpoints(tmp_path)


# --- Methods


class Line(PairTask):
    """Squared error of a line in two inputs."""

    def __init__(self) -> None:
        super().__init__(lambda: nn.Linear(5, 1, bias=False), tiny.values(20))

    def loss(self, model: nn.Module, batch: list[Tensor]) -> Tensor:
        return (model(batch[0]).flatten() - batch[1]).square()


def test_step_weighted_scores_follow_the_path_of_training(tmp_path: Path) -> None:
    """With a checkpoint every few steps, the sum over checkpoints is the sum over steps of rate x inner product."""
    task, steps = Line(), 240
    torch.manual_seed(0)
    model, (inputs, labels) = task.model(), task.collate(list(task.train))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps - 1)  # zero at the last step
    recorder = CheckpointRecorder(tmp_path / "checkpoints", every=4)
    path = []
    for _ in range(steps):
        optimizer.zero_grad()
        (model(inputs).flatten() - labels).square().mean().backward()
        optimizer.step()
        recorder.step(model, optimizer)
        path.append(
            (float(optimizer.param_groups[0]["lr"]), next(iter(model.parameters())).detach().double()[0].clone())
        )
        schedule.step()
    assert path[-1][0] == 0
    x, y = inputs.double(), labels.double()
    wanted = torch.zeros(3, 20, dtype=torch.float64)
    for rate, weights in path:
        gradients = 2 * (x @ weights - y)[:, None] * x
        wanted += rate * gradients[:3] @ gradients.T
    index = build_index(
        task,
        load_checkpoints(tmp_path / "checkpoints"),
        tmp_path / "index",
        basis="none",
        precision="float16",
        progress=False,
    )
    scores = index.scores(task.train[:3], weights="learning_rate_steps")
    assert float((torch.from_numpy(scores) - wanted).norm() / wanted.norm()) < 0.04
    # As it was when the rate at a checkpoint stood for its whole stretch, with stretches as long as the schedule bends.
    few = load_checkpoints(tmp_path / "checkpoints")[19::20]
    entries = checkpoint_entries(tmp_path / "index", few, task)
    chosen = by_run(entries, range(3))[0]
    np.testing.assert_allclose(
        checkpoint_weights(entries, chosen, "learning_rate_steps"),
        [sum(rate for rate, _ in path[start : start + 80]) for start in (0, 80, 160)],
    )


def test_that_sums_are_guessed_is_said_once_where_the_rate_changes(tmp_path: Path) -> None:
    task = tiny.ClassTask(tiny.mlp, tiny.classes(30))
    found = [
        Checkpoint(one.path, one.step, one.learning_rate) for one in tiny.checkpoints(task, tmp_path / "checkpoints", 3)
    ]
    with pytest.warns(UserWarning, match=r"learning rate changes .* not kept for steps 10, 30, 60: source") as told:
        build_index(task, found, tmp_path / "index", progress=False)
    assert len(told) == 1
    with pytest.warns(UserWarning, match="the rate at a checkpoint for that of all steps"):
        open_index(tmp_path / "index", task)
    steady = [Checkpoint(one.path, one.step, 0.1) for one in found]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build_index(task, steady, tmp_path / "steady", progress=False)


# --- Reading schedules


def reading(step: int, rate: float, scheduled: int | None = None, initial: float | None = None) -> Reading:
    return Reading(Checkpoint(Path(str(step)), step, rate), NextRate(rate, scheduled, initial))


def test_a_linear_schedule_is_found_from_the_next_rates_alone() -> None:
    schedule = [0.3 * (1 - step / 20) for step in range(21)]
    found = with_rates_of_steps([reading(step, schedule[step], None, 0.3) for step in (5, 12, 20)])
    assert [one.learning_rate for one in found] == [pytest.approx(schedule[step - 1]) for step in (5, 12, 20)]
    assert [one.learning_rate_sum for one in found] == [pytest.approx(sum(schedule[:step])) for step in (5, 12, 20)]


def test_a_warm_up_that_outlasts_the_first_checkpoint_is_drawn_back() -> None:
    schedule = [min(step, 20 - step) / 10 for step in range(21)]  # up to 1 at step 11, and down again
    found = with_rates_of_steps([reading(step, schedule[step], step, 1.0) for step in (4, 8, 10, 15, 20)])
    assert [one.learning_rate_sum for one in found] == [
        pytest.approx(sum(schedule[:step])) for step in (4, 8, 10, 15, 20)
    ]


def test_a_schedule_that_moves_once_an_epoch_holds_its_rate() -> None:
    schedule = [1.0] * 5 + [0.1] * 5 + [0.01] * 5
    found = with_rates_of_steps([reading(5, 0.1, 1, 1.0), reading(10, 0.01, 2, 1.0), reading(15, 0.01, 3, 1.0)])
    assert [one.learning_rate for one in found] == [1.0, 0.1, 0.01]
    assert [one.learning_rate_sum for one in found] == [pytest.approx(sum(schedule[:step])) for step in (5, 10, 15)]


@pytest.mark.parametrize("counts", [(3, 1), (None, 2)])
def test_counts_that_make_no_sense_are_passed_over(counts: tuple[int | None, int | None]) -> None:
    found = with_rates_of_steps([reading(5, 0.1, counts[0], 0.1), reading(10, 0.1, counts[1], 0.1)])
    assert [one.learning_rate_sum for one in found] == [pytest.approx(0.5), pytest.approx(1.0)]


def test_before_the_first_known_rate_nothing_exceeds_the_initial_one() -> None:
    known = KnownRates([10, 20], [0.5, 1.0], 1.0)
    np.testing.assert_allclose(known.at(np.array([1.0, 10, 15, 30]), 1), [0.05, 0.5, 0.75, 1.0])
    np.testing.assert_allclose(KnownRates([10, 20], [1.0, 0.5], None).at(np.array([1.0, 20]), 1), [1.45, 0.5])
    np.testing.assert_allclose(KnownRates([10], [0.4], None).at(np.array([1.0, 20]), 1), [0.4, 0.4])


@pytest.mark.parametrize("late", [0, 1])
def test_a_trainers_log_may_tell_the_next_rates(tmp_path: Path, late: int) -> None:
    """Old releases of transformers logged after the schedule had moved on."""
    schedule = [0.3 * (1 - step / 20) for step in range(21)]  # of steps 1, 2, ...
    found = {}
    for step in (0, 5, 10):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        log = [{"step": at, "learning_rate": schedule[at - 1 + late]} for at in range(5, step + 1, 5)]
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": log}))
        weight = nn.Parameter(torch.zeros(1))
        optimizer = torch.optim.AdamW([{"params": [weight], "initial_lr": 0.3}], lr=schedule[step])
        torch.save(optimizer.state_dict(), folder / "optimizer.pt")
        found[step] = transformers.read(folder).checkpoint
    assert [found[step].learning_rate for step in (5, 10)] == [pytest.approx(schedule[step - 1]) for step in (5, 10)]
    assert [found[step].learning_rate_sum for step in found] == [pytest.approx(sum(schedule[:step])) for step in found]


# --- Adam and AdamW

SETTINGS = {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1, "amsgrad": False}


@pytest.mark.parametrize(
    ("more", "name"),
    [
        ({"maximize": False, "foreach": None, "decoupled_weight_decay": False}, "adam"),
        ({"maximize": False, "foreach": None, "decoupled_weight_decay": True}, "adamw"),
        ({"maximize": False, "foreach": None, "capturable": False}, "adam"),  # PyTorch 1.12 to 2.6
        ({"foreach": None, "maximize": False, "capturable": False}, "adamw"),
        ({"correct_bias": True}, "adamw"),  # transformers' own
    ],
)
def test_a_saved_adam_is_told_from_adamw(more: dict[str, object], name: str) -> None:
    assert described(Path("x"), SETTINGS | more) == Optimizer(name, 0.0, 0.1)


def test_a_saved_adam_that_does_not_tell_is_asked_about() -> None:
    with pytest.warns(UserWarning, match="x does not tell whether Adam's weight decay of 0.1"):
        assert described(Path("x"), SETTINGS).name == "adamw"
    assert described(Path("x"), SETTINGS | {"weight_decay": 0}).weight_decay == 0


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda p: torch.optim.Adam(p), "adam"),
        (lambda p: torch.optim.AdamW(p), "adamw"),
        (lambda p: torch.optim.NAdam(p, decoupled_weight_decay=True), "nadamw"),
        (lambda p: torch.optim.RAdam(p, decoupled_weight_decay=True), "radamw"),
        (lambda p: torch.optim.RAdam(p), "radam"),
        (lambda p: type("Mine", (torch.optim.AdamW,), {})(p), "adamw"),
    ],
)
def test_the_recorder_names_what_decouples_its_decay(tmp_path: Path, make: object, name: str) -> None:
    model = nn.Linear(3, 2)
    CheckpointRecorder(tmp_path, every=1).step(model, make(model.parameters()))  # type: ignore[operator]
    optimizer = load_checkpoints(tmp_path)[0].optimizer
    assert optimizer is not None
    assert optimizer.name == name


def test_adam_with_decoupled_decay_is_adamw(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    if "decoupled_weight_decay" not in torch.optim.Adam(model.parameters()).param_groups[0]:
        pytest.skip("this PyTorch's Adam has no decoupled_weight_decay")
    optimizer = torch.optim.Adam(model.parameters(), weight_decay=0.1, decoupled_weight_decay=True)
    CheckpointRecorder(tmp_path, every=1).step(model, optimizer)
    assert load_checkpoints(tmp_path)[0].optimizer == Optimizer("adamw", 0.0, 0.1)
