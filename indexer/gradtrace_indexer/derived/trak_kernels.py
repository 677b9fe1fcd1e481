"""Give an index the kernels that TRAK needs."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import safetensors.torch
import torch

from gradtrace.devices import pick_device
from gradtrace.errors import StoreError
from gradtrace.fitted.trak_kernels import compute_kernel, output_kind, share_at_smallest
from gradtrace.store.manifest import FileEntry, KernelsEntry, Manifest, Output
from gradtrace.store.rows import RowStore
from gradtrace_indexer.generations import publish, save_pending, successor, updating
from gradtrace_indexer.progress import with_progress
from gradtrace_indexer.writing.files import write_file

DAMPING = 0.3  # see docs/methods.md
_MOST_ROUNDED = 0.03  # share of the rows


def add_kernels(path: str | Path, *, damping: float = DAMPING, device: str = "auto", progress: bool = True) -> Manifest:
    """Compute TRAK's kernels from the stored rows, and publish them as one generation.

    There is one for each checkpoint, of 4 x dimensions^2 bytes. Those that exist with this damping stay. An update that
    adds or deletes rows drops them all; a new checkpoint has none yet. Run again after an interruption, it resumes.

    damping: added to each kernel's diagonal, relative to its mean.

    Returns:
        the current manifest.

    Raises:
        StoreError: no index, another update unfinished or running, a full disk, damping not above zero, or the loss is
            neither -log p of a class nor a squared error.
    """
    directory = Path(path)
    if not 0 < damping < math.inf:
        raise StoreError(f"damping must be a number above zero, not {damping}")
    with updating(directory, "add kernels") as (current, pending):
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
    entry = manifest.kernels
    assert entry is not None
    store, where = RowStore(directory, manifest), torch.device(pick_device(device))
    names = [entry.name for entry in manifest.checkpoints]
    lacking = manifest.lacking_kernels()
    for name in with_progress(lacking, "kernels", len(lacking), progress):
        kernel = compute_kernel(store, names.index(name), entry.output, entry.damping, where)
        _warn_of_rounding(
            name, share_at_smallest(store, names.index(name), entry.output, kernel.smallest_weight), entry.output
        )
        numbers = {"weight": torch.tensor(kernel.weight), "least": torch.tensor(kernel.smallest_weight)}
        content = safetensors.torch.save({"inverse": kernel.inverse, **numbers})
        file = write_file(directory, f"kernels/{name}.{manifest.generation}.safetensors", content)
        manifest = save_pending(directory, _with_kernel(manifest, name, file))
    return manifest


def _warn_of_rounding(checkpoint: str, share: float, output: Output) -> None:
    if output == "log odds" and share > _MOST_ROUNDED:
        warnings.warn(
            f"{share:.0%} of the rows have losses at {checkpoint} that are rounded to zero or next to it, so that TRAK "
            "cannot tell their 1 - p: take the loss in float64, as F.cross_entropy(logits.double(), ...), and rebuild",
            stacklevel=2,
        )


def _with_kernel(manifest: Manifest, name: str, file: FileEntry) -> Manifest:
    assert manifest.kernels is not None
    files = {**manifest.kernels.files, name: file}
    return manifest.model_copy(update={"kernels": manifest.kernels.model_copy(update={"files": files})})
