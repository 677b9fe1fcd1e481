"""What to say of an index whose rows' gradients are zero."""

from __future__ import annotations

import numpy as np

from gradtrace.store.manifest import Manifest, weights_positions
from gradtrace.store.rows import RowStore


def zero_rows_message(store: RowStore, manifest: Manifest) -> str | None:
    """What is wrong where every row's gradient is zero at every checkpoint, with the likely causes; None where one is
    not. Reads the stored norms alone."""
    count, positions = len(store.row_ids.ids), weights_positions(manifest.checkpoints)
    if not count or any(np.any(store.norms(position)) for position in positions):
        return None
    return (
        f"the gradients of all {count:,} training rows are zero at every checkpoint, so every score will be zero: the "
        "loss may be saturated (exactly 0 in float32: take it in float64, or an earlier checkpoint), or it does not "
        "depend on the trainable parameters"
    )
