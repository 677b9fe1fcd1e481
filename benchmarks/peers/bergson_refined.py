"""bergson's EK-FAC refined by conjugate gradients, its "EKFAC + CG", for `benchmarks.peers.language`.

It keeps factors, and nothing of a text: a question is solved for, and passes over all texts again.
"""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from pathlib import Path

import bergson.hessians.astra
import numpy as np
from bergson import PreprocessConfig, QuerySetConfig, ScoreConfig
from bergson.config import HessianConfig, InversionConfig
from bergson.config.config import AstraConfig, HessianPipelineConfig
from bergson.data import load_gradients, load_scores
from bergson.hessians.hessian_approximations import approximate_hessians
from bergson.hessians.pipeline import hessian_pipeline
from datasets import Dataset
from torch import Tensor

from benchmarks.peers.bergson_language import Bergson, save
from benchmarks.peers.comparison import Scores

_FIT = HessianConfig(method="kfac", ev_correction=True)
_DAMPING = 10.0  # with which bergson's own comparison refines


class Refined(Bergson):
    """steps: of conjugate gradients;  texts: whose curvature they see, other ones for each query"""

    steps, texts = 10, 64
    asked = 0

    def build(self, directory: Path) -> None:
        self.directory = directory
        save(self.task, directory)
        with redirect_stdout(io.StringIO()):
            approximate_hessians(self.config(f"hessian/{_FIT.method}"), _FIT)

    def scores(self, queries: Tensor) -> Scores:
        self.asked += 1
        run = self.directory / f"asked-{self.asked}"
        run.mkdir()
        (run / "hessian").symlink_to(self.directory / "hessian")
        Dataset.from_dict({"input_ids": queries.tolist()}).save_to_disk(run / "queries")
        bergson.hessians.astra.load_gradients = writable  # which its solver changes in place
        pipeline = HessianPipelineConfig(
            query=QuerySetConfig(dataset=str(run / "queries")),
            inversion_cfg=InversionConfig(damping_factor=_DAMPING),
            astra=AstraConfig(num_steps=self.steps, solver="cg", batch_size=self.texts),
            resume=True,
        )
        with redirect_stdout(io.StringIO()):
            hessian_pipeline(self.config(run.name), _FIT, ScoreConfig(), PreprocessConfig(), pipeline)
        scores: Scores = load_scores(run / "scores")[:].T.astype(np.float32)
        return scores

    def bytes(self) -> int:
        return 0


def writable(path: Path | str) -> Scores:
    """A copy of what bergson maps read-only and then writes to, which ends in a segmentation fault."""
    return np.array(load_gradients(path))
