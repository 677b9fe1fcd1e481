"""Methods: how query gradients become query vectors. A score is the inner product of query vector and stored row.

Positive scores are proponents: a step on that row lowers what is explained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradtrace.errors import QueryError
from gradtrace.manifest import CheckpointEntry

_NO_DIRECTION = 2.0**-100  # rows so much smaller than the largest are taken for zero: float32 holds no more of them

Weights = Literal["learning_rate", "learning_rate_steps", "equal"]


@dataclass(frozen=True, slots=True)
class Method:
    """One way to score.

    all_checkpoints: sum over every checkpoint unless told otherwise; else the last one alone
    weights: default weight of each checkpoint
    normalized: divide by the norms of query and row (each over all chosen checkpoints together)
    """

    name: str
    all_checkpoints: bool
    weights: Weights
    normalized: bool = False


METHODS = {
    method.name: method
    for method in (
        # TracInCP, Pruthi et al. 2020, Section 3.3: sum_i lr_i grad(z, theta_i) . grad(z', theta_i)
        Method("tracin", all_checkpoints=True, weights="learning_rate"),
        # GradDot and GradCos, Charpiat et al. 2019, Section 2: inner product and cosine at the trained model
        Method("graddot", all_checkpoints=False, weights="equal"),
        Method("cosine", all_checkpoints=False, weights="equal", normalized=True),
    )
}


def method_named(name: str) -> Method:
    """Raises QueryError for a name that is no method's."""
    if name not in METHODS:
        raise QueryError(f"unknown method {name!r}; this index offers {', '.join(METHODS)}")
    return METHODS[name]


def chosen_checkpoints(method: Method, entries: Sequence[CheckpointEntry], names: Sequence[str] | None) -> list[int]:
    """Positions of the checkpoints to sum over, in training order.

    Raises:
        QueryError: an unknown or repeated name, or none at all.
    """
    if names is None:
        return list(range(len(entries))) if method.all_checkpoints else [len(entries) - 1]
    known = {entry.name: position for position, entry in enumerate(entries)}
    unknown = [name for name in names if name not in known]
    if unknown or not names or len(set(names)) < len(names):
        problem = f"unknown checkpoint {unknown[0]!r}" if unknown else "checkpoints must be named, each once"
        raise QueryError(f"{problem}; the index holds {', '.join(known)}")
    return sorted(known[name] for name in names)


def checkpoint_weights(
    method: Method, entries: Sequence[CheckpointEntry], chosen: Sequence[int], weights: str | None
) -> NDArray[np.float64]:
    """The weight of each chosen checkpoint. float64 [len(chosen)].

    "learning_rate_steps" multiplies the learning rate by the steps since the checkpoint before (since step 0 for the
    first), so that the sum approximates the whole path of training.

    Raises:
        QueryError: unknown weights, or weights for a normalised method.
    """
    name = method.weights if weights is None else weights
    if name not in get_args(Weights):
        raise QueryError(f"unknown weights {name!r}; choose from {', '.join(get_args(Weights))}")
    if method.normalized and name != "equal":
        raise QueryError(f"method {method.name!r} weighs its checkpoints equally; leave weights out")
    if name == "equal":
        return np.ones(len(chosen))
    rates = np.array([entries[position].learning_rate for position in chosen])
    if name == "learning_rate":
        return rates
    steps = np.array([entry.step for entry in entries])
    return rates * np.diff(steps, prepend=0)[list(chosen)]


def query_vectors(method: Method, coordinates: Tensor, weights: NDArray[np.float64]) -> Tensor:
    """Fold the checkpoints' weights, and for normalised methods the query's norm, into [queries, C, D] coordinates."""
    vectors = coordinates * torch.as_tensor(weights, dtype=coordinates.dtype, device=coordinates.device)[:, None]
    if method.normalized:
        norms = vectors.flatten(1).norm(dim=1)
        vectors = vectors * inverse(norms)[:, None, None]
    return vectors


def row_scale(method: Method, norms: NDArray[np.float32]) -> Tensor | None:
    """One factor for each row's score, from the rows' norms [C, rows]; None where scores stay as they are."""
    if not method.normalized:
        return None
    total = torch.from_numpy(np.sqrt((norms.astype(np.float64) ** 2).sum(0)))
    return torch.where(total > _NO_DIRECTION * total.max(), inverse(total), 0).float()


def self_influence(method: Method, norms: NDArray[np.float32], weights: NDArray[np.float64]) -> NDArray[np.float32]:
    """The score of each row on itself, from the rows' norms [C, rows]. float32 [rows]."""
    squares = norms.astype(np.float64) ** 2  # [C, rows]
    if method.normalized:
        total = np.sqrt(squares.sum(0))
        directed: NDArray[np.float32] = (total > _NO_DIRECTION * total.max()).astype(np.float32)
        return directed
    scores: NDArray[np.float32] = (weights @ squares).astype(np.float32)
    return scores


def inverse(norms: Tensor) -> Tensor:
    """1 / norm, and 0 for zero gradients: these have no direction, so no cosine but 0."""
    return torch.where(norms > 0, 1 / norms.clamp_min(torch.finfo(norms.dtype).tiny), 0)
