"""bergson's gradient stores of the small GPT-2, for `benchmarks.peers.language`."""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from pathlib import Path
from typing import Literal

import torch
from bergson import Attributor, DataConfig, IndexConfig, PreprocessConfig
from bergson.build import build
from bergson.config import HessianConfig
from bergson.hessians.hessian_approximations import approximate_hessians
from bergson.utils.worker_utils import setup_model_and_peft
from datasets import Dataset
from torch import Tensor
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from benchmarks.peers.comparison import Scores
from benchmarks.wikitext import Wikitext2
from gradtrace.checkpoints import load_checkpoints, load_into

_POSITIONS = 2_048  # bergson refuses batches of more tokens than the model has positions, and its default is so many


class Bergson:
    """A store of the gradients, and products with those of queries.

    Args:
        projection: each layer's gradient becomes a square matrix of this size, 0: stays whole.
        unit_norm: gradients of norm one, as `bergson query` does.
        hessian: "kfac" with corrected eigenvalues (EK-FAC); or of the whole gradients.
        head: the output layer as well, which bergson leaves out, since it takes only layers of a model's `base_model`.
    """

    def __init__(
        self,
        task: Wikitext2,
        projection: int = 0,
        unit_norm: bool = False,
        hessian: Literal["kfac", "autocorrelation"] | None = None,
        head: bool = False,
    ) -> None:
        self.task, self.projection, self.unit_norm, self.hessian = task, projection, unit_norm, hessian
        if head:
            take_the_whole_model()

    def build(self, directory: Path) -> None:
        save(self.task, directory)
        self.directory = directory
        with redirect_stdout(io.StringIO()):
            build(self.config("store"), PreprocessConfig())
            if self.hessian:
                fit = HessianConfig(method=self.hessian, ev_correction=self.hessian == "kfac")
                approximate_hessians(self.config("hessian"), fit)
            self.model, _ = setup_model_and_peft(self.config("store"))
        self.attributor = Attributor(
            directory / "store",
            unit_norm=self.unit_norm,
            hessian_path=directory / "hessian" if self.hessian else None,
            ev_correction=self.hessian == "kfac",
        )

    def config(self, name: str) -> IndexConfig:
        """Everything else is bergson's default."""
        return IndexConfig(
            run_path=str(self.directory / name),
            model=str(self.directory / "model"),
            data=DataConfig(dataset=str(self.directory / "texts")),
            projection_dim=self.projection,
        )

    def scores(self, queries: Tensor) -> Scores:
        with self.attributor.trace(self.model.base_model, None) as result:
            (self.task.loss(self.model, queries).sum()).backward()  # type: ignore[no-untyped-call]
            self.model.zero_grad()
        scores: Scores = torch.zeros_like(result.scores).scatter(1, result.indices, result.scores).numpy()
        return scores

    def bytes(self) -> int:
        return (self.directory / "store" / "gradients.bin").stat().st_size


def take_the_whole_model() -> None:
    """For its own base, in this process: bergson looks for layers there."""
    GPT2LMHeadModel.base_model = property(lambda model: model)
    GPT2LMHeadModel.get_input_embeddings = lambda model: model.transformer.wte


def save(task: Wikitext2, directory: Path) -> None:
    """The last checkpoint and the texts as bergson reads them. The positions past the texts' ends are never used."""
    model = task.model()
    load_into(model, load_checkpoints(task.directory / "run-0" / "checkpoints")[-1])
    positions = model.transformer.wpe
    weights = torch.zeros(_POSITIONS, positions.embedding_dim)
    weights[: positions.num_embeddings] = positions.weight.detach()
    model.config.n_positions = _POSITIONS
    model.transformer.wpe = torch.nn.Embedding.from_pretrained(weights)
    model.save_pretrained(directory / "model")
    PreTrainedTokenizerFast(tokenizer_object=task.tokenizer).save_pretrained(directory / "model")
    texts = Dataset.from_dict({"input_ids": task.train.tolist(), "length": [task.train.shape[1]] * len(task.train)})
    texts.save_to_disk(directory / "texts")
