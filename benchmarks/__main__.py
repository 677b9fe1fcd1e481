"""Small versions of all benchmarks; their tables go to runs/bench.md: `make bench`, minutes on 2 cores.

The digits always run. MNIST runs where GRADTRACE_DATA has it, and is trained if need be; CIFAR-10 where it was trained
before (`make demo DATASET=cifar10`). Every benchmark runs in a process of its own, and takes other sizes on its own
command line: `python -m benchmarks.fidelity --help`.
"""

from __future__ import annotations

import argparse
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from gradtrace.errors import DatasetError
from gradtrace.tasks import data_file

RUNS = Path("runs")
BENCHMARKS = {
    "digits": (
        ("Agreement with exact TracInCP", "fidelity digits --queries 100 --dimensions 512"),
        ("Rescoring and percentiles", "rescore digits --dimensions 512"),
        ("Gradient rows a second", "throughput digits"),
        ("Time of a query", "latency digits"),
        ("Search of sparse rows", "sparse --rows 1500 100000"),
        ("Killed builds, resumed", "kill_resume digits --shard-rows 128"),
        *(
            (f"Killed while a reader asks: {name}", f"kill_resume digits --operation {name} --shard-rows 128")
            for name in ("add", "append", "delete", "compact")
        ),
        ("What updates cost", "updates digits --dimensions 512"),
        ("What recording a training costs", "recording digits --dimensions 512"),
        ("What is said when something is wrong", "messages"),
    ),
    "mnist": (
        ("Agreement with exact TracInCP", "fidelity mnist --queries 50"),
        ("Precision and dimensions", "precision mnist --dimensions 512 2048 --queries 50"),
        ("Rescoring and percentiles", "rescore mnist"),
        ("Gradient rows a second", "throughput mnist"),
        ("Exact search", "search mnist"),
        ("Searchers", "searchers mnist --queries 20"),
        ("Time of a query", "latency mnist"),
        ("Memory of a build", "memory mnist"),
        ("What updates cost", "updates mnist"),
        ("What recording a training costs", "recording mnist"),
    ),
    "cifar10": (
        ("Gradient rows a second", "throughput cifar10"),
        ("Exact search", "search cifar10"),
        ("Exact search over many rows", "million cifar10 --rows 200000 --out runs/cifar10/many"),
        ("Time of a query", "latency cifar10"),
        ("Memory of a build", "memory cifar10 --rows 5000 10000 20000"),
        ("What recording a training costs", "recording cifar10 --rounds 6 --steps 4"),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("datasets", nargs="*", help=f"of {', '.join(BENCHMARKS)}; default: all that can be had")
    datasets = parser.parse_args().datasets or list(BENCHMARKS)
    if unknown := set(datasets) - set(BENCHMARKS):
        parser.error(f"there is no {', '.join(sorted(unknown))}; choose from {', '.join(BENCHMARKS)}")
    RUNS.mkdir(exist_ok=True)
    with (RUNS / "bench.md").open("w") as file:
        for text in report(datasets):
            print(text, flush=True)
            print(text, file=file, flush=True)
    if "**failed" in (RUNS / "bench.md").read_text():
        sys.exit("some benchmarks failed, see above")


def report(datasets: Sequence[str]) -> Iterator[str]:
    """The report in pieces, each as soon as it is there."""
    threads = f"{torch.get_num_threads()} threads of PyTorch {torch.__version__}"
    yield f"# Benchmarks\n\n{platform.machine()}, {platform.system()}, {threads}, Python {platform.python_version()}\n"
    for dataset in datasets:
        yield f"## {dataset}\n"
        obstacle = prepared(dataset)
        if obstacle:
            yield f"Left out: {obstacle}.\n"
            continue
        for title, command in BENCHMARKS[dataset]:
            yield f"### {title}\n\n{output(command)}"


def prepared(dataset: str) -> str | None:
    """Train if that takes a minute at most; what is in the way, if anything."""
    try:
        if dataset != "digits":
            data_file(f"{dataset}-train.npz")
    except DatasetError as error:
        return str(error)
    run = RUNS / dataset
    if (run / "checkpoints").is_dir():
        return None
    if dataset == "cifar10":
        return f"no {run / 'checkpoints'}; `make demo DATASET=cifar10` trains the model"
    unfinished = run / "training"  # renamed at the end, so that a run cut short is not taken for a whole one
    shutil.rmtree(unfinished, ignore_errors=True)
    subprocess.run([sys.executable, f"examples/{dataset}/train.py", "--out", str(unfinished)], check=True)
    (unfinished / "checkpoints").rename(run / "checkpoints")
    return None


def output(command: str) -> str:
    """What a benchmark prints, and how long it took."""
    started = time.perf_counter()
    words = [sys.executable, "-m", *f"benchmarks.{command}".split()]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True)
    state = f"**failed** with code {done.returncode}" if done.returncode else "done"
    return f"{done.stdout}\n`{command}`: {state} in {time.perf_counter() - started:.0f} s\n"


if __name__ == "__main__":
    main()
