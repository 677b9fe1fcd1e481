from __future__ import annotations

import contextlib
import multiprocessing
import signal
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from gradtrace.checkpoints import Optimizer, load_checkpoints, load_into
from gradtrace.checkpoints.recorder import CheckpointRecorder
from gradtrace.errors import CheckpointError


def sgd_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    loss = model(torch.ones(1, 3)).square().sum()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def test_weights_rate_and_optimizer_are_those_of_the_step(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.08, momentum=0.9, weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    recorder = CheckpointRecorder(tmp_path / "run/checkpoints", every=2, batch_size=32)
    weights, rates = {}, {}
    for step in range(1, 6):
        rates[step] = optimizer.param_groups[0]["lr"]
        sgd_step(model, optimizer)
        weights[step] = model.weight.detach().clone()
        recorder.step(model, optimizer)
        scheduler.step()
    recorder.save(model)
    recorder.save(model)

    checkpoints = load_checkpoints(tmp_path / "run/checkpoints")

    assert [one.step for one in checkpoints] == [2, 4, 5]
    for one in checkpoints:
        assert torch.equal(one.load()["weight"], weights[one.step])
        assert one.learning_rate == rates[one.step]
        assert one.optimizer == Optimizer("sgd", 0.9, 0.01)
        assert one.batch_size == 32


def test_every_kind_of_state_comes_back(tmp_path: Path) -> None:
    class Model(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            torch.manual_seed(seed)
            self.convolution = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
            self.norm = nn.BatchNorm2d(4)
            self.embedding = nn.Embedding(5, 4)
            self.head = nn.Linear(4, 5, bias=False)
            self.head.weight = self.embedding.weight
            self.register_buffer("transposed", torch.randn(2, 3).half().t())
            self.register_buffer("count", torch.tensor(seed))

    model, other = Model(0), Model(1)
    recorder = CheckpointRecorder(tmp_path, every=1)
    recorder.step(model, torch.optim.AdamW(model.parameters(), lr=0.1))
    (checkpoint,) = load_checkpoints(tmp_path)
    load_into(other, checkpoint)
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name
    assert checkpoint.optimizer == Optimizer("adamw", 0.0, 0.01)


def test_training_goes_on_where_the_directory_ends(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        recorder = CheckpointRecorder(tmp_path, every=2, resume=True)
        for _ in range(4):
            sgd_step(model, optimizer)
            recorder.step(model, optimizer)
    assert [one.step for one in load_checkpoints(tmp_path)] == [2, 4, 6, 8]

    again = CheckpointRecorder(tmp_path, every=2, resume=True)
    again.steps = 4  # resumed from an earlier state: what comes after is recorded anew
    for _ in range(2):
        sgd_step(model, optimizer)
        again.step(model, optimizer)
    checkpoints = load_checkpoints(tmp_path)
    assert [one.step for one in checkpoints] == [2, 4, 6, 8]
    assert torch.equal(checkpoints[2].load()["weight"], model.weight)


def test_a_schedule_that_ends_at_zero_records_the_last_rate_above_it(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = CheckpointRecorder(tmp_path, every=2)
    recorder.step(model, optimizer)
    optimizer.param_groups[0]["lr"] = 0.0
    recorder.step(model, optimizer)
    assert [one.learning_rate for one in load_checkpoints(tmp_path)] == [0.1]


def test_the_rate_of_the_largest_group_is_recorded_with_a_warning(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    groups = [{"params": model[1].parameters(), "lr": 0.5}, {"params": model[0].parameters(), "lr": 0.1}]
    recorder = CheckpointRecorder(tmp_path, every=1)
    optimizer = torch.optim.SGD(groups)
    with pytest.warns(UserWarning, match=r"different learning rates; 0\.1 is recorded"):
        recorder.step(model, optimizer)
    recorder.step(model, optimizer)  # says so once
    assert [one.learning_rate for one in load_checkpoints(tmp_path)] == [0.1, 0.1]


def test_two_trainings_do_not_mix_in_a_directory(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    CheckpointRecorder(tmp_path, every=1).step(model, torch.optim.SGD(model.parameters(), lr=0.1))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(CheckpointError, match="pass resume=True"):
        CheckpointRecorder(tmp_path, every=1)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_misuse_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="every=0"):
        CheckpointRecorder(tmp_path, every=0)
    recorder = CheckpointRecorder(tmp_path, every=1)
    model = nn.Linear(3, 2)
    with pytest.raises(CheckpointError, match="call recorder"):
        recorder.save(model)
    with pytest.raises(CheckpointError, match="before scheduler"):
        recorder.step(model, torch.optim.SGD(model.parameters(), lr=0.0))


def write_for_ever(directory: Path, finished: Connection) -> None:
    """One life of a training: saves at every step weights that all equal the step, then tells the step."""
    model = nn.Linear(1000, 1000)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = CheckpointRecorder(directory, every=1, resume=True)
    while True:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(recorder.steps + 1)
        recorder.step(model, optimizer)
        finished.send(recorder.steps)


def live_and_be_killed(directory: Path, seconds: float, saving: bool) -> int:
    """Kill a writer some seconds after its first save, or at the next sight of a file that it is writing; returns the
    last step that it told."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["gradtrace.checkpoints.recorder", "torch._dynamo", "pytest"])
    ours, theirs = context.Pipe(duplex=False)
    writer = context.Process(target=write_for_ever, args=(directory, theirs))
    writer.start()
    theirs.close()
    told = [ours.recv()]
    time.sleep(seconds)
    while saving and not any(directory.glob("*.tmp")):
        pass
    writer.kill()
    writer.join()
    assert writer.exitcode == -signal.SIGKILL
    with contextlib.suppress(EOFError, OSError):
        while True:
            told.append(ours.recv())
    ours.close()
    return told[-1]


def test_killed_at_any_moment_every_finished_checkpoint_is_whole(tmp_path: Path) -> None:
    """The writer is killed at ever other moments, at least three times within a save, and goes on in its directory."""
    interrupted = lives = 0
    while interrupted < 3:
        told = live_and_be_killed(tmp_path, seconds=0.0013 * (lives % 12), saving=lives % 2 == 1)
        lives += 1
        assert lives < 60, "hardly a kill falls into a save: the test shows nothing"
        checkpoints = load_checkpoints(tmp_path)
        assert len(checkpoints) >= told
        assert [one.step for one in checkpoints] == list(range(1, len(checkpoints) + 1))
        for one in checkpoints:
            assert all(bool((weight == one.step).all()) for weight in one.load().values())
        interrupted += any(tmp_path.glob("*.tmp"))

    recorder = CheckpointRecorder(tmp_path, every=1, resume=True)
    assert recorder.steps == len(checkpoints)
    assert not list(tmp_path.glob("step-*.tmp"))


def run(recorder: CheckpointRecorder, losses: Sequence[float]) -> nn.Module:
    """One step for each loss, with weights that all equal the step."""
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for loss in losses:
        torch.nn.init.constant_(model.weight, recorder.steps + 1)
        recorder.step(model, optimizer, torch.tensor(loss))
    return model


def test_the_curve_holds_the_mean_loss_between_saves_and_goes_on_after_a_resume(tmp_path: Path) -> None:
    run(CheckpointRecorder(tmp_path, every=2), [3.0, 2.0, 1.0, 0.5])
    assert (tmp_path / "losses.csv").read_text() == "step,loss\n2,2.5\n4,0.75\n"
    run(CheckpointRecorder(tmp_path, every=2, resume=True), [0.5, 0.25])
    assert (tmp_path / "losses.csv").read_text() == "step,loss\n2,2.5\n4,0.75\n6,0.375\n"
    set_back = CheckpointRecorder(tmp_path, every=2, resume=True)
    set_back.steps = 2
    run(set_back, [1.0, 1.0])
    assert (tmp_path / "losses.csv").read_text() == "step,loss\n2,2.5\n4,1.0\n"


@pytest.mark.parametrize("resumed", [False, True])
def test_disk_holds_the_kept_checkpoints_only_and_they_divide_the_fall(tmp_path: Path, resumed: bool) -> None:
    fluctuating, falling, flat = [9.0, 10, 9, 10, 9, 10], [9.0 - step for step in range(9)], [0.9] * 20
    losses = [*fluctuating, *falling, *flat]
    recorder = CheckpointRecorder(tmp_path, every=1, keep=4)
    for start in range(0, len(losses), 5):
        run(recorder, losses[start : start + 5])
        if resumed:
            recorder = CheckpointRecorder(tmp_path, every=1, keep=4, resume=True)
        assert len(list(tmp_path.glob("*.safetensors"))) <= 4
    kept = load_checkpoints(tmp_path)
    assert kept[-1].step == len(losses)  # the newest
    assert all(6 < one.step <= 15 for one in kept[:-1])  # neither the fluctuating start nor the flat end
    for one in kept:
        assert bool((one.load()["weight"] == one.step).all())


def test_what_a_killed_training_had_given_up_is_removed_later(tmp_path: Path) -> None:
    run(CheckpointRecorder(tmp_path, every=1, keep=3), [3.0, 2.0, 1.0])
    for name in ("step-000000099.safetensors", "step-000000099.optimizer.safetensors"):
        (tmp_path / name).touch()
    CheckpointRecorder(tmp_path, every=1, keep=3, resume=True)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    assert len(load_checkpoints(tmp_path)) == 3


def test_keeping_some_needs_the_loss(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="keep=0"):
        CheckpointRecorder(tmp_path, every=1, keep=0)
    model = nn.Linear(3, 2)
    recorder = CheckpointRecorder(tmp_path, every=1, keep=2)
    with pytest.raises(CheckpointError, match=r"call recorder.step\(model, optimizer, loss\)"):
        recorder.step(model, torch.optim.SGD(model.parameters(), lr=0.1))


@pytest.mark.parametrize("text", ["step,loss\n1,x\n", "a,b\n1,2\n", "\x00"])
def test_a_damaged_curve_is_named(tmp_path: Path, text: str) -> None:
    run(CheckpointRecorder(tmp_path, every=1), [1.0])
    (tmp_path / "losses.csv").write_text(text)
    if text == "\x00":
        (tmp_path / "losses.csv").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match=r"losses.csv is damaged"):
        CheckpointRecorder(tmp_path, every=1, resume=True)


def recorded(recorder: CheckpointRecorder, steps: int, kind: type[torch.optim.Optimizer] = torch.optim.SGD) -> Tensor:
    """Train for some steps; the weights at the end."""
    model = nn.Linear(3, 2)
    optimizer = kind(model.parameters(), lr=0.01)  # type: ignore[call-arg]
    for _ in range(steps):
        sgd_step(model, optimizer)
        recorder.step(model, optimizer)
    return model.weight.detach().clone()


def test_the_end_of_the_block_keeps_the_final_weights(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with CheckpointRecorder(tmp_path, every=4) as recorder:
        weights = recorded(recorder, 10)
    assert [one.step for one in load_checkpoints(tmp_path)] == [4, 8, 10]
    assert torch.equal(load_checkpoints(tmp_path)[-1].load()["weight"], weights)
    del recorder
    assert not caplog.messages


def test_an_error_in_the_block_keeps_what_was_saved(tmp_path: Path) -> None:
    def interrupted(recorder: CheckpointRecorder) -> None:
        with recorder:
            recorded(recorder, 10)
            raise ZeroDivisionError

    recorder = CheckpointRecorder(tmp_path, every=4)
    with pytest.raises(ZeroDivisionError):
        interrupted(recorder)
    assert [one.step for one in load_checkpoints(tmp_path)] == [4, 8]
    recorder.finish()  # of who knows better
    assert [one.step for one in load_checkpoints(tmp_path)] == [4, 8, 10]


def test_an_interval_that_kept_nothing_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recorder = CheckpointRecorder(tmp_path, every=1000)
    recorded(recorder, 90)
    recorder.finish()
    recorder.finish()
    assert [one.step for one in load_checkpoints(tmp_path)] == [90]
    assert caplog.messages[0].startswith("every=1000 kept nothing in 90 steps")
    assert "with every=18 there are five" in caplog.messages[0]


def test_last_steps_that_are_not_kept_are_told_when_the_recorder_goes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = CheckpointRecorder(tmp_path / "a", every=4)
    recorded(recorder, 8)
    del recorder
    with contextlib.suppress(CheckpointError):
        CheckpointRecorder(tmp_path / "a", every=4)
    assert not caplog.messages
    recorder = CheckpointRecorder(tmp_path / "b", every=4)
    recorded(recorder, 10)
    del recorder
    recorder = CheckpointRecorder(tmp_path / "c", every=40)
    recorded(recorder, 10)
    del recorder
    assert ["step, 10, are not kept (those after step 8" in line for line in caplog.messages] == [True, False]
    assert "step, 10, are not kept (none is): call recorder.finish()" in caplog.messages[1]


def test_a_training_that_fails_is_told_nothing_of_its_weights(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def failing() -> None:
        with CheckpointRecorder(tmp_path, every=4) as recorder:
            recorded(recorder, 6)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failing()
    assert not caplog.messages


def test_a_block_without_steps_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with CheckpointRecorder(tmp_path, every=4):
        pass
    assert "recorder.step was never called" in caplog.messages[0]


@pytest.mark.parametrize("kept", [False, True])
def test_what_adam_without_its_moments_cannot_be_asked_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kept: bool
) -> None:
    with CheckpointRecorder(tmp_path, every=2, optimizer_state=kept) as recorder:
        recorded(recorder, 4, torch.optim.AdamW)
    assert len(caplog.messages) == (0 if kept else 1)
    assert kept or "tracin-adam and source will not answer: record with CheckpointRecorder(opt" in caplog.messages[0]
