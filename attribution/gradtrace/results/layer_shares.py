"""What scores consist of, layer by layer, as far as the index's columns tell."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from gradtrace.basis import Basis
from gradtrace.store.rows import RowStore


def layer_shares(
    store: RowStore, bases: Sequence[Basis], query: Tensor, checkpoints: Sequence[int], rows: NDArray[np.int64]
) -> dict[str, NDArray[np.float64]]:
    """By layer the sum over its columns, and over the checkpoints, of query times row. Each [m].

    query: [C, D] float32, the checkpoints' weights in it
    bases: for each checkpoint, of those that do not mix layers
    """
    names = sorted({name for basis in bases for name in basis.layers})
    shares = torch.zeros(len(names), len(rows), dtype=torch.float64)
    for position, (checkpoint, basis) in enumerate(zip(checkpoints, bases, strict=True)):
        numbers = torch.tensor([names.index(name) for name in sorted(basis.layers)])
        of_layers = F.one_hot(numbers[basis.layer_of_columns()], len(names)).double()  # [D, layers]
        of_layers *= query[position].double().cpu()[:, None]
        shares += (store.gather([checkpoint], rows)[:, 0].double() @ of_layers).T
    return dict(zip(names, shares.numpy(), strict=True))
