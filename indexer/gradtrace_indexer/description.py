"""What an index holds, in words."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from gradtrace.errors import IncompleteIndexError
from gradtrace.results.display import describe
from gradtrace.store.manifest import CheckpointKind, Manifest, SearcherEntry, read_manifest
from gradtrace.store.row_ids import read_row_ids
from gradtrace_indexer.build.bad_rows import skipped_lines
from gradtrace_indexer.generations import kept_generations, read_pending

_KINDS: dict[CheckpointKind, str] = {
    "weights": "",
    "average": ", the average of a segment's weights",
    "recorded": ", the recording of the training up to it",
}


def describe_searcher(manifest: Manifest, entry: SearcherEntry) -> str:
    """One line: a searcher's parameters, size and recall."""
    if manifest.searcher_is_stale():
        return f"searcher {entry.name} is of earlier rows: exact search answers until `gradtrace build` sets it again"
    recall = ", ".join(f"{name} {share.top:.3f} / {share.bottom:.3f}" for name, share in entry.recall.items())
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
    yield from (f"  {line}" for line in (*_contents(current), *_rows(directory, current)))
    if pending is not None:
        written = sum(shard.stop - shard.start for shard in pending.shards)
        share = written / (pending.rows * len(pending.checkpoints))
        yield f"  unfinished: {pending.made_by}, {share:.0%} written; run it again, or `gradtrace discard` it"
    for kept in reversed(kept_generations(directory)):
        yield (
            f"  kept: generation {kept.generation} ({kept.made_by}), {kept.rows:,} rows x {len(kept.checkpoints)} "
            f"checkpoints, {_megabytes(kept)}"
        )


def _contents(manifest: Manifest) -> Iterator[str]:
    """The checkpoints, and what was computed beside the rows."""
    for checkpoint in manifest.checkpoints:
        total = checkpoint.learning_rate_sum
        rate = f"learning rate {checkpoint.learning_rate:g}" + ("" if total is None else f" (sum so far {total:g})")
        yield f"{checkpoint.name}: step {checkpoint.step}, {rate}{_KINDS[checkpoint.kind]}"
    if manifest.fisher is not None:
        yield f"curvature: {manifest.fisher.sentence}"
    if manifest.searcher is not None:
        yield describe_searcher(manifest, manifest.searcher)
    if manifest.representations is not None:
        yield f"representations: {manifest.representations.dimensions} features, {_refit(manifest)}"
    if manifest.kernels is not None:
        lacking = len(manifest.lacking_kernels())
        remedy = f", {lacking} checkpoint(s) lack theirs: run `gradtrace kernels`" if lacking else ""
        yield f"{len(manifest.kernels.files)} kernel(s) for trak, damping {manifest.kernels.damping:g}{remedy}"


def _rows(directory: Path, manifest: Manifest) -> Iterator[str]:
    ids = read_row_ids(directory, manifest)
    yield (
        f"row numbers 0 to {ids.rows - 1}: {len(ids.live_ids()):,} present, {len(ids.deleted):,} deleted, "
        f"{ids.rows - len(ids.ids):,} deleted and compacted"
    )
    if manifest.skipped:
        yield from skipped_lines(manifest, sorted(manifest.skipped))
    sizes = [stop - start for start, stop in manifest.stretches()]
    yield (
        f"{len(sizes)} shard(s) a checkpoint, of {min(sizes):,} to {max(sizes):,} rows; {_megabytes(manifest)}, built "
        f"with {manifest.libraries}"
    )


def _refit(manifest: Manifest) -> str:
    if manifest.representer is None:
        return "no last layer refitted on them"
    if manifest.representer_is_stale():
        return "last layer refitted on other ones: run `gradtrace representer` again"
    return f"last layer refitted on them with l2 {manifest.representer.l2:g}"


def _megabytes(manifest: Manifest) -> str:
    return f"{sum(entry.bytes for entry in manifest.files()) / 1e6:,.1f} MB"
