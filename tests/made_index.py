"""Small indexes written straight from given rows, for tests of the store and of the search."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradtrace.store.index_files import hash_file
from gradtrace.store.manifest import (
    BasisEntry,
    CheckpointEntry,
    FileEntry,
    Manifest,
    Precision,
    Probe,
    ShardEntry,
    TaskEntry,
)
from gradtrace.store.precision import column_scales
from gradtrace.store.rows import RowStore
from gradtrace.store.shards import ShardLayout
from gradtrace_indexer.writing.shard_writer import ShardWriter


def write_index(
    directory: Path,
    rows: NDArray[np.float32],
    precision: Precision = "float16",
    levels: list[int] | None = None,
    shard_rows: int = 1 << 30,
) -> Manifest:
    """Write rows [checkpoints, n, D] as an index; returns its manifest (which is not written)."""
    checkpoints, count, dimensions = rows.shape
    levels = levels or [dimensions]
    mean_squares = torch.from_numpy(rows).double().flatten(0, 1).square().sum(0) / max(1, checkpoints * count)
    scales = column_scales(mean_squares, checkpoints * count)
    scales_of_columns = scales if precision == "int4" else None
    shards = [
        _write_shard(directory, rows[c], c, start, min(start + shard_rows, count), levels, precision, scales_of_columns)
        for c in range(checkpoints)
        for start in range(0, count, shard_rows)
    ]
    for folder in ("bases", "column_scales"):
        (directory / folder).mkdir(parents=True)
    (directory / "bases/0.safetensors").write_bytes(b"a basis")
    (directory / "curvature").mkdir()
    (directory / "curvature" / "0.safetensors").write_bytes(b"a curvature")
    if precision == "int4":
        (directory / "column_scales/0.safetensors").write_bytes(safetensors.torch.save({"column_scales": scales}))
    entries = [CheckpointEntry(name=f"c{c}", file="", step=c, learning_rate=0.1, sha256="") for c in range(checkpoints)]
    probe = Probe(rows=[], sha256=[], losses=[])
    task = TaskEntry(name="made", train_rows=count, parameters_sha256="", architecture_sha256="", probe=probe)
    basis = BasisEntry(
        kind="none",
        dimensions=dimensions,
        requested=dimensions,
        seed=0,
        fitted_rows=count,
        files=[file_entry(directory, "bases/0.safetensors")],
    )
    return Manifest(
        generation=0,
        complete=True,
        task=task,
        checkpoints=entries,
        basis=basis,
        curvature=[file_entry(directory, "curvature/0.safetensors")],
        precision=precision,
        column_scales=[file_entry(directory, "column_scales/0.safetensors")] if precision == "int4" else [],
        levels=levels,
        rows=count,
        shard_rows=shard_rows,
        shards=shards,
        libraries={},
    )


def _write_shard(
    directory: Path,
    rows: NDArray[np.float32],
    checkpoint: int,
    start: int,
    stop: int,
    levels: list[int],
    precision: Precision,
    column_scales: Tensor | None,
) -> ShardEntry:
    layout = ShardLayout(stop - start, tuple(levels), precision)
    with ShardWriter(directory, f"rows/c{checkpoint}/{start:09d}.rows", layout, column_scales) as writer:
        for first in range(start, stop, 7):
            writer.append(torch.from_numpy(rows[first : min(first + 7, stop)].copy()))
        entry = writer.commit()
    name = f"columns/c{checkpoint}/{start:09d}.parquet"
    path = directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    numbers = np.arange(start, stop)
    nullable = pyarrow.array(numbers % 3 == 0, mask=numbers % 5 == 4)
    norms = pyarrow.array(np.linalg.norm(rows[start:stop].astype(np.float64), axis=1).astype(np.float32))
    columns = {"label": numbers, "prediction": numbers, "loss": norms, "correct": nullable, "norm": norms}
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return ShardEntry(checkpoint=checkpoint, start=start, stop=stop, rows=entry, columns=file_entry(directory, name))


def file_entry(directory: Path, name: str) -> FileEntry:
    return FileEntry(path=name, bytes=(directory / name).stat().st_size, xxh3=hash_file(directory / name))


def make_store(
    directory: Path,
    rows: NDArray[np.float32],
    precision: Precision = "float16",
    levels: list[int] | None = None,
    shard_rows: int = 1 << 30,
) -> RowStore:
    """`write_index`, opened."""
    return RowStore(directory, write_index(directory, rows, precision, levels, shard_rows))
