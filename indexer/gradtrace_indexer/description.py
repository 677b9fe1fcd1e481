"""What an index holds, in words."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from gradtrace.errors import IncompleteIndexError
from gradtrace.results.display import describe
from gradtrace.store.manifest import CheckpointKind, Manifest, SearcherEntry, read_manifest
from gradtrace.store.row_ids import read_row_ids
from gradtrace_indexer.build.bad_rows import told
from gradtrace_indexer.generations import kept_generations, read_pending

_KINDS: dict[CheckpointKind, str] = {
    "weights": "",
    "average": ", the average of a segment's weights",
    "recorded": ", the recording of the training up to it",
}


def describe_searcher(manifest: Manifest, entry: SearcherEntry) -> str:
    """One line on what a searcher is and finds."""
    if manifest.searcher_is_stale():
        return f"searcher {entry.name} is of earlier rows: exact search answers until `gradtrace build` sets it again"
    recall = ", ".join(f"{name} {found.top:.3f} / {found.bottom:.3f}" for name, found in entry.recall.items())
    return (
        f"searcher {entry.name} ({entry.parameters}), {entry.file.bytes / 1e6:,.1f} MB, by {entry.library}; "
        f"recall@{entry.k} at the top / bottom on {entry.queries} {entry.split} rows: {recall}"
    )


def details(directory: Path) -> Iterator[str]:
    """Line by line: the current generation, what is unfinished, and the earlier ones that are kept.

    Raises:
        StoreError: there is no index.
        CorruptIndexError: a manifest or the file of row ids is damaged.
    """
    pending = read_pending(directory)
    try:
        current = read_manifest(directory)
    except IncompleteIndexError:
        assert pending is not None
        yield f"unfinished: run the build again; {describe(pending)}"
        return
    yield describe(current)
    for checkpoint in current.checkpoints:
        total = checkpoint.learning_rate_sum
        rate = f"learning rate {checkpoint.learning_rate:g}" + ("" if total is None else f" (sum so far {total:g})")
        yield f"  {checkpoint.name}: step {checkpoint.step}, {rate}{_KINDS[checkpoint.kind]}"
    if current.fisher is not None:
        yield f"  curvature: {current.fisher.sentence}"
    if current.searcher is not None:
        yield f"  {describe_searcher(current, current.searcher)}"
    if current.representations is not None:
        yield f"  representations: {current.representations.dimensions} features, {_refit(current)}"
    if current.kernels is not None:
        lacking = len(current.lacking_kernels())
        what = f", {lacking} checkpoint(s) lack theirs: run `gradtrace kernels`" if lacking else ""
        yield f"  {len(current.kernels.files)} kernel(s) for trak, damping {current.kernels.damping:g}{what}"
    ids = read_row_ids(directory, current)
    yield (
        f"  row numbers 0 to {ids.rows - 1}: {len(ids.live_ids()):,} present, {len(ids.deleted):,} deleted, "
        f"{ids.rows - len(ids.ids):,} deleted and compacted"
    )
    if current.skipped:
        yield from (f"  {line}" for line in told(current, sorted(current.skipped)))
    stretches = current.stretches()
    yield (
        f"  {len(stretches)} shard(s) a checkpoint, of {min(b - a for a, b in stretches):,} to "
        f"{max(b - a for a, b in stretches):,} rows; {_megabytes(current)}, built with {current.libraries}"
    )
    if pending is not None:
        written = sum(shard.stop - shard.start for shard in pending.shards)
        share = written / (pending.rows * len(pending.checkpoints))
        yield f"  unfinished: {pending.made_by}, {share:.0%} there; run it again, or `gradtrace discard` it"
    for kept in kept_generations(directory)[::-1]:
        yield (
            f"  kept: generation {kept.generation} ({kept.made_by}), {kept.rows:,} rows x {len(kept.checkpoints)} "
            f"checkpoints, {_megabytes(kept)}"
        )


def _refit(manifest: Manifest) -> str:
    if manifest.representer is None:
        return "no last layer refitted on them"
    if manifest.representer_is_stale():
        return "last layer refitted on other ones: run `gradtrace representer` again"
    return f"last layer refitted on them with l2 {manifest.representer.l2:g}"


def _megabytes(manifest: Manifest) -> str:
    return f"{sum(entry.bytes for entry in manifest.files()) / 1e6:,.1f} MB"
