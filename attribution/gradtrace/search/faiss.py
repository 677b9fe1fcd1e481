"""Candidates from a FAISS index (Douze et al. 2024, https://arxiv.org/abs/2401.08281)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gradtrace.errors import CorruptIndexError, StoreError
from gradtrace.search.candidates import CandidateSearcher, widened
from gradtrace.search.progressive import Floats, Rows
from gradtrace.store.rows import RowStore


def import_faiss() -> Any:
    """The module. Raises StoreError where it is not installed."""
    try:
        import faiss
    except ImportError as error:
        raise StoreError(
            f"a FAISS searcher needs the faiss library ({error}): pip install gradtrace[cpu], or gradtrace[gpu] on a "
            'machine with CUDA; searcher="progressive" needs neither'
        ) from None
    return faiss


class FaissSearcher(CandidateSearcher):
    """Searches with an index that `gradtrace build --searcher faiss:...` wrote; the file is memory-mapped.

    parameters: of the search, as FAISS's ParameterSpace reads them: "nprobe=32", "efSearch=128"
    """

    def __init__(self, store: RowStore, path: Path, parameters: str, device: str | torch.device = "cpu") -> None:
        super().__init__(store, device)
        faiss = self._faiss = import_faiss()
        try:
            whole = self._whole = _mapped(faiss, path)  # parts of an index live as long as the whole
            faiss.ParameterSpace().set_index_parameters(whole, parameters)
        except RuntimeError as error:
            raise CorruptIndexError(
                f"{path} cannot be opened with {parameters!r} by faiss {faiss.__version__}: {error}; rebuild it with "
                "`gradtrace build --searcher`"
            ) from error
        if (whole.ntotal, whole.d) != (store.rows, store.checkpoints * store.dimensions):
            raise CorruptIndexError(f"{path} holds other rows than the index: rebuild it with `gradtrace build`")
        self._index = self._on_gpu(torch.device(device)) or whole
        self._per_hit = 2 if _keeps_values(faiss, whole) else 4
        # A walk over a graph ends among the nearest rows: of rows of one label it found .81 in three times the time.
        graph = any(isinstance(part, faiss.IndexHNSW | faiss.IndexNSG) for part in parts(whole))
        self._least_share = 0.9 if graph else 1 / 32

    def _on_gpu(self, device: torch.device) -> Any:
        """A copy on the device; None where there is none, or FAISS has no such index for it."""
        faiss = self._faiss
        if device.type != "cuda" or not hasattr(faiss, "StandardGpuResources"):
            return None
        self._resources = faiss.StandardGpuResources()
        try:
            return faiss.index_cpu_to_gpu(self._resources, device.index or 0, self._whole)
        except RuntimeError:  # graphs, for one, stay on the CPU
            return None

    def _nearest(self, vectors: Floats, count: int, allowed: NDArray[np.bool_] | None) -> list[Rows]:
        selection = None
        if allowed is not None:
            selection = self._selection(allowed)
            count = count if selection is not None else widened(count, allowed)
        _, found = self._index.search(vectors, count, params=selection)  # int64, -1 where there is none
        return [rows[rows >= 0] for rows in found]

    def _selection(self, allowed: NDArray[np.bool_]) -> Any:
        """FAISS's search parameters that admit these rows alone; None where the kind of index knows none.

        These replace the index's own parameters. The fewer rows are admitted, the farther the search has to look.
        """
        faiss, index = self._faiss, self._index
        rows = faiss.IDSelectorBitmap(np.packbits(allowed, bitorder="little"))
        if isinstance(index, faiss.IndexIVFFlat | faiss.IndexIVFScalarQuantizer | faiss.IndexIVFPQ):
            return faiss.SearchParametersIVF(sel=rows, nprobe=min(index.nlist, widened(index.nprobe, allowed)))
        if isinstance(index, faiss.IndexFlat | faiss.IndexScalarQuantizer):
            return faiss.SearchParameters(sel=rows)
        return None


def parts(index: Any) -> Iterator[Any]:
    """A FAISS index and those inside it. They live as long as the outermost."""
    yield index
    for name in ("storage", "quantizer", "index", "base_index"):
        inner = getattr(index, name, None)
        if inner is not None:
            yield from parts(import_faiss().downcast_index(inner))


def _keeps_values(faiss: Any, index: Any) -> bool:
    """Whether the rows themselves are in the index, rounded at most, and no codes that stand for them."""
    while inner := getattr(index, "storage", None) or getattr(index, "index", None):
        index = faiss.downcast_index(inner)
    kinds = (faiss.IndexFlat, faiss.IndexScalarQuantizer, faiss.IndexIVFFlat, faiss.IndexIVFScalarQuantizer)
    return isinstance(index, kinds)


def _mapped(faiss: Any, path: Path) -> Any:
    """Opened without reading it all. (IO_FLAG_MMAP would map inverted lists, but read flat rows and graphs.)"""
    return faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
