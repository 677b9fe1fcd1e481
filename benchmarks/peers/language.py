"""A small GPT-2 (`benchmarks.wikitext`) asked by Gradtrace, bergson and kronfluence.

Each library scores the same texts for the same queries at the same last checkpoint, in a process of its own. The linear
datamodeling score says how well that predicts retraining on halves of the texts; what is missing of these trainings is
trained first, and takes minutes. Times are of the processor, so that other programs hardly change them.
"""

from __future__ import annotations

import argparse
import logging
import resource
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from benchmarks.lds import TASKS, train
from benchmarks.peers.comparison import Scores, timed
from benchmarks.wikitext import Wikitext2
from gradtrace.evaluation import linear_datamodeling_score
from gradtrace_indexer import Retrainings, subset_outputs
from gradtrace_indexer.evaluation.ground_truth import SubsetOutputs

HEADER = (
    "| library | setting | queries | LDS | 95 % interval | texts/s built | of training's, batch 16 | of 64 "
    "| one query, CPU ms | in 16, CPU ms each | bytes a text | peak MB |\n"
    "|---|---|--:|--:|---|--:|--:|--:|--:|--:|--:|--:|"
)
_TOGETHER = 16  # queries of a batch
_SINGLE, _SECONDS = 6, 5.0  # queries asked one by one, at most, and no more after so many seconds
_STEPS = 6  # of training, that are timed


class Library(Protocol):
    """What a library is asked for. Its constructor takes the task and the checkpoint's path."""

    def build(self, directory: Path) -> None:
        """All that is made before there is a query."""

    def scores(self, queries: Tensor) -> Scores:
        """Positive for texts that lower the query's loss. queries: int64 [queries, tokens]"""

    def bytes(self) -> int:
        """That are kept of the texts, all together; without what does not grow with them."""


@dataclass(frozen=True)
class Contender:
    """maker: `module:class` under `benchmarks.peers`, so that only its process imports the library.
    queries: at most so many are asked, None: all"""

    library: str
    setting: str
    maker: str
    options: dict[str, object]
    queries: int | None = None


CONTENDERS = {
    "gradtrace": Contender("Gradtrace", "`influence`, 1 checkpoint", "gradtrace_language:SparseRows", {"count": 1}),
    "gradtrace-3": Contender("Gradtrace", "`influence`, 3 checkpoints", "gradtrace_language:SparseRows", {"count": 3}),
    "cosine": Contender("bergson", "store, cosine (defaults)", "bergson_language:Bergson", {"unit_norm": True}),
    "projected": Contender(
        "bergson", "store of 16 x 16, cosine", "bergson_language:Bergson", {"projection": 16, "unit_norm": True}
    ),
    "trackstar": Contender(
        "bergson",
        "store of 16 x 16, Hessian, cosine",
        "bergson_language:Bergson",
        {"projection": 16, "unit_norm": True, "hessian": "autocorrelation"},
    ),
    "ekfac": Contender("bergson", "store, EK-FAC", "bergson_language:Bergson", {"hessian": "kfac"}),
    "ekfac-head": Contender(
        "bergson", "store, EK-FAC, with the head", "bergson_language:Bergson", {"hessian": "kfac", "head": True}
    ),
    "ekfac-cg": Contender("bergson", "EK-FAC + CG", "bergson_refined:Refined", {}, queries=8),
    "kronfluence-blocks": Contender(
        "kronfluence", "EK-FAC, blocks only", "kronfluence_language:Kronfluence", {"head": False}
    ),
    "kronfluence": Contender(
        "kronfluence", "EK-FAC, with the head (default)", "kronfluence_language:Kronfluence", {"head": True}
    ),
}


@dataclass(frozen=True)
class Size:
    """What `Wikitext2` takes."""

    directory: Path
    texts: int
    queries: int
    pretraining_texts: int

    def task(self) -> Wikitext2:
        return Wikitext2(self.directory, self.texts, self.queries, self.pretraining_texts)


@dataclass(frozen=True)
class Measured:
    """built, rates: texts a second, of building and of training steps in batches of 16 and 64.
    single, together: seconds for a query.  peak: bytes of the whole process"""

    scores: Scores
    built: float
    rates: list[float]
    single: float
    together: float
    bytes: int
    peak: int


def measure(contender: Contender, size: Size) -> Measured:
    """Runs in a process of its own."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    task = size.task()
    module, name = contender.maker.split(":")
    library: Library = getattr(import_module(f"benchmarks.peers.{module}"), name)(task, **contender.options)
    queries = task.query[: contender.queries]
    with TemporaryDirectory() as directory:
        started = time.process_time()
        library.build(Path(directory))
        seconds = time.process_time() - started
        single: list[float] = []
        while len(single) < _SINGLE and sum(single) < _SECONDS:
            query = queries[[len(single) % len(queries)]]
            single.append(timed(partial(library.scores, query))[1])
        batch, together = timed(partial(library.scores, queries[:_TOGETHER]))
        others = [library.scores(some) for some in queries[_TOGETHER:].split(100) if len(some)]
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        rates = [training_rate(task, batch_size) for batch_size in (16, 64)]  # at the same time, as others compute too
        alone = float(np.median(single[1:] or single))  # the first one warms up
        together /= len(batch)
        scores = np.concatenate([batch, *others])
        return Measured(scores, size.texts / seconds, rates, alone, together, library.bytes(), peak)


def training_rate(task: Wikitext2, batch_size: int) -> float:
    """Texts a second of processor time in a plain training step."""
    model = task.model()
    optimizer = torch.optim.AdamW(model.parameters())
    spent = []
    for picked in torch.arange((_STEPS + 1) * batch_size).remainder(len(task.train)).split(batch_size):
        started = time.process_time()
        optimizer.zero_grad()
        task.loss(model, task.train[picked]).mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        spent.append(time.process_time() - started)
    return batch_size / float(np.median(spent[1:]))


def line(contender: Contender, measured: Measured, truth: SubsetOutputs) -> str:
    asked = len(measured.scores)
    score = linear_datamodeling_score(measured.scores, truth.subsets, truth.means[:, :asked])
    cells = [
        contender.library,
        contender.setting,
        f"{asked}",
        f"{score.mean:.3f}",
        f"{score.low:.3f} to {score.high:.3f}",
        f"{measured.built:,.0f}",
        *(f"{measured.built / rate:.2f}" for rate in measured.rates),
        f"{1e3 * measured.single:,.1f}",
        f"{1e3 * measured.together:,.1f}",
        f"{measured.bytes / truth.subsets.shape[1]:,.0f}",
        f"{measured.peak / 1e6:,.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def apart(work: Callable[..., Measured], *arguments: object) -> Measured:
    """In a process of its own, whose peak of memory is the library's."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("contenders", nargs="*", default=[*CONTENDERS], help=f"of {', '.join(CONTENDERS)}")
    parser.add_argument("--directory", type=Path, default=Path("runs/wikitext2"), help="run-0 and truth go there")
    parser.add_argument("--texts", type=int, default=1_500)
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--pretraining-texts", type=int, default=10_000)
    parser.add_argument("--halves", type=int, default=64)
    parser.add_argument("--keep", type=Path, help="directory for the scores, NAME.npy")
    arguments = parser.parse_args()
    size = Size(arguments.directory, arguments.texts, arguments.queries, arguments.pretraining_texts)
    torch.set_num_threads(1)
    task = size.task()
    train(task, size.directory, 0, TASKS["wikitext2"])
    truth = subset_outputs(Retrainings(task, size.directory / "truth"), arguments.halves, seeds=1)
    print(HEADER, flush=True)
    for name in arguments.contenders:
        measured = apart(measure, CONTENDERS[name], size)
        if arguments.keep:
            np.save(arguments.keep / f"{name}.npy", measured.scores)
        print(line(CONTENDERS[name], measured, truth), flush=True)


if __name__ == "__main__":
    main()
