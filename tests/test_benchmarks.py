"""Every benchmark runs from end to end at a small size, as from its own command line."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

import digits_task
from gradtrace import CheckpointRecorder, load_checkpoints
from gradtrace.results import rescoring
from gradtrace_indexer import Retrainings, build_index, subset_outputs
from gradtrace_indexer.task_loading import import_source, load_task

ROOT = Path(__file__).parents[1]
KEPT = 2  # of the five checkpoints of the digits example
DIMENSIONS = 64


@dataclass(frozen=True)
class Smoke:
    """words: of the command line; {runs}, {index}, {made}, {tests} and {out} stand for paths
    data: whether it reads from GRADTRACE_DATA
    apart: in a process of its own, since it forks or sets what all of a process share
    peer: a library that it needs and that the development environment lacks"""

    words: str
    data: bool = False
    apart: bool = False
    peer: str | None = None


LANGUAGE = "--directory {out} --texts 24 --queries 3 --pretraining-texts 64 --halves 4"
PEERS = "digits --rows 64 --queries 4 --runs {runs}"
SMOKE = {
    "checkpoint_selection": Smoke("--rows 300 --epochs 8 --count 3 --seeds 1 --plot {out}/plot.png", data=True),
    "damage": Smoke("digits --index {index} --flips 2 --truncations 1 --seconds 0.1"),
    "fidelity": Smoke(f"digits --queries 4 --dimensions {DIMENSIONS} --basis gauss-newton --runs {{runs}}"),
    "hostile": Smoke("digits --index {index} --requests 8 --seconds 1"),
    "kill_operations": Smoke("--kills 11", apart=True),
    "kill_resume": Smoke(
        "--task {tests}/digits_task.py:TASK --checkpoints {made}/checkpoints --operation append --kills 1 "
        "--dimensions 32 --shard-rows 64 --runs {out}",
        apart=True,
    ),
    "latency": Smoke("digits --queries 3 --index {index}"),
    "lds": Smoke("--directory {out} --dimensions 64 --subsets 3 --seeds 1 --methods tracin influence", data=True),
    "load": Smoke("digits --index {index} --seconds 0.5 --clients 2 --batch-sizes 4 --swaps 1"),
    "memory": Smoke("digits --rows 200 --dimensions 32 --runs {runs}"),
    "messages": Smoke(""),
    "methods": Smoke("digits --queries 2 --index {index}"),
    "million": Smoke("digits --source {index} --out {out}/many --rows 3000 --checkpoints 1 --queries 64 --runs {runs}"),
    "models": Smoke("factorisation --rounds 1"),
    "neighbours": Smoke("digits digits --indexes {index} {index} --clients 2 1 --seconds 0.5"),
    "overhead": Smoke("digits --queries 3 --index {index}"),
    "peers.__main__": Smoke(PEERS, apart=True, peer="kronfluence"),
    "peers.ekfac": Smoke(PEERS, apart=True, peer="kronfluence"),
    "peers.language": Smoke(LANGUAGE, data=True, apart=True, peer="bergson"),
    "peers.tracincp": Smoke(PEERS, apart=True, peer="captum"),
    "peers.trak": Smoke(PEERS, apart=True, peer="trak"),
    "precision": Smoke(f"digits --dimensions 32 {DIMENSIONS} --queries 6 --runs {{runs}}"),
    "recording": Smoke("digits --rounds 1 --steps 1 --dimensions 16"),
    "restarts": Smoke("digits --index {index} --times 1 --clients 4 --seconds 0.5 --grace-seconds 0.5"),
    "rescore": Smoke(f"digits --queries 3 --dimensions {DIMENSIONS} --runs {{runs}}"),
    "search": Smoke("digits --queries 3 --index {index} --runs {runs}"),
    "searchers": Smoke("digits --queries 3 --index {index} --searchers progressive annoy:5 --runs {runs}"),
    "sharded_search": Smoke("--out {out} --rows 300 --dimensions 32 --shards 0 2 --clients 2 --seconds 1", apart=True),
    "soak": Smoke("digits --index {index} --requests 40"),
    "sparse": Smoke("--rows 70 300 --coordinates 64 --queries 16 --out {out}/sparse"),
    "throughput": Smoke(f"digits --rounds 1 --dimensions {DIMENSIONS} --runs {{runs}}"),
    "updates": Smoke(f"digits --checkpoints {KEPT} --dimensions 32 --runs {{runs}}"),
    "workers": Smoke("digits --rows 200 --last 1 --dimensions 32 --runs {runs}"),
}


def programs() -> list[str]:
    """The modules under benchmarks/ that are run by name, `benchmarks` itself apart."""
    files = (ROOT / "benchmarks").rglob("*.py")
    named = [file for file in files if 'if __name__ == "__main__":' in file.read_text()]
    names = [".".join(file.relative_to(ROOT / "benchmarks").with_suffix("").parts) for file in named]
    return sorted(set(names) - {"__main__"})


def test_every_benchmark_has_a_smoke_run() -> None:
    assert programs() == sorted(SMOKE), "give a new benchmark a line in SMOKE"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What benchmarks take for `runs/`: the digits example, trained briefly, and an index of it."""
    runs = tmp_path_factory.mktemp("runs")
    run, task = runs / "digits", load_task(f"{ROOT}/examples/digits/task.py:TASK")
    import_source(str(ROOT / "examples/digits/train.py")).train(task, run, epochs=2)
    listing = run / "checkpoints" / "checkpoints.json"
    content = json.loads(listing.read_text())
    listing.write_text(json.dumps(content | {"checkpoints": content["checkpoints"][-KEPT:]}))
    path = run / f"index-gauss-newton-{DIMENSIONS}-float16"
    checkpoints = load_checkpoints(run / "checkpoints")
    build_index(task, checkpoints, path, dimensions=DIMENSIONS, precision="float16", progress=False)
    return runs


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training run that takes no time."""
    made = tmp_path_factory.mktemp("made")
    digits_task.train(made / "checkpoints", steps=6)
    return made


@pytest.fixture
def at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Benchmarks are started at the root of a checkout."""
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(ROOT)


def run(*words: str) -> str:
    """What a program prints; it must succeed."""
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# They start services, train or kill processes for many seconds; what they measure has tests of its own.
LONG = {
    "checkpoint_selection",
    "damage",
    "fidelity",
    "hostile",
    "kill_operations",
    "kill_resume",
    "latency",
    "lds",
    "load",
    "memory",
    "messages",
    "models",
    "neighbours",
    "overhead",
    "restarts",
    "searchers",
    "sharded_search",
    "soak",
    "updates",
    "workers",
}


@pytest.mark.recipe
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long) if name in LONG else name for name in SMOKE]
)
def test_it_runs_and_prints_its_table(
    name: str,
    runs: Path,
    made: Path,
    tmp_path: Path,
    at_root: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    smoke = SMOKE[name]
    skip_without(smoke)
    if name == "lds":
        train_mnist6k_briefly(tmp_path / "run-0")
    monkeypatch.setattr(rescoring, "CANDIDATES", rescoring.CANDIDATES)  # which one of them sets
    index = runs / "digits" / f"index-gauss-newton-{DIMENSIONS}-float16"
    paths = {"runs": runs, "index": index, "made": made, "tests": ROOT / "tests", "out": tmp_path}
    words = smoke.words.format(**paths).split()
    if smoke.apart:
        printed = run("-m", f"benchmarks.{name}", *words)
    else:
        monkeypatch.setattr(sys, "argv", [name, *words])
        importlib.import_module(f"benchmarks.{name}").main()
        printed = capsys.readouterr().out
    table = [line for line in printed.splitlines() if line.startswith("|")]
    assert len(table) >= 3, printed  # a head, a rule and a line at least
    assert re.fullmatch(r"[|:-]+", table[1])


def skip_without(smoke: Smoke) -> None:
    if smoke.data and "GRADTRACE_DATA" not in os.environ:
        pytest.skip("GRADTRACE_DATA names no directory of data")
    if smoke.peer is not None:
        pytest.importorskip(smoke.peer, reason=f"{smoke.peer} is in the environment of `make peers` alone")


def train_mnist6k_briefly(directory: Path) -> None:
    """The example's training cut down to two checkpoints of its 1,692 steps."""
    directory.mkdir()
    task = load_task(f"{ROOT}/examples/mnist6k/task.py:TASK")
    recorder = CheckpointRecorder(directory / "checkpoints", every=5, batch_size=64)
    model = task.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9, weight_decay=1e-3)
    for _ in range(10):
        optimizer.zero_grad()
        task.loss(model, task.collate([task.train[row] for row in range(64)])).mean().backward()
        optimizer.step()
        recorder.step(model, optimizer)


@pytest.mark.recipe
@pytest.mark.long
def test_a_language_model_is_retrained_on_halves_of_its_texts(tmp_path: Path, at_root: None) -> None:
    skip_without(Smoke("", data=True))
    pytest.importorskip("transformers", reason="a development environment has it, and others may not")
    benchmark = importlib.import_module("benchmarks.wikitext")
    task = benchmark.Wikitext2(tmp_path, texts=8, queries=2, pretraining_texts=4)
    truth = subset_outputs(Retrainings(task, tmp_path / "truth", progress=False), 2, seeds=2)
    assert truth.outputs.shape == (2, 2, 2)
    assert not np.array_equal(truth.outputs[0], truth.outputs[1]), "both halves gave the same model"
    again = benchmark.Wikitext2(tmp_path, texts=8, queries=2)
    start, resumed = task.model().state_dict(), again.model().state_dict()
    assert all(torch.equal(start[name], resumed[name]) for name in start), "the kept weights are not those of the start"


@pytest.mark.recipe
@pytest.mark.long
@pytest.mark.parametrize("name", ["Rte", "Sst2"])
def test_a_classifier_of_texts_is_retrained_on_halves_of_its_rows(
    name: str, tmp_path: Path, at_root: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_without(Smoke("", data=True))
    outside = [path for path in sys.path if Path(path) != ROOT / "benchmarks"]  # other tests may have added it,
    monkeypatch.setattr(sys, "path", outside)  # and its datasets.py would hide the library of this name
    for library in ("accelerate", "transformers"):
        pytest.importorskip(library, reason="a development environment has it, and others may not")
    task = getattr(importlib.import_module("benchmarks.glue"), name)(tmp_path, train_rows=8, queries=4)
    truth = subset_outputs(Retrainings(task, tmp_path / "truth", progress=False), 2, seeds=2)
    assert truth.outputs.shape == (2, 2, 4)
    assert not np.array_equal(truth.outputs[0], truth.outputs[1]), "both halves gave the same model"
    start, trained = task.model(), task.fit(range(8), 0)
    assert not torch.equal(start.classifier.weight, trained.classifier.weight), "the weights of the start were trained"
    batch = task.collate([task.query[row] for row in range(4)])
    assert torch.equal(task.measurement(start, batch) < 0, task.predict(start, batch).argmax(1) == batch["label"])


@pytest.mark.recipe
@pytest.mark.long
def test_all_of_them_in_one_report(tmp_path: Path) -> None:
    """`make bench` with one small benchmark, for a data set that was trained before."""
    (tmp_path / "digits" / "checkpoints").mkdir(parents=True)
    chosen = {"digits": [("Recording", "recording digits --rounds 1 --steps 1 --dimensions 16")]}
    program = f"""
import sys
from pathlib import Path
import benchmarks.__main__ as bench
bench.RUNS, bench.BENCHMARKS = Path({str(tmp_path)!r}), {chosen!r}
sys.argv = ["benchmarks"]
bench.main()
"""
    printed = run("-c", program)
    assert "## digits" in printed
    assert "| HyDRA rows of 16 dimensions |" in printed
    assert re.search(r"`recording digits [^`]*`: done in \d+ s", printed)
    assert (tmp_path / "bench.md").read_text() == printed


def test_the_report_asks_for_what_the_benchmarks_take(
    at_root: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every command of `make bench` names a benchmark, a data set that it takes and options that it has."""
    benchmarks = importlib.import_module("benchmarks.__main__").BENCHMARKS
    helped: dict[str, str] = {}
    for command in (command for group in benchmarks.values() for _, command in group):
        name, *words = command.split()
        assert name in SMOKE
        if name not in helped:
            monkeypatch.setattr(sys, "argv", [name, "--help"])
            with pytest.raises(SystemExit, match=r"^0$"):
                importlib.import_module(f"benchmarks.{name}").main()
            helped[name] = capsys.readouterr().out
        for option in re.findall(r"--[a-z-]+", command):
            assert option in helped[name], command
        if words and not words[0].startswith("-"):
            choices = re.findall(r"\{([\w,]*)\}", helped[name])
            assert any(words[0] in choice.split(",") for choice in choices), command


def test_gradtraces_side_of_the_comparisons_runs_without_the_peers(runs: Path, tmp_path: Path, at_root: None) -> None:
    comparison = importlib.import_module("benchmarks.peers.comparison")
    scores = importlib.import_module("benchmarks.peers.gradtrace_scores")
    exact = importlib.import_module("benchmarks.exact")
    case = comparison.load_case("digits", runs, rows=64, queries=4)
    expected = exact.exact_tracin(case.task, case.checkpoints, case.queries)
    tracin = scores.tracin_scores(case, basis="none", precision="float16")
    np.testing.assert_allclose(tracin, expected, rtol=0.01, atol=1e-3 * np.abs(expected).max())
    others = [scores.trak_scores(case, tmp_path / "index")]
    for task, every_class in ((scores.TrueLabels(case.task), False), (scores.ModelLabels(case.task), True)):
        weights = torch.cat([batch.weights for batch in scores.fisher_examples(case, task)])
        assert (len(weights) > case.rows) is every_class
        assert float(weights.sum()) == pytest.approx(case.rows, rel=0.05)  # improbable classes are left out
        told = nullcontext() if every_class else pytest.warns(UserWarning, match="empirical Fisher")
        with told:
            others.append(scores.influence_scores(case, task))
    for found in others:
        assert found.shape == (4, 64)
        assert np.isfinite(found).all()
        assert (found.std(1) > 0).all()
    row = comparison.compared(case, "none", "tracin", (expected, 1.0), (tracin, 2.0))
    assert row.startswith("| none | tracin | digits | 64 | 1.00")
