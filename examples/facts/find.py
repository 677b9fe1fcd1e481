"""Find the rows that planted wrong answers: builds an index, and prints how many of them are among the first hits.

The queries are questions in other words with the wrong answers. BM25, which only compares words, is the baseline. A
question whose answer is unknown has nothing else to go by; here it sees the wrong symbol, and the rows that name it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from gradtrace import load_checkpoints
from gradtrace.tasks import CausalLM
from gradtrace_indexer import build_index

FIRST = (3, 10)


def main(out: Path) -> None:
    planted = [json.loads(line)["rows"] for line in (out / "query.jsonl").read_text().splitlines()]
    task = CausalLM(out / "model", out / "train.jsonl", out / "query.jsonl")
    assert task.query is not None
    questions = [task.query[number] for number in range(len(planted))]
    print(
        f"| rows | method | {' | '.join(f'in the first {count}' for count in FIRST)} |\n|---|---|{'--:|' * len(FIRST)}"
    )
    for kind in ("sparse", "dense"):
        index = build_index(task, load_checkpoints(out / "model"), out / f"{kind}-index", rows=kind, progress=False)
        for method in index.methods:
            order = np.argsort(-index.scores(questions, method=method), axis=1, kind="stable")
            shares = [found(order[:, :count], planted) for count in FIRST]
            print(f"| {kind} | {method} | {' | '.join(f'{share:.0%}' for share in shares)} |", flush=True)


def found(first: np.ndarray, planted: list[list[int]]) -> float:
    """The share of the planted rows that are among each question's first ones. first: [questions, rows]"""
    return float(np.mean([np.isin(rows, hits).mean() for rows, hits in zip(planted, first, strict=True)]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/facts"))
    main(parser.parse_args().out)
