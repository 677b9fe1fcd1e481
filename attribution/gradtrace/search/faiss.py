"""Candidates from a FAISS index (Douze et al. 2024, https://arxiv.org/abs/2401.08281)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gradtrace.errors import CorruptIndexError
from gradtrace.search.candidates import CandidateSearcher, import_library, unfiltered_count
from gradtrace.search.scored_rows import Floats, Rows
from gradtrace.store.rows import RowStore


def import_faiss() -> Any:
    """The faiss module. Raises StoreError if it is not installed."""
    install = "pip install gradtrace[cpu], or gradtrace[gpu] on a machine with CUDA"
    return import_library("a FAISS", "faiss", install)


class FaissSearcher(CandidateSearcher):
    """Searches the index that `gradtrace build --searcher faiss:...` wrote. The file is memory-mapped.

    parameters: search parameters as FAISS's ParameterSpace reads them: "nprobe=32", "efSearch=128"
    """

    def __init__(self, store: RowStore, path: Path, parameters: str, device: str | torch.device = "cpu") -> None:
        super().__init__(store, path, device)
        faiss = self._faiss = import_faiss()
        try:
            # Mapped: IO_FLAG_MMAP would map inverted lists only. Kept: FAISS frees inner indexes with the outermost.
            on_cpu = self._on_cpu = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
            faiss.ParameterSpace().set_index_parameters(on_cpu, parameters)
        except RuntimeError as error:
            raise CorruptIndexError(
                f"{path} cannot be opened with {parameters!r} by faiss {faiss.__version__}: {error}; rebuild it with "
                "`gradtrace build --searcher`"
            ) from error
        if (on_cpu.ntotal, on_cpu.d) != (store.rows, store.checkpoints * store.dimensions):
            raise CorruptIndexError(f"{path} holds other rows than the index: rebuild it with `gradtrace build`")
        self._index = self._copy_on_gpu(torch.device(device)) or on_cpu
        self._candidates_per_hit = 2 if _keeps_values(faiss, on_cpu) else 4
        # A walk over a graph ends among the nearest rows: filtered by label, recall was .81 in three times the time.
        graph = any(isinstance(index, faiss.IndexHNSW | faiss.IndexNSG) for index in nested_indexes(on_cpu))
        self._smallest_share = 0.9 if graph else 1 / 32

    def _copy_on_gpu(self, device: torch.device) -> Any:
        """A copy on the device; None if it is not a GPU, or FAISS does not support this kind of index there."""
        faiss = self._faiss
        if device.type != "cuda" or not hasattr(faiss, "StandardGpuResources"):
            return None
        self._resources = faiss.StandardGpuResources()
        try:
            return faiss.index_cpu_to_gpu(self._resources, device.index or 0, self._on_cpu)
        except RuntimeError:  # graphs, for example, stay on the CPU
            return None

    def _nearest(self, vectors: Floats, count: int, allowed: NDArray[np.bool_] | None) -> list[Rows]:
        selection = None if allowed is None else self._selection(allowed)
        if allowed is not None and selection is None:
            count = unfiltered_count(count, allowed)
        _, nearest = self._index.search(vectors, count, params=selection)  # int64, padded with -1
        return [rows[rows >= 0] for rows in nearest]

    def _selection(self, allowed: NDArray[np.bool_]) -> Any:
        """FAISS's search parameters that admit only these rows; None if this kind of index cannot filter.

        They replace the index's parameters, so `nprobe` is set anew: the fewer rows are admitted, the more lists are
        searched.
        """
        faiss, index = self._faiss, self._index
        rows = faiss.IDSelectorBitmap(np.packbits(allowed, bitorder="little"))
        if isinstance(index, faiss.IndexIVFFlat | faiss.IndexIVFScalarQuantizer | faiss.IndexIVFPQ):
            nprobe = min(index.nlist, unfiltered_count(index.nprobe, allowed))
            return faiss.SearchParametersIVF(sel=rows, nprobe=nprobe)
        if isinstance(index, faiss.IndexFlat | faiss.IndexScalarQuantizer):
            return faiss.SearchParameters(sel=rows)
        return None


def nested_indexes(index: Any) -> Iterator[Any]:
    """A FAISS index and the indexes inside it, which FAISS frees with the outermost one."""
    yield index
    for name in ("storage", "quantizer", "index", "base_index"):
        inner = getattr(index, name, None)
        if inner is not None:
            yield from nested_indexes(import_faiss().downcast_index(inner))


def _keeps_values(faiss: Any, index: Any) -> bool:
    """Whether the index holds the rows' values, rounded at most, instead of codes that approximate them."""
    while inner := getattr(index, "storage", None) or getattr(index, "index", None):
        index = faiss.downcast_index(inner)
    kinds = (faiss.IndexFlat, faiss.IndexScalarQuantizer, faiss.IndexIVFFlat, faiss.IndexIVFScalarQuantizer)
    return isinstance(index, kinds)
