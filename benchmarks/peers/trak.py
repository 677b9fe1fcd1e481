"""traker beside `trak`: `python -m benchmarks.peers.trak mnist`.

traker computes kernels, their inverses, weights and averages from the same compressed gradients of its model output,
the margin. A query's scores for its loss are those for its margin times one factor.
"""

from __future__ import annotations

import dataclasses
import logging
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import trak
from torch import Tensor, nn
from torch.utils.data import DataLoader
from trak.gradient_computers import FunctionalGradientComputer
from trak.projectors import NoOpProjector
from trak.score_computers import BasicSingleBlockScoreComputer

from benchmarks.peers.comparison import HEADER, Case, Scores, compared, load_case, parse, timed
from benchmarks.peers.gradtrace_scores import TRAK_DAMPING, TRAK_DIMENSIONS, trak_scores
from gradtrace.basis import Basis, load_bases
from gradtrace.models.gradient_model import GradientModel
from gradtrace.store.manifest_file import read_manifest
from gradtrace.task import Batch

_BATCH = 128


def margins(model: nn.Module, batch: Batch) -> Tensor:
    """log(p / (1 - p)) of the labels, traker's model output. [batch]."""
    logits, labels = model(batch[0]), batch[1][:, None]
    others = logits.scatter(1, labels, -torch.inf)
    return logits.gather(1, labels)[:, 0] - others.logsumexp(1)


class CompressedGradients(FunctionalGradientComputer):
    """Of the margin, by Gradtrace at `encoder`'s checkpoint, in the coordinates of `basis`; all else is traker's."""

    encoder: GradientModel
    basis: Basis

    def compute_per_sample_grad(self, batch: Batch) -> Tensor:
        examples = list(zip(*batch, strict=True))
        return self.encoder.encode(self.basis, self.encoder.batch(examples), margins)[0]


class DampedKernels(BasicSingleBlockScoreComputer):
    """Damped as Gradtrace's, relative to the mean diagonal. traker's default besides scales every checkpoint's inverse
    to a mean absolute entry of one, which is not in the paper: checkpoints would have other weights."""

    def __init__(self, dtype: torch.dtype, device: torch.device, **_: object) -> None:
        super().__init__(dtype, device)

    def get_xtx(self, grads: Tensor) -> Tensor:
        kernel = super().get_xtx(grads)
        return kernel + TRAK_DAMPING * kernel.diagonal().mean() * torch.eye(len(kernel))


def traker_scores(case: Case, index: Path) -> Scores:
    """The mean over the case's checkpoints."""
    queries = case.task.collate(list(case.queries))
    with TemporaryDirectory() as directory:
        peer = trak.TRAKer(
            case.task.model(),
            "image_classification",
            case.rows,
            save_dir=directory,
            device="cpu",
            gradient_computer=CompressedGradients,
            score_computer=DampedKernels,
            projector=NoOpProjector(proj_dim=TRAK_DIMENSIONS, device="cpu"),
            use_half_precision=False,
            logging_level=logging.ERROR,
        )
        peer.gradient_computer.basis = load_bases(index, read_manifest(index))[0]
        for number, checkpoint in enumerate(case.checkpoints):
            model = GradientModel(case.task, checkpoint, torch.device("cpu"), case.queries[:2])
            peer.gradient_computer.encoder = model
            peer.load_checkpoint(model.model.state_dict(), number)
            for batch in DataLoader(case.task.train, _BATCH, collate_fn=case.task.collate):
                peer.featurize(batch, num_samples=len(batch[1]))
            peer.finalize_features([number])
            peer.start_scoring_checkpoint("queries", model.model.state_dict(), number, len(case.queries))
            peer.score(queries, num_samples=len(case.queries))
        found: Scores = np.array(peer.finalize_scores("queries")).T
    return found


def main() -> None:
    arguments = parse(__doc__, rows=2000, queries=50)
    print(HEADER)
    for dataset in arguments.datasets:
        case = load_case(dataset, arguments.runs, arguments.rows, arguments.queries)
        for kept in (1, len(case.checkpoints)):
            part = dataclasses.replace(case, checkpoints=case.checkpoints[-kept:])
            with TemporaryDirectory() as directory:
                ours = timed(partial(trak_scores, part, Path(directory) / "index"))
                theirs = timed(partial(traker_scores, part, Path(directory) / "index"))
            print(compared(part, "traker", f"trak, checkpoints: {kept}", theirs, ours), flush=True)


if __name__ == "__main__":
    main()
