"""Indexes made from the rows of another one, without computing gradients again. Searchers read them; tasks do not."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import safetensors.torch
from torch import Tensor

from gradtrace.store.manifest import MANIFEST_NAME, Manifest, Precision, Probe, ShardEntry
from gradtrace.store.precision import column_scales
from gradtrace.store.rows import RowStore
from gradtrace.store.shards import ShardLayout, default_levels
from gradtrace_indexer.writing.files import write_file, write_manifest
from gradtrace_indexer.writing.shard_writer import ShardWriter

_SHARD_ROWS = 32_768
_SAMPLE_ROWS = 1024

Blocks = Callable[[int], Iterable[Tensor]]  # position of a checkpoint in the source -> its rows, blocks [b, columns]


def rounded(source: RowStore, manifest: Manifest, out: Path, dimensions: int, precision: Precision) -> Manifest:
    """The same rows, cut to their first columns and rounded again."""

    def blocks(checkpoint: int) -> Iterable[Tensor]:
        return (block[:, 0] for _, block in source.blocks([checkpoint], 2048))

    return derived(source, manifest, out, dimensions, precision, range(source.checkpoints), source.rows, blocks)


def derived(
    source: RowStore,
    manifest: Manifest,
    out: Path,
    dimensions: int,
    precision: Precision,
    checkpoints: Sequence[int],
    rows: int,
    blocks: Blocks,
) -> Manifest:
    """Write an index of the first columns of other rows, whose blocks must fit into shards."""
    levels = default_levels(dimensions)
    scales = _column_scales(source, checkpoints)[:dimensions] if precision == "int4" else None
    columns = write_file(out, "columns.parquet", _no_columns())
    shards = []
    for place, checkpoint in enumerate(checkpoints):
        parts = (block[:, :dimensions] for block in blocks(checkpoint))
        for start in range(0, rows, _SHARD_ROWS):
            stop = min(start + _SHARD_ROWS, rows)
            layout = ShardLayout(stop - start, tuple(levels), precision)
            name = f"rows/{manifest.checkpoints[checkpoint].name}/{start:09d}.rows"
            with ShardWriter(out, name, layout, scales) as writer:
                _fill(writer, parts, layout.rows)
                entry = writer.commit()
            shards.append(ShardEntry(checkpoint=place, start=start, stop=stop, rows=entry, columns=columns))
    content = None if scales is None else safetensors.torch.save({"column_scales": scales})
    dropped = dict.fromkeys(("row_ids", "deleted", "representations", "representer", "searcher", "kernels"))
    probe = Probe(rows=[], sha256=[], losses=[])
    changed = {
        **dropped,
        "task": manifest.task.model_copy(update={"train_rows": rows, "probe": probe}),
        "curvature": [manifest.curvature[checkpoint] for checkpoint in checkpoints] if manifest.curvature else [],
        "skipped": {},
        "checkpoints": [manifest.checkpoints[checkpoint] for checkpoint in checkpoints],
        "basis": manifest.basis.model_copy(update={"dimensions": dimensions}),
        "precision": precision,
        "column_scales": [] if content is None else [write_file(out, "column_scales.safetensors", content)],
        "levels": levels,
        "rows": rows,
        "shard_rows": _SHARD_ROWS,
        "shards": shards,
    }
    return write_manifest(out, MANIFEST_NAME, manifest.model_copy(update=changed))


def _fill(writer: ShardWriter, parts: Iterator[Tensor], rows: int) -> None:
    while rows:
        part = next(parts)
        writer.append(part)
        rows -= len(part)


def _column_scales(source: RowStore, checkpoints: Sequence[int]) -> Tensor:
    some = np.random.default_rng(0).choice(source.rows, min(source.rows, _SAMPLE_ROWS), replace=False)
    sample = source.gather(checkpoints, np.sort(some))
    return column_scales(sample.double().square().mean((0, 1)), sample.shape[0] * sample.shape[1])


def _no_columns() -> bytes:
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({}), sink)
    return sink.getvalue()
