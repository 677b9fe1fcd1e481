"""kronfluence's EK-FAC of the small GPT-2, for `benchmarks.peers.language`. It keeps factors, and nothing of a text: a
question passes over all texts again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import kronfluence.task
import torch
import torch.nn.functional as F
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.utils.dataset import DataLoaderKwargs
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from transformers.pytorch_utils import Conv1D

from benchmarks.peers.comparison import Scores
from benchmarks.wikitext import Wikitext2
from gradtrace.checkpoints import load_checkpoints, load_into

_BATCH = 64


class TokensTask(kronfluence.task.Task):
    """The Fisher's tokens are drawn from the model's predictions, kronfluence's default."""

    def __init__(self, tracked: list[str] | None) -> None:
        self.tracked = tracked

    def get_influence_tracked_modules(self) -> list[str] | None:
        return self.tracked

    def compute_train_loss(self, batch: Sequence[Tensor], model: nn.Module, sample: bool = False) -> Tensor:
        logits = model(input_ids=batch[0], use_cache=False).logits[:, :-1].flatten(0, 1)
        labels = batch[0][:, 1:].flatten()
        if sample:
            labels = torch.multinomial(logits.detach().softmax(1), 1).flatten()
        return F.cross_entropy(logits, labels, reduction="sum")

    def compute_measurement(self, batch: Sequence[Tensor], model: nn.Module) -> Tensor:
        return self.compute_train_loss(batch, model)


class Kronfluence:
    """Embeddings, norms and biases of norms are left out: it tracks Linear and Conv2d only."""

    def __init__(self, task: Wikitext2, head: bool) -> None:
        self.task, self.head = task, head

    def build(self, directory: Path) -> None:
        model = self.task.model()
        load_into(model, load_checkpoints(self.task.directory / "run-0" / "checkpoints")[-1])
        with_linear_layers(model)
        blocks = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]
        task = TokensTask(None if self.head else blocks)
        self.analyzer = Analyzer(
            "texts", prepare_model(model, task), task, cpu=True, disable_tqdm=True, output_dir=str(directory)
        )
        self.analyzer.set_dataloader_kwargs(DataLoaderKwargs(num_workers=0))
        self.texts = TensorDataset(self.task.train)
        self.analyzer.fit_all_factors(
            "ekfac", self.texts, per_device_batch_size=_BATCH, factor_args=FactorArguments("ekfac")
        )

    def scores(self, queries: Tensor) -> Scores:
        self.analyzer.compute_pairwise_scores(
            "scores",
            "ekfac",
            TensorDataset(queries),
            self.texts,
            len(queries),
            _BATCH,
            score_args=ScoreArguments(damping_factor=None),  # the rule: a tenth of the layer's mean eigenvalue
            overwrite_output_dir=True,
        )
        scores: Scores = self.analyzer.load_pairwise_scores("scores")["all_modules"].numpy()
        return scores

    def bytes(self) -> int:
        return 0


def with_linear_layers(model: nn.Module) -> None:
    """transformers' Conv1D, which kronfluence does not know, into Linear layers of the same weights."""
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, Conv1D)]
    for name, layer in layers:
        linear = nn.Linear(*layer.weight.shape)
        linear.load_state_dict({"weight": layer.weight.T, "bias": layer.bias})
        model.set_submodule(name, linear)
