from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from gradtrace.checkpoints import Checkpoint, Optimizer, load_checkpoints, load_into
from gradtrace.errors import CheckpointError

pytestmark = pytest.mark.unit


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3))


def write_index(directory: Path, *entries: dict[str, Any], **others: Any) -> None:
    (directory / "checkpoints.json").write_text(json.dumps({"checkpoints": entries, **others}))


def entry(file: str, step: int = 1, learning_rate: float = 0.1) -> dict[str, Any]:
    return {"file": file, "step": step, "learning_rate": learning_rate}


def assert_same_state(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=0)


def test_a_directory_is_read_in_the_order_of_its_steps(tmp_path: Path) -> None:
    for name in ("late.pt", "early.pth"):
        torch.save(network().state_dict(), tmp_path / name)
    save_file(network().state_dict(), tmp_path / "middle.safetensors")
    optimizer = {"name": "sgd", "momentum": 0.9, "weight_decay": 0.0}
    entries = [entry("late.pt", 30, 0.01), entry("early.pth", 10, 0.3), entry("middle.safetensors", 20, 0.1)]
    write_index(tmp_path, *entries, optimizer=optimizer, batch_size=64)

    checkpoints = load_checkpoints(str(tmp_path))

    assert [(one.name, one.step, one.learning_rate) for one in checkpoints] == [
        ("early.pth", 10, 0.3),
        ("middle.safetensors", 20, 0.1),
        ("late.pt", 30, 0.01),
    ]
    assert {one.optimizer for one in checkpoints} == {Optimizer("sgd", 0.9, 0.0)}
    assert {one.batch_size for one in checkpoints} == {64}
    for one in checkpoints:
        assert_same_state(one.load(), dict(network().state_dict()))
        assert one.sha256() == hashlib.sha256(one.path.read_bytes()).hexdigest()


def test_optimizer_and_batch_size_may_be_left_out_and_folders_named(tmp_path: Path) -> None:
    (tmp_path / "epoch").mkdir()
    torch.save(network().state_dict(), tmp_path / "epoch/1.pt")
    write_index(tmp_path, entry("epoch/1.pt"))
    assert load_checkpoints(tmp_path) == [Checkpoint(tmp_path / "epoch/1.pt", 1, 0.1)]


@pytest.mark.parametrize("key", [None, "state_dict", "model_state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_usual_nestings_and_wrapper_prefixes_are_taken_off(tmp_path: Path, key: str | None, prefix: str) -> None:
    state = network().state_dict()
    wrapped = OrderedDict((prefix + name, value) for name, value in state.items())
    torch.save({key: wrapped, "epoch": 3, "optimizer": {"lr": 0.1}} if key else wrapped, tmp_path / "a.pt")
    assert_same_state(Checkpoint(tmp_path / "a.pt", 1, 0.1).load(), dict(state))


def test_a_compiled_model_and_a_model_whose_own_child_is_called_module_load_their_weights(tmp_path: Path) -> None:
    class Wrapper(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            self.module = network(seed)

    for build in (Wrapper, lambda seed: torch.compile(network(seed), backend="eager")):
        model, other = build(0), build(1)
        torch.save(model.state_dict(), tmp_path / "a.pt")
        load_into(other, Checkpoint(tmp_path / "a.pt", 1, 0.1))
        assert_same_state(dict(other.state_dict()), dict(model.state_dict()))


def test_a_parameter_called_model_is_no_nesting(tmp_path: Path) -> None:
    torch.save({"model": torch.ones(2)}, tmp_path / "a.pt")
    assert list(Checkpoint(tmp_path / "a.pt", 1, 0.1).load()) == ["model"]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight


def test_a_tied_weight_may_be_left_out_of_the_file(tmp_path: Path) -> None:
    weight = torch.randn(5, 4)
    save_file({"embedding.weight": weight}, tmp_path / "a.safetensors")
    model = Tied()
    load_into(model, Checkpoint(tmp_path / "a.safetensors", 1, 0.1))
    assert torch.equal(model.head.weight, weight)


def test_weights_that_do_not_fit_are_named_and_nothing_is_loaded(tmp_path: Path) -> None:
    state = network(1).state_dict()
    state["extra"] = torch.ones(1)
    state["3.weight"] = torch.ones(2, 8)
    del state["0.bias"]
    torch.save(state, tmp_path / "a.pt")
    model = network(0)
    with pytest.raises(CheckpointError) as caught:
        load_into(model, Checkpoint(tmp_path / "a.pt", 1, 0.1))
    text = str(caught.value)
    assert "missing: 0.bias" in text
    assert "unexpected: extra" in text
    assert "of another shape: 3.weight (checkpoint [2, 8], model [3, 8])" in text
    assert_same_state(dict(model.state_dict()), dict(network(0).state_dict()))


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("touched-by-a-pickle"),)


@pytest.mark.parametrize("content", [Evil(), {"state_dict": network()}, {"weight": torch.ones(1), "note": Path("x")}])
def test_pickles_that_need_code_are_refused_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"never loaded; save `model.state_dict\(\)` alone"):
        Checkpoint(tmp_path / "a.pt", 1, 0.1).load()
    assert not Path("touched-by-a-pickle").exists()


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (torch.ones(3), "a Tensor"),
        ({}, "an empty mapping"),
        ([torch.ones(3)], "a list"),
        ({"weight": torch.ones(1), "epoch": 3}, "not named tensors (epoch)"),
        ({1: torch.ones(1)}, "not named tensors (1)"),
    ],
)
def test_a_file_without_a_state_dict_is_refused(tmp_path: Path, content: Any, found: str) -> None:
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(tmp_path / "a.pt", 1, 0.1).load()
    assert found in str(caught.value)
    assert "save `model.state_dict()`" in str(caught.value)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@given(data=st.data())
def test_truncated_files_are_refused(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("truncated") / f"a{suffix}"
    state = network().state_dict()
    torch.save(state, path) if suffix == ".pt" else save_file(state, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(CheckpointError, match="damaged"):
        Checkpoint(path, 1, 0.1).load()


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@given(content=st.binary(max_size=200))
def test_files_of_any_bytes_are_refused(tmp_path_factory: pytest.TempPathFactory, suffix: str, content: bytes) -> None:
    path = tmp_path_factory.mktemp("bytes") / f"a{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError):
        Checkpoint(path, 1, 0.1).load()


def test_a_file_that_vanished_is_named(tmp_path: Path) -> None:
    gone = Checkpoint(tmp_path / "gone.pt", 1, 0.1)
    with pytest.raises(CheckpointError, match=r"gone\.pt is missing"):
        gone.load()
    with pytest.raises(CheckpointError, match=r"gone\.pt cannot be read"):
        gone.sha256()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "malformed"),
        ("[]", "malformed"),
        ('{"checkpoints": [{"file": "a.pt", "step": 1}]}', "checkpoints.0.learning_rate: Field required"),
        ('{"checkpoints": [{"file": "a.pt", "step": 1, "learning_rate": 0}]}', "greater than 0"),
        ('{"checkpoints": [{"file": "a.pt", "step": 1, "learning_rate": NaN}]}', "checkpoints.0.learning_rate"),
        ('{"checkpoints": [{"file": "a.pt", "step": -1, "learning_rate": 1}]}', "checkpoints.0.step"),
        ('{"checkpoints": [{"file": "a.pt", "step": 1, "lr": 1}]}', "checkpoints.0.lr: Extra inputs"),
        ('{"checkpoints": [], "batch_size": 0}', "batch_size"),
        ('{"checkpoints": []}', "lists no checkpoint"),
    ],
)
def test_a_malformed_index_is_refused_naming_the_field(tmp_path: Path, text: str, message: str) -> None:
    torch.save(network().state_dict(), tmp_path / "a.pt")
    (tmp_path / "checkpoints.json").write_text(text)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoints(tmp_path)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "file", ["../a.pt", "/a.pt", "b/../../a.pt", "..", "", ".", "..\\a.pt", "a.txt", "checkpoints.json"]
)
def test_file_names_that_leave_the_directory_or_are_no_weights_are_refused(tmp_path: Path, file: str) -> None:
    write_index(tmp_path, entry(file))
    with pytest.raises(CheckpointError, match="names"):
        load_checkpoints(tmp_path)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([entry("a.pt", 1), entry("b.pt", 1)], "the same step more than once"),
        ([entry("a.pt", 1), entry("a.pt", 2)], "the same file name more than once"),
        ([entry("x/a.pt", 1), entry("y/a.pt", 2)], "the same file name more than once"),
        ([entry("a.pt", 1), entry("gone.pt", 2)], "names gone.pt, which is missing"),
    ],
)
def test_repeated_and_missing_entries_are_refused(tmp_path: Path, entries: list[dict[str, Any]], message: str) -> None:
    for name in ("a.pt", "b.pt"):
        torch.save(network().state_dict(), tmp_path / name)
    write_index(tmp_path, *entries)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoints(tmp_path)


def test_without_an_index_the_message_holds_one_to_fill_in(tmp_path: Path) -> None:
    torch.save(network().state_dict(), tmp_path / "a.pt")
    torch.save(network().state_dict(), tmp_path / "b.pt")
    with pytest.raises(CheckpointError) as caught:
        load_checkpoints(tmp_path)
    text = str(caught.value)
    template = text[text.index("{") :].replace('"step": ?', '"step": 1', 1).replace('"step": ?', '"step": 2', 1)
    (tmp_path / "checkpoints.json").write_text(template.replace("?", "0.1"))
    assert [one.name for one in load_checkpoints(tmp_path)] == ["a.pt", "b.pt"]


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no directory"):
        load_checkpoints(tmp_path / "nowhere")
