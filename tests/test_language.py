"""Tasks of Hugging Face models: what counts in the loss, scores beside plain autograd, and the commands that need no
Python file."""

from __future__ import annotations

import copy
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typer.testing import CliRunner

import tiny_language
from conftest import FRAMEWORK_WARNINGS
from gradtrace import load_checkpoints
from gradtrace.checkpoints import load_into
from gradtrace.errors import CheckpointError, DatasetError, TaskError
from gradtrace.tasks import CausalLM
from gradtrace.tasks.language import LanguageOptions, TaskFile
from gradtrace.tasks.language.records import open_records
from gradtrace_indexer.task_loading import load_task
from gradtrace_service.cli import app
from gradtrace_service.indexes.hosted import hosted
from gradtrace_service.settings import Settings

pytestmark = [*FRAMEWORK_WARNINGS, pytest.mark.usefixtures("offline")]
TRAIN, QUERY = tiny_language.texts(24), tiny_language.texts(4, seed=1)


@pytest.fixture(scope="module")
def words() -> Any:
    return tiny_language.tokenizer()


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Trainer's output directory, beside it its data."""
    home = tmp_path_factory.mktemp("language")
    tiny_language.json_lines(home / "train.jsonl", [{"text": text} for text in TRAIN])
    tiny_language.json_lines(home / "test.jsonl", [{"text": text} for text in QUERY])
    return tiny_language.trained(tiny_language.gpt2(340), TRAIN, home / "run")


def mean_loss(model: nn.Module, ids: Tensor) -> Tensor:
    """Of one unpadded text, by hand."""
    logits = model(input_ids=ids[None]).logits[0]
    return F.cross_entropy(logits[:-1], ids[1:])


def gradient(model: nn.Module, loss: Tensor) -> Tensor:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, parameters)]).double()


def invoke(*words: object) -> str:
    done = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.mark.recipe
def test_a_trainers_directory_is_indexed_and_asked_in_a_line_each(output: Path, tmp_path: Path, words: Any) -> None:
    transformers = tiny_language.transformers
    data, queries = output.parent / "train.jsonl", output.parent / "test.jsonl"
    invoke("build", "--model", output, "--data", data, "--query-data", queries, "--out", tmp_path / "index",
           "--basis", "none", "--precision", "float16", "--batch-size", 8)  # fmt: skip
    answer = json.loads(invoke("query", tmp_path / "index", "--query-row", 0, "--k", 24, "--json"))
    hits = answer["results"][0]["proponents"] + answer["results"][0]["opponents"]
    scores = np.zeros((2, len(TRAIN)))
    for checkpoint in load_checkpoints(output):
        model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint.path).eval()
        ids = [torch.tensor(words(text)["input_ids"]) for text in [QUERY[0], *TRAIN]]
        of = [gradient(model, mean_loss(model, of_text) * (len(of_text) - 1)) for of_text in ids]  # as the Trainer's
        scores[0] += checkpoint.learning_rate * np.array([float(of[0] @ row) for row in of[1:]])
    for hit in hits:
        scores[1, hit["row"]] = hit["score"]
        assert hit["example"]["text"] == TRAIN[hit["row"]]
    assert np.corrcoef(scores)[0, 1] >= 0.9999


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's directory, of nothing that a training leaves."""
    return tiny_language.saved(tiny_language.gpt2(340), tmp_path_factory.mktemp("model") / "gpt2")


def test_what_names_no_task_is_refused_with_the_remedy(model: Path, tmp_path: Path) -> None:
    def said(*words: object) -> str:
        done = CliRunner().invoke(app, [str(word) for word in words])
        assert done.exit_code
        return " ".join(f"{done.output} {done.exception}".split())  # as wide as the terminal is

    data = tiny_language.json_lines(tmp_path / "train.jsonl", [{"text": text} for text in TRAIN])
    out = ("--out", tmp_path / "index")
    assert "name the task, or give the directory" in said("build", *out)
    assert "--model, --data" in said("build", "--model", model, *out)
    assert "beside TASK there is --data" in said("build", "my.py:TASK", "--data", data, *out)
    assert "--reduction: Input should be 'mean' or 'sum'" in said(
        "build", "--model", model, "--data", data, "--reduction", "max", *out
    )
    assert "there is no data in none.jsonl" in said("check", "--model", model, "--data", "none.jsonl")
    assert "there is no directory none" in said("check", "--model", "none", "--data", data)
    (tmp_path / "empty.jsonl").write_text("\n")
    assert "has no row" in said("check", "--model", model, "--data", tmp_path / "empty.jsonl")
    (tmp_path / "train.xml").write_text("<a/>")
    assert ".jsonl, .json, .csv, .parquet" in said("check", "--model", model, "--data", tmp_path / "train.xml")


def test_check_shows_the_tokens_that_count(model: Path, tmp_path: Path) -> None:
    records = [{"prompt": "who sees a cat ?", "completion": " the dog ."}, {"prompt": "the " * 70, "completion": "cat"}]
    data = tiny_language.json_lines(tmp_path / "train.jsonl", records * 3)
    words = ("check", "--model", model, "--data", data, "--dimensions", 16)
    shown = " ".join(invoke(*words).split())
    assert "who sees a cat ?⟦ the dog .</s>⟧" in shown
    assert "the loss of a row is the mean over its tokens that count" in shown
    assert "6 rows: 219 tokens, 64 in the longest; 12 (5%) count in the loss" in shown
    assert "3 rows were longer than 64 tokens and were cut" in shown
    assert "rows 1, 3, 5 have no token that counts in the loss" in shown
    report = json.loads(invoke(*words, "--json"))
    assert [["who sees a cat ?", False], [" the dog .</s>", True]] in report["examples"]
    assert report["estimate"]["disk_bytes"] > 0


def test_a_model_that_does_not_fit_is_told_before_it_is_loaded(model: Path, tmp_path: Path) -> None:
    large = tmp_path / "large"
    shutil.copytree(model, large)
    config = json.loads((large / "config.json").read_text())
    (large / "config.json").write_text(json.dumps({**config, "n_embd": 1 << 16, "n_layer": 60, "n_head": 64}))
    data = tiny_language.json_lines(tmp_path / "train.jsonl", [{"text": text} for text in TRAIN])
    checked = CliRunner().invoke(app, ["check", "--model", str(large), "--data", str(data)])
    assert checked.exit_code == 1
    shown = " ".join(checked.output.split())
    weights = 60 * 12 * 65536**2 * 4 * 2 / 1e9  # of four attention matrices and two of four times their size
    told = re.search(r"a build holds ([\d,.]+) GB", shown)
    assert told is not None, shown
    assert float(told[1].replace(",", "")) == pytest.approx(weights, rel=0.01)
    assert "--dtype bfloat16" in shown


def test_an_index_needs_no_task_to_be_served_and_grows_with_its_file(model: Path, tmp_path: Path) -> None:
    data = tiny_language.json_lines(tmp_path / "train.jsonl", [{"review": text} for text in TRAIN])
    index = tmp_path / "index"
    built = invoke("build", "--model", model, "--data", data, "--text", "review", "--out", index, "--dimensions", 16)
    assert f"{len(TRAIN)} rows" in built
    saved = json.loads((index / "task.json").read_text())
    given = {"kind": "CausalLM", "model": str(model), "data": str(data), "text": "review", "reduction": "mean"}
    assert saved == {**given, "representations": False, "dtype": "float32"}
    (served,) = hosted([str(index)], [], Settings())
    opened = served.open()
    (result,) = opened.influence([opened.task.parse({"text": QUERY[0]})], k=2)
    assert len(result.proponents) == 2
    with data.open("a") as file:
        file.write(json.dumps({"review": "the fish at the hill sees a bird ."}) + "\n")
    assert f"{len(TRAIN) + 1} rows" in invoke("append", index)
    (index / "task.json").unlink()
    with pytest.raises(TaskError, match="name it by --task"):
        hosted([str(index)], [], Settings())


def test_a_task_file_names_what_it_lacks(tmp_path: Path) -> None:
    for text, problem in {
        "{": "Invalid JSON",
        "{}": "model: Field required",
        '{"model": "a", "data": "b", "x": 1}': "x: ",
    }.items():
        (tmp_path / "task.json").write_text(text)
        with pytest.raises(TaskError, match=problem):
            load_task(str(tmp_path / "task.json"))
    with pytest.raises(TaskError, match="cannot be read"):
        load_task(str(tmp_path / "none.json"))


def test_files_of_all_kinds_hold_the_same_records(tmp_path: Path) -> None:
    import pandas

    records = [{"text": text, "label": row} for row, text in enumerate([*TRAIN, "two\nlines"])]
    frame = pandas.DataFrame(records)
    tiny_language.json_lines(tmp_path / "a.jsonl", records)
    frame.to_csv(tmp_path / "a.csv", index=False)
    frame.to_parquet(tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.csv", "a.parquet"):
        read = open_records(tmp_path / name)
        assert [read[row] for row in range(len(read))] == records
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    datasets.Dataset.from_list(records).save_to_disk(tmp_path / "saved")
    read = open_records(tmp_path / "saved")
    assert [read[row] for row in range(len(read))] == records
    datasets.DatasetDict({"train": datasets.Dataset.from_list(records)}).save_to_disk(tmp_path / "splits")
    with pytest.raises(DatasetError, match="holds the splits train; name one of them"):
        open_records(tmp_path / "splits")
    assert len(open_records(tmp_path / "splits" / "train")) == len(records)


def test_damaged_lines_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n\n{"text": \n[1]\n')
    records = open_records(tmp_path / "a.jsonl")
    assert len(records) == 3
    for row, problem in {1: "record 1: not JSON", 2: "record 2 is a list"}.items():
        with pytest.raises(DatasetError, match=problem):
            records[row]


def test_the_page_describes_every_option() -> None:
    page = (Path(__file__).parents[1] / "docs" / "language-models.md").read_text()
    for name in LanguageOptions.model_fields:
        assert f"`{name}`" in page
    flags = {flag.replace("-", "_") for flag in re.findall(r"--(?:no-)?([a-z-]+)", page)}
    assert set(TaskFile.model_fields) - flags <= {"text_pair", "prompt", "completion", "messages", "label"}


def test_the_commands_of_the_page_run(output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[1] / "docs" / "language-models.md").read_text()
    monkeypatch.chdir(tmp_path)
    shutil.copytree(output, tmp_path / "runs" / "gpt2")
    for name in ("train.jsonl", "test.jsonl"):
        shutil.copy(output.parent / name, tmp_path)
    commands = [words for words in re.findall(r"^gradtrace (.*)$", page, re.MULTILINE) if " U " not in words]
    assert len(commands) == 4
    for command in commands:
        invoke(*shlex.split(command), *(["--dimensions", "16"] if command.startswith(("check", "build")) else []))


@pytest.mark.recipe
def test_a_trainers_adapters_are_read_step_by_step(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    base = tiny_language.saved(tiny_language.llama(340), tmp_path / "base")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(tiny_language.transformers.AutoModelForCausalLM.from_pretrained(base), config)
    tiny_language.trained(model, TRAIN, tmp_path / "run")
    checkpoints = load_checkpoints(tmp_path / "run")
    assert [checkpoint.step for checkpoint in checkpoints] == [3, 6]
    copies = [copy.deepcopy(CausalLM(tmp_path / "run", [{}]).model()) for _ in checkpoints]
    for copied, checkpoint in zip(copies, checkpoints, strict=True):
        load_into(copied, checkpoint)
    first, last = (copied.state_dict() for copied in copies)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(last[name], value, rtol=0, atol=0)
        assert torch.equal(first[name], value) != (".default." in name)
    assert checkpoints[-1].keeps_second_moments(copies[-1])
    with pytest.raises(CheckpointError, match="the task's model has none"):
        load_into(tiny_language.llama(340), checkpoints[0])
    other = peft.LoraConfig(r=2, target_modules=["q_proj", "k_proj"], task_type="CAUSAL_LM")
    with pytest.raises(CheckpointError, match=r"missing: .*k_proj.lora_A"):
        load_into(peft.get_peft_model(tiny_language.llama(340), other), checkpoints[0])
