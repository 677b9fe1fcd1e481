"""What is computed from the rows of a finished index: TRAK's kernels, and the last layer refitted on the
representations."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from gradtrace.devices import pick_device
from gradtrace.errors import CorruptIndexError, StoreError
from gradtrace.fitted.representer_head import fit_head, with_constant
from gradtrace.fitted.trak_kernels import compute_kernel, output_kind, share_at_smallest
from gradtrace.methods import METHODS
from gradtrace.store.index_files import check_files
from gradtrace.store.manifest import KernelsEntry, Manifest, RepresenterEntry
from gradtrace.store.rows import RowStore, representation_store
from gradtrace_indexer.generations import publish, save_pending, successor, updating
from gradtrace_indexer.progress import progress_bar
from gradtrace_indexer.writing.files import write_file

DAMPING = 0.3  # see docs/methods.md
_MOST_ROUNDED = 0.03  # share of the rows
_BLOCK_ROWS = 4096


def add_kernels(path: str | Path, *, damping: float = DAMPING, device: str = "auto", progress: bool = True) -> Manifest:
    """Compute TRAK's kernels from the stored rows, and publish them as one generation. Returns the current manifest.

    There is one for each checkpoint, of 4 x dimensions^2 bytes. Those that exist with this damping stay. An update that
    adds or deletes rows drops them all; a new checkpoint has none yet. Run again after an interruption, it resumes.

    damping: added to each kernel's diagonal, relative to its mean.

    Raises:
        StoreError: no index, another update unfinished or running, a full disk, damping not above zero, or the loss is
            neither -log p of a class nor a squared error.
    """
    directory = Path(path)
    if not 0 < damping < math.inf:
        raise StoreError(f"damping must be a number above zero, not {damping}")
    with updating(directory, "add kernels") as (current, pending):
        if current.basis.is_sparse:
            raise StoreError(f"{directory} has no kernels: {METHODS['trak'].lacks(current)}")
        manifest = current if pending is None else pending
        if manifest.kernels is None or manifest.kernels.damping != damping:
            output = output_kind(RowStore(directory, current).columns(current.last_checkpoint))
            manifest = manifest.model_copy(update={"kernels": KernelsEntry(output=output, damping=damping, files={})})
        if pending is None:
            if not manifest.lacking_kernels():
                return current
            manifest = successor(manifest, "add kernels")
        return publish(directory, _with_kernels(directory, save_pending(directory, manifest), device, progress))


def _with_kernels(directory: Path, manifest: Manifest, device: str, progress: bool) -> Manifest:
    """Compute what is missing, committing each."""
    store, where = RowStore(directory, manifest), torch.device(pick_device(device))
    positions = {entry.name: position for position, entry in enumerate(manifest.checkpoints)}
    lacking = manifest.lacking_kernels()
    for name in progress_bar("kernels", len(lacking), shown=progress, items=lacking):
        assert manifest.kernels is not None
        entry, position = manifest.kernels, positions[name]
        kernel = compute_kernel(store, position, entry.output, entry.damping, where)
        share = share_at_smallest(store, position, entry.output, kernel.smallest_weight)
        if entry.output == "log odds" and share > _MOST_ROUNDED:
            warnings.warn(
                f"{share:.0%} of the rows have losses at {name} that are rounded to zero or next to it, so that TRAK "
                "cannot tell their 1 - p: take the loss in float64, as F.cross_entropy(logits.double(), ...), and "
                "rebuild",
                stacklevel=3,
            )
        numbers = {"weight": torch.tensor(kernel.weight), "least": torch.tensor(kernel.smallest_weight)}
        content = safetensors.torch.save({"inverse": kernel.inverse, **numbers})
        file = write_file(directory, f"kernels/{name}.{manifest.generation}.safetensors", content)
        kernels = entry.model_copy(update={"files": {**entry.files, name: file}})
        manifest = save_pending(directory, manifest.model_copy(update={"kernels": kernels}))
    return manifest


def fit_representer(path: str | Path, *, l2: float = 0.003) -> Manifest:
    """Publish a generation with the last layer refitted to the rows' labels, and each row's share in its weights.
    Returns the current manifest.

    Needs neither the task nor the model. The representations of all rows are held in memory, 8 bytes a value; 4 bytes
    are stored for each row and class. An update of rows or checkpoints makes the refit stale: run it again.

    Args:
        l2: the weight of the regularisation (Yeh et al. 2018; 0.003 in the authors' code). A smaller one fits the
            labels better, with weights that depend on fewer rows.

    Raises:
        StoreError: no index, no representations or labels in it, l2 not above zero, an update unfinished or running, a
            full disk, or the fit does not converge.
        CorruptIndexError: files of the index are damaged.
    """
    directory = Path(path)
    if not 0 < l2 < math.inf:
        raise StoreError(f"l2 must be a number above zero, not {l2}")
    with updating(directory, "fit representer") as (current, _):
        if problems := check_files(directory, current, deep=True):
            raise CorruptIndexError(f"{directory} is damaged: {'; '.join(problems)}. Restore the files, or rebuild it")
        store = representation_store(directory, current)
        if store is None:
            raise StoreError(f"{directory} cannot answer by 'representer': {METHODS['representer'].lacks(current)}")
        after = successor(current, "fit representer")
        entry = _entry(directory, after, store, l2)
        return publish(directory, after.model_copy(update={"representer": entry}))


def _entry(directory: Path, manifest: Manifest, store: RowStore, l2: float) -> RepresenterEntry:
    """Fit at each trained model, and write the file."""
    live = torch.from_numpy(store.row_ids.live())
    labels, classes = _labels(directory, store, live)
    fits = []
    for place in range(store.checkpoints):  # of the layer's input, with a constant for the bias
        inputs = torch.cat([with_constant(rows[:, 0].double()) for _, rows in store.blocks([place], _BLOCK_ROWS)])
        fits.append(fit_head(inputs[live], labels, classes, l2))  # inputs: float64 [rows, features + 1]
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
