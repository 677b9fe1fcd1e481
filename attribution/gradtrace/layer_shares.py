"""What scores consist of, layer by layer, as far as the index's columns tell."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradtrace.basis import Basis
from gradtrace.store import RowStore


def layer_shares(
    store: RowStore, basis: Basis, query: Tensor, checkpoints: Sequence[int], rows: NDArray[np.int64]
) -> dict[str, NDArray[np.float64]]:
    """By layer the sum over its columns, and over the checkpoints, of query times row. Each [m].

    query: [C, D] float32, the checkpoints' weights in it;  basis: one that does not mix layers
    """
    names = sorted(basis.layers)
    shares = torch.zeros(len(names), len(rows), dtype=torch.float64)
    owner = basis.layer_of_columns()
    for position, checkpoint in enumerate(checkpoints):
        products = store.gather([checkpoint], rows)[:, 0].double() * query[position].double().cpu()  # [m, D]
        shares.index_add_(0, owner, products.T)
    return dict(zip(names, shares.numpy(), strict=True))
