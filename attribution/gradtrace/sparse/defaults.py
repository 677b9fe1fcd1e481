"""Which kind of rows an index has unless it is asked for another, and how long they are."""

from __future__ import annotations

from typing import Literal

from torch import nn

from gradtrace.task import Task

RowsOption = Literal["dense", "sparse"]
# LDS of sparse rows on a small GPT-2: .62 with 512, .67 with 1,024, .70 with 2,048 (docs/language-models.md)
DEFAULT_DIMENSIONS: dict[RowsOption, int] = {"dense": 2048, "sparse": 1024}


def default_rows(task: Task) -> RowsOption:
    """Sparse for language models that train their embedding and their output for each token."""
    model: object = task.model()
    return "sparse" if isinstance(model, nn.Module) and _predicts_tokens(model) else "dense"


def _predicts_tokens(model: nn.Module) -> bool:
    """Whether a model trains an embedding, and an output for each of the tokens that are embedded. The tokens are what
    the largest embedding is of: those of positions are smaller."""
    modules = list(model.modules())
    embeddings = [module for module in modules if isinstance(module, nn.Embedding)]
    tokens = max((embedding.num_embeddings for embedding in embeddings), default=0)
    outputs = [m for m in modules if isinstance(m, nn.Linear) and m.out_features == tokens > m.in_features]
    reads = any(e.num_embeddings == tokens and e.weight.requires_grad for e in embeddings)
    return reads and any(output.weight.requires_grad for output in outputs)
