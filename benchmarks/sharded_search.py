"""Search over row shards: `python -m benchmarks.sharded_search --out DIR`.

The index is a real one, of gradients of a small network: the rows are the digits of scikit-learn with noise, each with
another. A million rows at one checkpoint, of 2,048 columns in int8, are 2 KB each. Timed are the search alone, for one
query and for 16 at a time, over none, 2 and 4 shards, and the memory of each process; then a service over shards under
clients, one of whose shards is killed again and again.
"""

from __future__ import annotations

import argparse
import random
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import httpx
import numpy as np
import psutil
import torch
from numpy.typing import NDArray

from benchmarks.noisy_digits import NoisyDigitsTask
from benchmarks.search import timed
from benchmarks.serving import served
from gradtrace import CheckpointRecorder, Index, load_checkpoints, open_index
from gradtrace.models.queries import resolve_queries
from gradtrace.search.scored_rows import SearchResult
from gradtrace_indexer import build_index

_BATCH, _QUERIES, _WARM_UP, _K = 16, 64, 8, 10
_KILL_SECONDS = 3.0  # between two kills of a shard


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="keeps task, checkpoint and index")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dimensions", type=int, default=2048)
    parser.add_argument("--shards", type=int, nargs="+", default=[0, 2, 4])
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=20.0, help="of clients under kills; 0: none")
    arguments = parser.parse_args()
    if not (arguments.out / "index" / "manifest.json").exists():
        make(arguments.out, arguments.rows, arguments.dimensions)
    compare(arguments.out, arguments.rows, arguments.shards)
    if arguments.seconds:
        under_kills(arguments.out, arguments.rows, max(arguments.shards), arguments.clients, arguments.seconds)


def make(out: Path, rows: int, dimensions: int) -> None:
    """Train for a few steps, and build."""
    torch.manual_seed(0)
    task = NoisyDigitsTask(rows)
    model, started = task.model(), time.perf_counter()
    optimizer, recorder = torch.optim.SGD(model.parameters(), 0.3), CheckpointRecorder(out / "checkpoints", every=400)
    for step in range(400):
        examples = [task.train[row] for row in np.random.default_rng(step).integers(0, rows, 64)]
        batch = torch.stack([x for x, _ in examples]), torch.tensor([y for _, y in examples])
        optimizer.zero_grad()
        task.loss(model, batch).mean().backward()
        optimizer.step()
        recorder.step(model, optimizer)
    recorder.finish()
    source = f"from benchmarks.noisy_digits import NoisyDigitsTask\n\nTASK = NoisyDigitsTask({rows})\n"
    (out / "task.py").write_text(source)
    build_index(
        task,
        load_checkpoints(out / "checkpoints"),
        out / "index",
        basis="spectral",
        dimensions=dimensions,
        precision="int8",
    )
    print(f"built in {time.perf_counter() - started:.0f} s\n", flush=True)


def compare(out: Path, rows: int, counts: Sequence[int]) -> None:
    print(
        f"| shards of {rows:,} rows | ready after, s | one query: median / 95 %, ms | batch of {_BATCH}: ms a query | "
        "memory of a service's worker, MB | of each of its shards | of that, private |\n"
        "|--:|--:|--:|--:|--:|--:|--:|",
        flush=True,
    )
    expected: list[SearchResult] | None = None
    for count in counts:
        spent, index = timed(partial(open_index, out / "index", NoisyDigitsTask(rows), shards=count, verify=False))
        results = measure(out, index, count, spent)
        check(results, expected or results)
        expected = expected or results
        index.close()


def measure(out: Path, index: Index, count: int, opened: float) -> list[SearchResult]:
    """Print a line; what was found."""
    scoring = index.scoring("tracin")
    examples = [index.task.query[row] for row in range(_QUERIES + _WARM_UP)]
    vectors, _ = scoring.query_vectors(resolve_queries(index.contents.last_model, examples, None))
    alone = [timed(partial(scoring.search, query[None], _K, None)) for query in vectors]
    batches = [
        timed(partial(scoring.search, batch, _K, None))[0] / _BATCH for batch in vectors[_WARM_UP:].split(_BATCH)
    ]
    times = [spent for spent, _ in alone][_WARM_UP:]
    print(
        f"| {count or 'none'} | {opened / 1e3:.1f} | {np.median(times):.1f} / {np.quantile(times, 0.95):.1f} "
        f"| {np.median(batches):.1f} | {memory(out, count)} |",
        flush=True,
    )
    return [results[0] for _, results in alone]


def memory(out: Path, count: int) -> str:
    """Of a service's worker and of each of its shards, once it has answered: cells of the table. Of mapped pages that
    several processes have, each counts for a part."""
    with served(out / "index", f"{out}/task.py:TASK", "--shards", str(count)) as service:
        httpx.post(f"{service.url}/influence", json={"train_rows": [0]}, timeout=600)
        worker, shards = processes(service.process)
        private = [f"{shard.memory_full_info().uss / 1e6:,.0f}" for shard in shards]
        return f"{megabytes([worker])} | {megabytes(shards)} | {', '.join(private)}"


def megabytes(processes: Sequence[psutil.Process]) -> str:
    return ", ".join(f"{process.memory_full_info().pss / 1e6:,.0f}" for process in processes)


def processes(service: int) -> tuple[psutil.Process, list[psutil.Process]]:
    """A service's worker, and its shards. They are forked from a process of the worker, which is forked from one of the
    service."""
    below = {child: child.ppid() for child in psutil.Process(service).children(recursive=True)}
    parents = {child.pid: parent for child, parent in below.items()}
    (worker,) = (child for child, parent in below.items() if parents.get(parent) == service)
    return worker, [child for child, parent in below.items() if parents.get(parent) == worker.pid]


def check(results: Sequence[SearchResult], expected: Sequence[SearchResult]) -> None:
    """The same rows and scores, to the last bit."""
    for result, one in zip(results, expected, strict=True):
        for end, other in ((result.top, one.top), (result.bottom, one.bottom)):
            assert end.rows.tolist() == other.rows.tolist()
            assert end.scores.tobytes() == other.scores.tobytes()


Answer = tuple[tuple[int, float], ...]


class Clients:
    """Ask all the while about one row after the other. right: by row, answered before"""

    def __init__(self, url: str, rows: Sequence[int]) -> None:
        self._http = httpx.Client(base_url=url, timeout=120, limits=httpx.Limits(max_connections=None))
        self._rows, self._lock = rows, threading.Lock()
        self.right = {row: self.ask(row) for row in rows}
        self.heard: Counter[str] = Counter()
        self.milliseconds: list[float] = []

    def ask(self, row: int) -> Answer | str:
        """The hits, or the status and kind of the refusal."""
        response = self._http.post("/influence", json={"train_rows": [row], "k": _K})
        if response.status_code != 200:
            return f"{response.status_code} {response.json()['type']}"
        (result,) = response.json()["results"]
        return tuple((hit["row"], hit["score"]) for end in ("proponents", "opponents") for hit in result[end])

    def ask_until(self, end: float, seed: int) -> None:
        draw = random.Random(seed)
        while time.monotonic() < end:
            row = draw.choice(self._rows)
            spent, answer = timed(partial(self.ask, row))
            right = not isinstance(answer, str) and is_right(answer, self.right[row])
            with self._lock:
                self.milliseconds.append(spent)
                self.heard["right" if right else answer if isinstance(answer, str) else "wrong"] += 1


def is_right(answer: Answer, right: Answer | str) -> bool:
    """Up to the rounding of another batch, in the query's gradient."""
    return len(answer) == len(right) and np.allclose(values(answer), values(right), rtol=1e-4, atol=0)


def values(answer: Answer | str) -> NDArray[np.float64]:
    return np.array(answer, dtype=np.float64)


def under_kills(out: Path, rows: int, shards: int, count: int, seconds: float) -> None:
    with served(out / "index", f"{out}/task.py:TASK", "--shards", str(shards)) as service:
        clients = Clients(service.url, range(0, rows, rows // 50))
        kills, until = 0, time.monotonic() + seconds
        with ThreadPoolExecutor(count) as pool:
            asking = [pool.submit(clients.ask_until, until, seed) for seed in range(count)]
            while time.monotonic() < until - _KILL_SECONDS / 2:
                kills += kill_shard(service.process)
                time.sleep(min(_KILL_SECONDS, seconds / 3))
            for each in asking:
                each.result()
    p50, p99 = np.percentile(clients.milliseconds, [50, 99])
    heard = ", ".join(f"{times:,} x {what}" for what, times in clients.heard.items())
    print(
        f"\n{count} clients of a service over {shards} shards, {kills} of which were killed in {seconds:.0f} s, heard "
        f"{heard}; median {p50:.0f} ms, 99 % {p99:.0f} ms, longest {max(clients.milliseconds):.0f} ms"
    )


def kill_shard(service: int) -> int:
    """The number of shards killed: one, or none where none is there."""
    _, shards = processes(service)
    for shard in shards[:1]:
        shard.kill()
    return len(shards[:1])


if __name__ == "__main__":
    main()
