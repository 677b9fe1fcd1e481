"""The command line, run as its users run it."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import digits_task
from conftest import DigitsRun, program
from gradtrace import QueryError
from gradtrace_client import Client, InfluenceAnswer
from gradtrace_indexer import set_searcher
from gradtrace_service import cli
from gradtrace_service.app import create_app
from gradtrace_service.server import serving

TASK = digits_task.TASK
COMMAND = ["-m", "gradtrace_service"]


def run(*words: str, code: int = 0) -> str:
    """Output of a command in a process of its own."""
    done = subprocess.run([sys.executable, *COMMAND, *words], capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def invoke(*words: str) -> str:
    """Output of a command in this process."""
    result = CliRunner().invoke(cli.app, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def url(digits_index: DigitsRun) -> Iterator[str]:
    with serving(create_app(digits_index.open())) as address:
        yield address


def test_one_program_has_the_commands_of_every_room() -> None:
    shown = invoke("--help")
    offline = (
        "build",
        "select",
        "update",
        "append",
        "delete",
        "compact",
        "kernels",
        "representer",
        "rollback",
        "prune",
        "discard",
        "verify",
        "info",
    )
    for command in (*offline, "evaluate", "bench", "serve", "query", "demo", "doctor"):
        assert re.search(rf"\b{command}\b", shown)


def test_query_prints_both_ends(url: str) -> None:
    shown = invoke("query", url, "--query-row", "3", "--k", "4")
    with Client(url) as client:
        result = client.influence(query_rows=[3], k=4).results[0]
    for hit in result.proponents + result.opponents:
        assert re.search(rf"\b{hit.row}\b.*{re.escape(f'{hit.score:+.4g}')}.*{hit.label_name}", shown)
    assert shown.index("Proponents") < shown.index("Opponents")
    assert "exact search of 400 rows" in shown


def test_query_shows_what_its_options_add(url: str) -> None:
    words = ("query", url, "--query-row", "3", "--query-row", "5", "--aggregate", "mean", "--rescore", "--k", "4")
    shown = invoke(*words, "--include", "layers", "--include", "percentiles", "--filter", '{"labels": ["five", 3]}')
    with Client(url) as client:
        asked = {"query_rows": [3, 5], "aggregate": "mean", "rescore": True, "k": 4, "filter": {"labels": [5, 3]}}
        result = client.influence(**asked, include=["percentiles"]).results[0]
    assert "The mean of 2 rows of the query data (3, 5)" in shown
    for hit in result.proponents:
        assert re.search(rf"\b{hit.row}\b.*{re.escape(f'{hit.score:+.4g}')}.*{hit.percentile:.2f} %", shown)
    for words_of in ("strongest layers", "rescored by full gradients", "scores of all rows", r"rescoring [\d.]+ \("):
        assert re.search(words_of, " ".join(shown.split()))


def test_query_takes_an_image_and_prints_json(url: str, tmp_path: Path) -> None:
    image, label = TASK.query[4]
    Image.fromarray(TASK.normalise.inverse(image)[:, :, 0]).save(tmp_path / "four.png")
    asked = ("--k", "2", "--json", "--filter", '{"correct_only": true}')
    shown = invoke("query", url, "--image", str(tmp_path / "four.png"), "--label", digits_task.NAMES[label], *asked)
    answer = InfluenceAnswer.model_validate_json(shown)
    assert answer.results[0].query.label == label
    payload = json.dumps({"image": np.asarray(Image.open(tmp_path / "four.png")).tolist(), "label": label})
    again = InfluenceAnswer.model_validate_json(invoke("query", url, "--example", payload, *asked))
    assert again.results == answer.results


def test_query_asks_an_index_directory_too(url: str, digits_index: DigitsRun) -> None:
    asked = ("--train-row", "1", "--train-row", "2", "--k", "3", "--method", "cosine", "--json")
    local = InfluenceAnswer.model_validate_json(
        invoke("query", str(digits_index.index), "--task", digits_index.task, *asked)
    )
    remote = InfluenceAnswer.model_validate_json(invoke("query", url, *asked))
    assert [[hit.row for hit in result.proponents] for result in local.results] == [
        [hit.row for hit in result.proponents] for result in remote.results
    ]


WRONG = {
    "row": (["query", "{url}", "--query-row", "60"], "its rows are 0 to 59"),
    "no question": (["query", "{url}"], "exactly one of"),
    "no task": (["query", "{index}", "--query-row", "1"], "name it by --task"),
    "no service": (["query", "http://127.0.0.1:9", "--query-row", "1"], "is `gradtrace serve` running there"),
    "not JSON": (["query", "{url}", "--example", "{{"], "--example is not JSON"),
    "not an object": (["query", "{url}", "--example", "[1]"], "must be a JSON object"),
    "two examples": (
        ["query", "{url}", "--example", "{{}}", "--image", "{task_file}"],
        "give one of --example, --image",
    ),
    "label alone": (["query", "{url}", "--query-row", "1", "--label", "3"], "--label belongs to --image"),
    "no task file": (["serve", "{index}", "--task", "nothing.py:TASK"], "there is no file nothing.py"),
    "no index": (["serve", "{nowhere}", "--task", "{task}"], "no index at"),
}


@pytest.mark.parametrize(("words", "message"), WRONG.values(), ids=WRONG.keys())
def test_an_error_ends_in_one_line_with_the_remedy(
    url: str,
    digits_index: DigitsRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    names = {"url": url, "index": digits_index.index, "task": digits_index.task, "nowhere": tmp_path}
    names["task_file"] = digits_task.__file__
    monkeypatch.setattr(sys, "argv", ["gradtrace", *(word.format(**names) for word in words)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert message in shown


def test_memory_that_runs_out_ends_a_command_in_one_line(digits_index: DigitsRun, tmp_path: Path) -> None:
    greedy = tmp_path / "greedy.py"
    greedy.write_text("import numpy as np\nTASK = np.empty(1 << 60, dtype=np.uint8)\n")
    shown = run("update", str(digits_index.index), "--task", f"{greedy}:TASK", code=1)
    assert "memory ran out" in shown
    assert "--batch-size" in shown
    assert "Traceback" not in shown


def test_build_serve_ask_and_stop(digits_index: DigitsRun, tmp_path: Path) -> None:
    built = tmp_path / "index"
    checkpoints = str(digits_index.checkpoints)
    invoke("build", digits_index.task, "--checkpoints", checkpoints, "--out", str(built), "--dimensions", "64")
    assert "is whole" in invoke("verify", str(built))
    assert "400 rows" in invoke("info", str(built))
    words = ["serve", str(built), "--task", digits_index.task, "--port", "0"]
    with program(*COMMAND, *words, stderr=subprocess.PIPE) as server:
        assert server.stderr is not None
        address = next(found for line in server.stderr if (found := re.search(r"http://[\d.]+:\d+", line)))
        with Client(address.group()) as client:
            assert client.influence(query_rows=[0], k=1).index.dimensions == 64
        server.send_signal(signal.SIGINT)
        server.stderr.read()
    assert server.returncode == 0


def test_the_life_of_an_index(digits_index: DigitsRun, tmp_path: Path) -> None:
    """Through the commands alone: built at two of three checkpoints, then updated, cut down, compacted, rolled back."""
    shutil.copytree(digits_index.checkpoints, tmp_path / "checkpoints")
    listing = tmp_path / "checkpoints" / "checkpoints.json"
    whole = json.loads(listing.read_text())
    listing.write_text(json.dumps(whole | {"checkpoints": whole["checkpoints"][:2]}))
    index, task = str(tmp_path / "index"), ("--task", digits_index.task)
    run_of = ("--checkpoints", str(tmp_path / "checkpoints"))
    invoke("build", digits_index.task, *run_of, "--out", index, "--dimensions", "64")
    listing.write_text(json.dumps(whole))
    for _ in range(2):
        assert "400 rows x 3 checkpoints" in invoke("update", index, *task, *run_of)
    assert "generation 2" in invoke("append", index, *task)
    assert "387 rows" in invoke("delete", index, "--rows", "0, 17,30-39", "--rows", "399")
    assert "generation 4" in invoke("compact", index)
    shown = invoke("info", index)
    assert "387 present, 0 deleted, 13 deleted and compacted" in shown
    assert "generation 3 (delete rows)" in shown
    assert "generation 1 (build)" in shown
    assert "is whole" in invoke("verify", index, "--all")
    assert "400 rows x 2 checkpoints" in invoke("rollback", index, "1")
    assert "400 rows x 2 checkpoints" in invoke("prune", index, "--keep", "1")
    assert "kept" not in invoke("info", index)
    assert "no last layer refitted" in invoke("info", index)
    assert "sum of the rows' shares" in invoke("representer", index, "--l2", "0.01")
    assert "refitted on them with l2 0.01" in invoke("info", index)
    assert "nothing unfinished" in invoke("discard", index)
    assert "is whole" in invoke("verify", index, "--all")


def test_bench_measures_an_index_with_and_without_its_searcher(digits_index: DigitsRun, tmp_path: Path) -> None:
    shutil.copytree(digits_index.checkpoints, tmp_path / "checkpoints")
    shutil.copytree(digits_index.index, tmp_path / "index")
    set_searcher(tmp_path / "index", digits_task.TASK, "faiss:IVF20,Flat;nprobe=1", progress=False)
    words = ("bench", str(tmp_path / "index"), "--task", digits_index.task, "--queries", "10")
    lines = [[cell.strip() for cell in line.split("|")] for line in invoke(*words).splitlines() if line[:1] == "|"]
    assert [line[1:3] for line in lines[2:]] == [
        ["progressive", "1"],
        ["progressive", "8"],
        ["faiss:IVF20,Flat;nprobe=1", "1"],
        ["faiss:IVF20,Flat;nprobe=1", "8"],
        ["all scores", "1"],
    ]
    assert lines[2][8:10] == ["1.000", "1.000"]
    assert float(lines[4][8]) < 1  # one list in twenty does not hold all
    assert all(float(cell.replace(",", "")) > 0 for line in lines[2:6] for cell in line[3:7])  # "1,234.5" a second


def test_evaluate_trains_once_and_compares_methods(digits_index: DigitsRun, tmp_path: Path) -> None:
    task = f"{digits_task.__file__}:RETRAINED"
    words = ["evaluate", str(digits_index.index), "--task", task, "--truth", str(tmp_path / "truth")]
    words += ["--subsets", "12", "--seeds", "1"]
    shown = invoke(*words, "--queries", "20")
    cells = {name: line.split(" | ") for name, line in re.findall(r"^\| ([\w-]+) \| (.*) \|$", shown, re.MULTILINE)}
    cells.pop("method", None)
    assert set(cells) == set(digits_index.open().methods)
    assert 0.1 < float(cells["tracin"][0]) < 1
    low, high = map(float, cells["tracin"][1].split(" to "))
    assert low < float(cells["tracin"][0]) < high
    trained = {path: path.stat().st_mtime_ns for path in (tmp_path / "truth").rglob("*.npy")}
    assert len(trained) == 12
    again = invoke(*words, "--method", "tracin")
    assert f"| tracin | {cells['tracin'][0]} | {cells['tracin'][1]} |" in again
    with pytest.raises(QueryError, match="unknown method 'tracing'"):
        invoke(*words, "--method", "tracing", "--seeds", "2")
    assert trained == {path: path.stat().st_mtime_ns for path in (tmp_path / "truth").rglob("*.npy")}


REFUSING = """
from digits_task import NAMES, TASK as PLAIN, Retrained

class Refusing(Retrained):
    def fit(self, rows, seed):
        assert not {3, *range(7, 40)} & set(rows), rows
        return super().fit(rows, seed)

TASK = Refusing(PLAIN.model, PLAIN.train, PLAIN.query, class_names=NAMES)
"""


@pytest.mark.usefixtures("copied_run")
def test_evaluate_trains_on_no_row_that_is_deleted(tmp_path: Path) -> None:
    (tmp_path / "retrained.py").write_text(REFUSING)
    invoke("delete", str(tmp_path / "index"), "--rows", "3,7-39")
    words = ["evaluate", str(tmp_path / "index"), "--task", f"{tmp_path / 'retrained.py'}:TASK"]
    words += ["--truth", str(tmp_path / "truth"), "--subsets", "12", "--seeds", "1", "--queries", "20"]
    shown = invoke(*words, "--method", "tracin", "--method", "graddot")
    cells = dict(re.findall(r"^\| ([\w-]+) \| ([-.\d]+) \|", shown, re.MULTILINE))
    assert set(cells) == {"tracin", "graddot"}
    assert all(0.1 < float(score) < 1 for score in cells.values())
    with pytest.raises(QueryError, match="no kernel"):
        invoke(*words, "--method", "trak", "--seeds", "2")
    assert len(list((tmp_path / "truth").rglob("*.npy"))) == 12


@pytest.mark.parametrize("rows", ["", "a", "3-", "-3", "5-4", "1,,2", "1.5"])
def test_rows_to_delete_that_are_no_numbers(digits_index: DigitsRun, rows: str) -> None:
    with pytest.raises(QueryError, match="names no rows"):
        invoke("delete", str(digits_index.index), f"--rows={rows}")


def test_watching_until_interrupted(digits_index: DigitsRun, tmp_path: Path) -> None:
    shutil.copytree(digits_index.index.parent, tmp_path / "run")
    words = ["update", str(tmp_path / "run" / "index"), "--task", digits_index.task, "--watch", "--interval", "0.2",
             "--checkpoints", str(tmp_path / "run" / "checkpoints")]  # fmt: skip
    listing = tmp_path / "run" / "checkpoints" / "checkpoints.json"
    content = json.loads(listing.read_text())
    last = content["checkpoints"][-1]
    with program(*COMMAND, *words, stdout=subprocess.PIPE) as watching:
        assert watching.stdout is not None
        assert "Watching" in watching.stdout.readline()
        shutil.copy(listing.parent / last["file"], listing.parent / "later.safetensors")
        more = last | {"file": "later.safetensors", "step": last["step"] + 1}
        changed = listing.with_suffix(".new")
        changed.write_text(json.dumps(content | {"checkpoints": [*content["checkpoints"], more]}))
        changed.replace(listing)  # whole, whenever it is looked at
        assert "400 rows x 4 checkpoints" in watching.stdout.readline()
        watching.send_signal(signal.SIGINT)
        assert "run it again to continue" in watching.stdout.read()
    assert watching.returncode == 0


@pytest.mark.recipe
def test_demo_serves_until_interrupted_and_uses_again_what_is_there(tmp_path: Path) -> None:
    words = ["demo", "--port", "0", "--out", str(tmp_path / "run")]
    unbuffered = os.environ | {"PYTHONUNBUFFERED": "1"}
    with program(*COMMAND, *words, stdout=subprocess.PIPE, env=unbuffered) as demo:
        assert demo.stdout is not None
        first = "".join(itertools.takewhile(lambda line: line != "Press Ctrl-C to stop.\n", demo.stdout))
        for stage in ("Training: done in", "Index: done in", "Asking: done in", "Proponents", "Opponents", "/docs"):
            assert stage in first
        address = re.search(r"Serving at (http://\S+?);", first)
        assert address is not None
        with Client(address.group(1)) as client:
            assert client.self_influence(k=1).rows_total == client.index().rows
        assert httpx.post(f"{address.group(1)}/reindex", json={"index": "digits"}).status_code == 202
        demo.send_signal(signal.SIGINT)
        assert "Stopped." in demo.stdout.read()
    assert demo.returncode == 0
    again = run(*words, "--once")
    assert "Training: done" not in again
    assert tables(again) == tables(first)


def tables(shown: str) -> list[str]:
    return [line for line in shown.splitlines() if line.startswith("│")]
