"""Refit the last layer on an index's representations, for method `representer`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from gradtrace.errors import CorruptIndexError, StoreError
from gradtrace.fitted.representer_head import fit_head, with_constant
from gradtrace.methods.representation_scoring import lacks_representations
from gradtrace.store.index_files import check_files
from gradtrace.store.manifest import Manifest, RepresenterEntry
from gradtrace.store.rows import RowStore, representation_store
from gradtrace_indexer.generations import publish, successor, updating
from gradtrace_indexer.writing.files import write_file

_BLOCK_ROWS = 4096


def fit_representer(path: str | Path, *, l2: float = 0.003) -> Manifest:
    """Publish a generation with the last layer refitted to the rows' labels, and each row's share in its weights.

    Needs neither the task nor the model. The representations of all rows are held in memory, 8 bytes a value; 4 bytes
    are stored for each row and class. An update of rows or checkpoints makes the refit stale: run it again.

    Args:
        l2: the weight of the regularisation (Yeh et al. 2018; 0.003 in the authors' code). A smaller one fits the
            labels better, with weights that depend on fewer rows.

    Returns:
        the current manifest.

    Raises:
        StoreError: no index, no representations or labels in it, l2 not above zero, an update unfinished or running, a
            full disk, or the fit does not converge.
        CorruptIndexError: files of the index are damaged.
    """
    directory = Path(path)
    if not 0 < l2 < float("inf"):
        raise StoreError(f"l2 must be a number above zero, not {l2}")
    with updating(directory, "fit representer") as (current, _):
        store = _whole_store(directory, current)
        after = successor(current, "fit representer")
        entry = _entry(directory, after, store, l2)
        return publish(directory, after.model_copy(update={"representer": entry}))


def _whole_store(directory: Path, current: Manifest) -> RowStore:
    problems = check_files(directory, current, deep=True)
    if problems:
        raise CorruptIndexError(f"{directory} is damaged: {'; '.join(problems)}. Restore the files, or rebuild it")
    store = representation_store(directory, current)
    if store is None:
        raise StoreError(f"{directory} cannot answer by 'representer': {lacks_representations(current)}")
    return store


def _entry(directory: Path, manifest: Manifest, store: RowStore, l2: float) -> RepresenterEntry:
    """Fit at each trained model, and write the file."""
    live = torch.from_numpy(store.row_ids.live())
    labels, classes = _labels(directory, store, live)
    fits = [fit_head(_inputs(store, place)[live], labels, classes, l2) for place in range(store.checkpoints)]
    shares = torch.zeros(store.checkpoints, store.rows, classes or 1)
    shares[:, live] = torch.stack([fitted for _, fitted, _ in fits]).float()
    content = {"weights": torch.stack([weights for weights, _, _ in fits]), "shares": shares}
    return RepresenterEntry(
        file=write_file(directory, f"representer/{manifest.generation}.safetensors", safetensors.torch.save(content)),
        l2=l2,
        classes=classes,
        fitted_rows=len(labels),
        residual=max(residual for _, _, residual in fits),
        rows=manifest.representations_digest(),
    )


def _labels(directory: Path, store: RowStore, live: Tensor) -> tuple[Tensor, int | None]:
    """The live rows' classes, int64, and the number of classes; or their values, float64, and None. [live rows]"""
    columns = store.columns(store.checkpoints - 1)
    stored, predicted = columns["label"], columns["prediction"]
    labels = torch.from_numpy(stored.astype(np.float64))[live]
    if bool(labels.isnan().any()):
        raise StoreError(f"some rows of {directory} have no label that is a number: 'representer' has none to fit to")
    predicts_values = predicted.dtype.kind == "f" and not np.isnan(predicted).all()
    if stored.dtype.kind == "f" or predicts_values:
        return labels, None
    if int(labels.min()) < 0:
        raise StoreError(f"labels of {directory} are below zero, so they are not classes: make them 0, 1, 2 ...")
    return labels.long(), int(labels.max()) + 1


def _inputs(store: RowStore, place: int) -> Tensor:
    """The layer's input for each row, with a constant for the bias. float64 [rows, features + 1]"""
    return torch.cat([with_constant(rows[:, 0].double()) for _, rows in store.blocks([place], _BLOCK_ROWS)])
