"""How well each method predicts retraining on half of the rows: `python -m benchmarks.lds --dimensions 2048 all`.

The linear datamodeling score on MNIST-6k, whose training runs come from `python examples/mnist6k/train.py`. What the
ground truth lacks is trained first (`--workers`); all indexes and methods are measured against the same one.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.datasets import task_spec
from gradtrace.checkpoints import load_checkpoints
from gradtrace_indexer import Retrainings, build_index, subset_outputs
from gradtrace_indexer.evaluate import measured
from gradtrace_indexer.task_loading import load_task

_ALL = "all"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dimensions", nargs="+", default=["1024", "2048", "8192", _ALL], help='numbers, or "all"')
    parser.add_argument("--runs", type=int, default=1, help="Training runs in an index, whose scores are averaged.")
    parser.add_argument("--precision", default="int8")
    parser.add_argument("--methods", nargs="+", help="Default: all that the index answers by.")
    parser.add_argument("--subsets", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--directory", type=Path, default=Path("runs/mnist6k"), help="Has run-0 ... and truth.")
    parser.add_argument("--indexes", type=Path, help="Where to build them; default: the directory.")
    arguments = parser.parse_args()
    spec = task_spec("mnist6k")
    task, directory = load_task(spec), arguments.directory
    retrainings = Retrainings(spec, directory / "truth", workers=arguments.workers)
    truth = subset_outputs(retrainings, arguments.subsets, arguments.seeds)
    examples = retrainings.examples
    runs = [load_checkpoints(directory / f"run-{run}" / "checkpoints") for run in range(arguments.runs)]
    weights = sum(weight.numel() for weight in task.model().parameters())
    print(
        f"{len(examples)} queries, {len(truth.subsets)} halves x {truth.outputs.shape[1]} seeds; "
        f"{len(runs)} run(s) of {len(runs[0])} checkpoints, {arguments.precision}\n\n"
        "| dimensions a checkpoint | method | LDS | 95 % interval | ms a query |\n|--:|---|--:|---|--:|"
    )
    for dimensions in arguments.dimensions:
        index = build_index(
            task,
            runs if len(runs) > 1 else runs[0],
            (arguments.indexes or directory) / f"index-{dimensions}-{arguments.precision}-runs-{len(runs)}",
            dimensions=weights if dimensions == _ALL else int(dimensions),
            precision=arguments.precision,
        )
        for method in arguments.methods or index.methods:
            print(f"| {dimensions} | {method} | {measured(index, examples, truth, method)} |", flush=True)


if __name__ == "__main__":
    main()
