"""Checkpoints that the real frameworks write, and the recorder as their callback: tiny models, a few steps, offline."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conftest import FRAMEWORK_WARNINGS
from gradtrace.checkpoints import Checkpoint, Optimizer, load_checkpoints, load_into
from gradtrace.checkpoints.recorder import CheckpointRecorder
from gradtrace.errors import CheckpointError
from gradtrace.task import Task
from gradtrace_indexer import build_index

pytestmark = [*FRAMEWORK_WARNINGS, pytest.mark.usefixtures("offline")]
RATE = 0.02


def assert_weights(checkpoint: Checkpoint, model: nn.Module, wanted: dict[str, Tensor]) -> None:
    load_into(model, checkpoint)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, wanted[name], rtol=0, atol=0)


def rates(schedule: list[float], steps: list[int]) -> list[float]:
    return [pytest.approx(schedule[step - 1]) for step in steps]


def sums(schedule: list[float], steps: list[int]) -> list[float]:
    """Of the rates of all steps up to each."""
    return [pytest.approx(sum(schedule[:step])) for step in steps]


class TestTransformers:
    """A BERT of 8 dimensions."""

    LINEAR: ClassVar = [RATE * (1 - step / 7) for step in range(7)]  # the Trainer's default schedule, by step

    @staticmethod
    def model(seed: int = 0) -> Any:
        transformers = pytest.importorskip("transformers", reason="transformers is not installed")
        torch.manual_seed(seed)
        return transformers.BertForSequenceClassification(
            transformers.BertConfig(
                vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
                max_position_embeddings=8, num_labels=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
            )
        )  # fmt: skip

    @classmethod
    def rows(cls) -> list[dict[str, Any]]:
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(20, (28, 6), generator=generator)
        return [{"input_ids": row, "labels": int(row[0]) % 2} for row in tokens]

    @classmethod
    def trained(cls, directory: Path, callbacks: Any = (), **arguments: Any) -> Any:
        transformers = pytest.importorskip("transformers", reason="transformers is not installed")
        pytest.importorskip("accelerate", reason="accelerate is not installed, which the Trainer needs")
        settings = {
            "max_steps": 7, "save_steps": 3, "logging_steps": 2, "learning_rate": RATE, "weight_decay": 0.1,
            "per_device_train_batch_size": 4, "report_to": [], "use_cpu": True, "disable_tqdm": True, **arguments,
        }  # fmt: skip
        trainer = transformers.Trainer(
            cls.model(),
            transformers.TrainingArguments(str(directory), **settings),
            train_dataset=cls.rows(),
            callbacks=list(callbacks),
        )
        trainer.train()
        return trainer

    def test_a_trainers_directory(self, tmp_path: Path) -> None:
        trainer = self.trained(tmp_path)
        checkpoints = load_checkpoints(tmp_path)
        assert [(one.name, one.step) for one in checkpoints] == [
            ("checkpoint-3", 3), ("checkpoint-6", 6), ("checkpoint-7", 7),
        ]  # fmt: skip
        # Logged at steps 2, 4 and 6: 3 lies halfway to the next step's rate, which the optimizer holds, and so does 7.
        assert [one.learning_rate for one in checkpoints] == rates(self.LINEAR, [3, 6, 7])
        assert [one.learning_rate_sum for one in checkpoints] == sums(self.LINEAR, [3, 6, 7])
        assert {one.optimizer for one in checkpoints} == {Optimizer("adamw", 0.0, 0.1)}
        assert_weights(checkpoints[-1], self.model(1), trainer.model.state_dict())
        alone = load_checkpoints(tmp_path / "checkpoint-6")
        assert [one.step for one in alone] == [6]

    def test_second_moments_by_name(self, tmp_path: Path) -> None:
        trainer = self.trained(tmp_path)
        found = load_checkpoints(tmp_path)[-1].second_moments(self.model(1))
        assert found is not None
        state = trainer.optimizer.state_dict()["state"]
        parameters = [p for group in trainer.optimizer.param_groups for p in group["params"]]
        moments = {id(p): state[number]["exp_avg_sq"] for number, p in enumerate(parameters)}
        named = dict(trainer.model.named_parameters())
        assert found.by_name.keys() == named.keys()
        for name, parameter in named.items():
            torch.testing.assert_close(found.by_name[name], moments[id(parameter)] / (1 - 0.999**7))

    def test_without_an_optimizer_the_log_is_taken_as_it_ends(self, tmp_path: Path) -> None:
        self.trained(tmp_path, save_only_model=True)
        checkpoints = load_checkpoints(tmp_path)
        assert [one.learning_rate for one in checkpoints] == rates(self.LINEAR, [2, 6, 6])
        # The first one's log ends at step 2, with one rate, that of the second at step 6, with three in a line.
        assert checkpoints[0].learning_rate_sum == pytest.approx(3 * self.LINEAR[1])
        assert checkpoints[1].learning_rate_sum == pytest.approx(sum(self.LINEAR[:6]))
        assert {one.optimizer for one in checkpoints} == {None}
        assert checkpoints[0].second_moments(self.model()) is None

    def test_without_a_log_the_optimizers_rate_is_taken_and_without_both_it_is_refused(self, tmp_path: Path) -> None:
        self.trained(tmp_path, logging_strategy="no", save_steps=4, max_steps=4, lr_scheduler_type="constant")
        (checkpoint,) = load_checkpoints(tmp_path)
        assert checkpoint.learning_rate == RATE
        assert checkpoint.learning_rate_sum == pytest.approx(4 * RATE)
        (tmp_path / "checkpoint-4/optimizer.pt").unlink()
        with pytest.raises(CheckpointError, match=r"has no learning rate.*logging_steps"):
            load_checkpoints(tmp_path)

    def test_sharded_weights(self, tmp_path: Path) -> None:
        trainer = self.trained(tmp_path)
        folder = tmp_path / "checkpoint-7"
        (folder / "model.safetensors").unlink()
        trainer.model.save_pretrained(folder, max_shard_size="2KB")
        assert len(list(folder.glob("model-*.safetensors"))) > 1
        checkpoint = load_checkpoints(tmp_path)[-1]
        assert_weights(checkpoint, self.model(1), trainer.model.state_dict())
        before = checkpoint.sha256()
        shard = sorted(folder.glob("model-*.safetensors"))[-1]
        shard.write_bytes(shard.read_bytes()[:-1] + b"\x7f")
        assert checkpoint.sha256() != before
        (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../a.safetensors"}}')
        with pytest.raises(CheckpointError, match="maps no weights to files beside it"):
            checkpoint.load()

    def test_a_directory_whose_parts_are_missing_or_damaged(self, tmp_path: Path) -> None:
        self.trained(tmp_path)
        shutil.rmtree(tmp_path / "checkpoint-3")
        (tmp_path / "checkpoint-6/model.safetensors").unlink()
        with pytest.raises(CheckpointError, match=r"checkpoint-6 holds no model\.safetensors"):
            load_checkpoints(tmp_path)[0].load()
        (tmp_path / "checkpoint-6/trainer_state.json").write_text("{}")
        with pytest.raises(CheckpointError, match="lacks global_step"):
            load_checkpoints(tmp_path)

    def test_an_index_is_built_from_a_trainers_directory_and_opens_again(self, tmp_path: Path) -> None:
        import gradtrace

        self.trained(tmp_path / "run")
        make, rows = self.model, self.rows()

        class Sentences(Task):
            train = rows

            def model(self) -> nn.Module:
                model: nn.Module = make()
                return model

            def loss(self, model: nn.Module, batch: Any) -> Tensor:
                return F.cross_entropy(model(batch["input_ids"]).logits, batch["labels"], reduction="none")

        task = Sentences()
        checkpoints = load_checkpoints(tmp_path / "run")
        built = build_index(task, checkpoints, tmp_path / "index", dimensions=32, progress=False)
        opened = gradtrace.open_index(tmp_path / "index", task)
        wanted = built.scores([rows[0]])
        torch.testing.assert_close(torch.from_numpy(opened.scores([rows[0]])), torch.from_numpy(wanted))

    def test_the_callback_records_the_rates_that_were_used(self, tmp_path: Path) -> None:
        pytest.importorskip("transformers", reason="transformers is not installed")
        from gradtrace.integrations.transformers import RecorderCallback

        recorder = CheckpointRecorder(tmp_path / "recorded", every=2, optimizer_state=True)
        trainer = self.trained(tmp_path / "run", [RecorderCallback(recorder)], logging_steps=1)
        recorded = load_checkpoints(tmp_path / "recorded")
        assert [one.step for one in recorded] == [2, 4, 6, 7]
        assert [one.learning_rate for one in recorded] == rates(self.LINEAR, [2, 4, 6, 7])
        assert [one.learning_rate_sum for one in recorded] == sums(self.LINEAR, [2, 4, 6, 7])
        assert {one.optimizer for one in recorded} == {Optimizer("adamw", 0.0, 0.1)}
        assert_weights(recorded[-1], self.model(1), trainer.model.state_dict())
        theirs = {one.step: one for one in load_checkpoints(tmp_path / "run")}
        for one in recorded:
            if one.step in theirs:
                torch.testing.assert_close(one.load(), theirs[one.step].load(), rtol=0, atol=0)
        ours, saved = (one.second_moments(self.model()) for one in (recorded[-1], theirs[7]))
        assert ours is not None
        assert saved is not None
        torch.testing.assert_close(ours.by_name, saved.by_name)
        logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        lines = (tmp_path / "recorded/losses.csv").read_text().split()
        assert float(lines[2].split(",")[1]) == pytest.approx((logged[1] + logged[2]) / 2)


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


class TestAccelerate:
    SCHEDULE: ClassVar = [RATE * (1 - 0.9 * step / 6) for step in range(7)]  # LinearLR from 1 to .1 in 6 steps

    def trained(self, directory: Path, adam: bool = True, names: str = "state_{}", schedule: bool = True) -> nn.Module:
        accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
        accelerator = accelerate.Accelerator(cpu=True)
        model = Perceptron()
        kind = torch.optim.AdamW if adam else torch.optim.SGD
        optimizer = kind(model.parameters(), lr=RATE)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=6)
        model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
        if not schedule:
            accelerator._schedulers.clear()
        recorder = CheckpointRecorder(directory.with_name("recorded"), every=2)
        for step in range(1, 5):
            loss = model(torch.randn(4, 3)).square().mean()
            accelerator.backward(loss)
            optimizer.step()
            recorder.step(model, optimizer, loss)
            scheduler.step()
            optimizer.zero_grad()
            if step % 2 == 0:
                accelerator.save_state(str(directory / names.format(step)))
        network: nn.Module = accelerator.unwrap_model(model)
        return network

    @pytest.mark.parametrize(
        ("adam", "names", "schedule"), [(True, "state_{}", False), (False, "step_{}", False), (False, "x{}", True)]
    )
    def test_saved_states(self, tmp_path: Path, adam: bool, names: str, schedule: bool) -> None:
        model = self.trained(tmp_path / "states", adam, names, schedule)
        checkpoints = load_checkpoints(tmp_path / "states")
        assert [(one.name, one.step) for one in checkpoints] == [(names.format(step), step) for step in (2, 4)]
        assert [one.learning_rate for one in checkpoints] == rates(self.SCHEDULE, [2, 4])
        assert [one.learning_rate_sum for one in checkpoints] == sums(self.SCHEDULE, [2, 4])
        assert {one.optimizer for one in checkpoints} == {Optimizer("adamw", 0.0, 0.01) if adam else Optimizer("sgd")}
        assert_weights(checkpoints[-1], Perceptron(), model.state_dict())
        assert (checkpoints[-1].second_moments(Perceptron()) is None) == (not adam)

    def test_the_recorder_sees_through_the_wrapped_optimizer(self, tmp_path: Path) -> None:
        self.trained(tmp_path / "states")
        recorded = load_checkpoints(tmp_path / "recorded")
        assert {one.optimizer for one in recorded} == {Optimizer("adamw", 0.0, 0.01)}
        assert [one.learning_rate for one in recorded] == rates(self.SCHEDULE, [2, 4])
        assert [one.learning_rate_sum for one in recorded] == sums(self.SCHEDULE, [2, 4])

    def test_a_state_without_a_step_and_one_of_two_models_are_refused(self, tmp_path: Path) -> None:
        self.trained(tmp_path / "states", adam=False, names="epoch{}", schedule=False)
        with pytest.raises(CheckpointError, match="name the folder step_NUMBER"):
            load_checkpoints(tmp_path / "states")
        shutil.copy(tmp_path / "states/epoch2/model.safetensors", tmp_path / "states/epoch2/model_1.safetensors")
        with pytest.raises(CheckpointError, match="several models or optimizers"):
            load_checkpoints(tmp_path / "states")


class TestLightning:
    SCHEDULE: ClassVar = [RATE * (1 - step / 6) for step in range(7)]  # LinearLR from 1 to 0 in 6 steps

    def trained(self, directory: Path, callbacks: Any = (), note: Any = None, **arguments: Any) -> nn.Module:
        lightning = pytest.importorskip("lightning", reason="lightning is not installed")

        class Module(lightning.LightningModule):  # type: ignore[name-defined, misc]
            def __init__(self, note: Any = None) -> None:
                super().__init__()
                self.save_hyperparameters()
                self.net = Perceptron()

            def training_step(self, batch: Tensor, _: int) -> Tensor:
                return self.net(batch).square().mean()

            def configure_optimizers(self) -> Any:
                optimizer = torch.optim.AdamW(self.parameters(), lr=RATE)
                schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=6)
                return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

        saver = lightning.pytorch.callbacks.ModelCheckpoint(
            directory, every_n_train_steps=2, save_top_k=-1, save_last=True
        )
        trainer = lightning.Trainer(
            max_steps=6, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
            callbacks=[saver, *callbacks], **arguments,
        )  # fmt: skip
        torch.manual_seed(0)
        module = Module(note)
        trainer.fit(module, torch.utils.data.DataLoader(torch.randn(48, 3), 4))
        network: nn.Module = module
        return network

    def test_saved_files(self, tmp_path: Path) -> None:
        module = self.trained(tmp_path)
        checkpoints = load_checkpoints(tmp_path)
        assert [(one.name, one.step) for one in checkpoints] == [
            ("epoch=0-step=2.ckpt", 2), ("epoch=0-step=4.ckpt", 4), ("epoch=0-step=6.ckpt", 6),
        ]  # fmt: skip
        assert [one.learning_rate for one in checkpoints] == rates(self.SCHEDULE, [2, 4, 6])
        assert [one.learning_rate_sum for one in checkpoints] == sums(self.SCHEDULE, [2, 4, 6])
        assert {one.optimizer for one in checkpoints} == {Optimizer("adamw", 0.0, 0.01)}
        assert_weights(checkpoints[-1], Perceptron(), module.net.state_dict())  # type: ignore[union-attr, operator]
        assert_weights(checkpoints[-1], type(module)(), dict(module.state_dict()))
        found = checkpoints[-1].second_moments(Perceptron())
        assert found is not None
        assert found.by_name.keys() == dict(Perceptron().named_parameters()).keys()

    def test_a_schedule_of_epochs_holds_its_rate_in_between(self, tmp_path: Path) -> None:
        lightning = pytest.importorskip("lightning", reason="lightning is not installed")
        used: list[float] = []

        class Module(lightning.LightningModule):  # type: ignore[name-defined, misc]
            def __init__(self) -> None:
                super().__init__()
                self.net = Perceptron()

            def training_step(self, batch: Tensor, _: int) -> Tensor:
                return self.net(batch).square().mean()

            def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
                used.append(float(optimizer.param_groups[0]["lr"]))

            def configure_optimizers(self) -> Any:
                optimizer = torch.optim.SGD(self.parameters(), lr=RATE)
                return [optimizer], [torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 3], 0.1)]

        saver = lightning.pytorch.callbacks.ModelCheckpoint(tmp_path, save_top_k=-1)
        trainer = lightning.Trainer(
            max_epochs=4, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
            callbacks=[saver],
        )  # fmt: skip
        trainer.fit(Module(), torch.utils.data.DataLoader(torch.randn(20, 3), 4))
        checkpoints = load_checkpoints(tmp_path)
        assert [one.step for one in checkpoints] == [5, 10, 15, 20]
        assert [one.learning_rate for one in checkpoints] == rates(used, [5, 10, 15, 20])
        assert [one.learning_rate_sum for one in checkpoints] == sums(used, [5, 10, 15, 20])

    def test_hyperparameters_that_are_objects_are_refused_with_the_remedy(self, tmp_path: Path) -> None:
        self.trained(tmp_path, note=Path("x"))
        with pytest.raises(CheckpointError, match=r"never loaded.*save_hyperparameters\(ignore="):
            load_checkpoints(tmp_path)

    def test_files_of_weights_only_and_of_others_are_refused_with_the_remedy(self, tmp_path: Path) -> None:
        torch.save({"state_dict": Perceptron().state_dict()}, tmp_path / "a.ckpt")
        with pytest.raises(CheckpointError, match="not Lightning's; record checkpoints"):
            load_checkpoints(tmp_path)
        torch.save({"pytorch-lightning_version": "2", "global_step": 3, "state_dict": {}}, tmp_path / "a.ckpt")
        with pytest.raises(CheckpointError, match=r"state of 0 optimizers.*save_weights_only=False"):
            load_checkpoints(tmp_path)

    @pytest.mark.parametrize("accumulate", [1, 2])
    def test_the_callback_records_the_rates_that_were_used(self, tmp_path: Path, accumulate: int) -> None:
        pytest.importorskip("lightning", reason="lightning is not installed")
        from gradtrace.integrations.lightning import RecorderCallback

        recorder = CheckpointRecorder(tmp_path / "recorded", every=4)
        self.trained(tmp_path / "run", [RecorderCallback(recorder)], accumulate_grad_batches=accumulate)
        recorded = load_checkpoints(tmp_path / "recorded")
        assert [one.step for one in recorded] == [4, 6]
        assert [one.learning_rate for one in recorded] == rates(self.SCHEDULE, [4, 6])
        assert [one.learning_rate_sum for one in recorded] == sums(self.SCHEDULE, [4, 6])
        theirs = {one.step: one for one in load_checkpoints(tmp_path / "run")}
        for one in recorded:
            torch.testing.assert_close(one.load(), theirs[one.step].load(), rtol=0, atol=0)
        assert len((tmp_path / "recorded/losses.csv").read_text().split()) == 3


def test_a_list_may_name_directories_of_weights(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    (tmp_path / "checkpoint-5").mkdir()
    save_file(Perceptron().state_dict(), tmp_path / "checkpoint-5/model.safetensors")
    entry = {"file": "checkpoint-5", "step": 5, "learning_rate": 0.1}
    (tmp_path / "chosen.json").write_text(json.dumps({"checkpoints": [entry]}))
    (checkpoint,) = load_checkpoints(tmp_path / "chosen.json")
    assert checkpoint.name == "checkpoint-5"
    assert checkpoint.load().keys() == Perceptron().state_dict().keys()
