"""captum's TracInCP beside `tracin`: `python -m benchmarks.peers.tracincp mnist --rows 500`."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from captum.influence import TracInCP
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.peers.comparison import HEADER, Case, Scores, compared, load_case, parse, timed
from benchmarks.peers.gradtrace_scores import tracin_scores
from gradtrace.checkpoints import load_into

_BATCH = 8  # captum goes back through the whole batch once for each example of it


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """In float64, as in Gradtrace's tasks. [batch]."""
    return F.cross_entropy(logits.double(), labels, reduction="none")


def captum_scores(case: Case) -> Scores:
    """All parameters, example by example: its faster ways know Linear and Conv2d only, and no BatchNorm."""
    checkpoints = {str(checkpoint.path): checkpoint for checkpoint in case.checkpoints}

    def load(model: nn.Module, path: str) -> float:
        load_into(model, checkpoints[path])
        model.eval()  # captum does not: BatchNorm would mix the batch
        return checkpoints[path].learning_rate

    rows = DataLoader(case.task.train, _BATCH, collate_fn=lambda examples: tuple(case.task.collate(examples)))
    model = case.task.model().to(memory_format=torch.contiguous_format)  # captum takes views of gradients
    tracin = TracInCP(model, rows, list(checkpoints), load, loss_fn=cross_entropy)
    scores: Scores = tracin.influence(tuple(case.task.collate(list(case.queries)))).detach().numpy().astype(np.float32)
    return scores


def main() -> None:
    arguments = parse(__doc__, rows=300, queries=20)
    print(HEADER)
    for dataset in arguments.datasets:
        case = load_case(dataset, arguments.runs, arguments.rows, arguments.queries)
        theirs = timed(partial(captum_scores, case))
        whole = timed(partial(tracin_scores, case, basis="none", precision="float16"))
        print(compared(case, "captum", "tracin", theirs, whole), flush=True)
        compressed = timed(partial(tracin_scores, case, dimensions=2048))
        print(compared(case, "captum", "tracin, 2,048 dimensions in int8", theirs, compressed), flush=True)


if __name__ == "__main__":
    main()
