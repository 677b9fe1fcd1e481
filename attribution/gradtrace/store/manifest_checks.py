"""Whether a manifest that parses describes an index that can be: what its schema cannot say.

A manifest may have been changed by others and sealed again, so its checksum proves nothing. Whatever passes here can be
read without a number, a name or a path in it doing harm; sizes are compared with those of the files when these are
opened.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from gradtrace.store.regular_files import name_problem, shortened

if TYPE_CHECKING:  # manifest.py checks what it reads
    from gradtrace.store.manifest import CheckpointEntry, FileEntry, Manifest, ShardEntry

_MOST_COLUMNS = 1 << 31
_MOST_ROWS = 1 << 31
_MOST_LEVELS = 64
_LARGEST = 1 << 53  # of other whole numbers: floats hold them
_LARGEST_SEGMENT = 1 << 16  # rows that a posting can name
_MOST_POSTINGS = 1 << 32  # pairs of them, or lists, in a segment
_XXH3, _SHA256 = re.compile("[0-9a-f]{32}"), re.compile("[0-9a-f]{64}")


def manifest_problems(manifest: Manifest) -> list[str]:
    """What makes no sense in a manifest, one sentence each, in the order of importance; empty if all does.

    An unfinished generation may lack files and shards; of a complete one, they must be there.
    """
    checks: Sequence[Callable[[Manifest], Iterator[str]]] = (_numbers, _checkpoints, _runs, _files)
    problems = [problem for check in checks for problem in check(manifest)]
    if problems:  # the others count on these
        return problems
    return [problem for check in (_shards, _row_sets, _derived) for problem in check(manifest)]


def _numbers(manifest: Manifest) -> Iterator[str]:
    basis, levels = manifest.basis, manifest.levels
    if not 1 <= manifest.generation < _LARGEST:
        yield f"its generation is {manifest.generation}"
    if not 1 <= basis.dimensions <= _MOST_COLUMNS:
        yield f"rows of {basis.dimensions} columns are impossible"
    if not levels or len(levels) > _MOST_LEVELS or any(stop <= start for start, stop in pairwise([0, *levels])):
        yield "its levels are not ascending column boundaries"
    elif levels[-1] != basis.dimensions:
        yield f"its levels end at column {levels[-1]}, its rows at {basis.dimensions}"
    if manifest.precision == "int4" and any(edge % 2 for edge in levels[:-1]):
        yield "levels of int4 rows must be of even width"
    if not 1 <= manifest.rows <= manifest.task.train_rows <= _MOST_ROWS:
        yield f"{manifest.rows} stored rows of {manifest.task.train_rows} training rows are impossible"
    if basis.is_sparse != (basis.damping is not None) or not 0 < (basis.damping or 1) < math.inf:
        yield "only sparse rows have a damping, above zero"
    if basis.is_sparse and (manifest.precision != "int8" or len(levels) > 1):
        yield "sparse rows have whole numbers of 8 bits, and one level"
    if not 1 <= manifest.shard_rows < _LARGEST:
        yield f"shards of {manifest.shard_rows} rows are impossible"
    if not (1 <= basis.requested < _LARGEST and 1 <= basis.fitted_rows <= _MOST_ROWS and abs(basis.seed) <= 1 << 64):
        yield "the numbers of its basis are impossible"


def _checkpoints(manifest: Manifest) -> Iterator[str]:
    if not manifest.checkpoints:
        yield "it has no checkpoint"
    times = Counter(entry.name for entry in manifest.checkpoints)
    for name in sorted(name for name, count in times.items() if count > 1):
        yield f"two of its checkpoints are named {shortened(name)!r}"
    for entry in manifest.checkpoints:
        for problem in _checkpoint(entry):
            yield f"checkpoint {shortened(entry.name)!r}: {problem}"


def _checkpoint(entry: CheckpointEntry) -> Iterator[str]:
    if name_problem(entry.name) is not None:
        yield "this is not a usable name"
    rates = [entry.learning_rate, *([] if entry.learning_rate_sum is None else [entry.learning_rate_sum])]
    if not all(math.isfinite(rate) and rate >= 0 for rate in rates):
        yield "its learning rate is not a finite number that is zero or more"
    whole = (entry.step, entry.run, 1 if entry.batch_size is None else entry.batch_size - 1)
    if not all(0 <= number < _LARGEST for number in whole):
        yield "its step, run or batch size is impossible"
    digests = [entry.sha256, *([] if entry.moments_sha256 is None else [entry.moments_sha256])]
    if not all(_SHA256.fullmatch(digest) for digest in digests):
        yield "its SHA-256 is malformed"
    if (entry.kind == "recorded") != (entry.recording is not None) or not _XXH3.fullmatch(entry.recording or "0" * 32):
        yield "only the checkpoint of a recording has the checksum of one"
    if entry.kind == "average" and name_problem(entry.file) is not None:
        yield "the file of an average must be in the index"
    if not entry.file.isprintable() or not entry.file or entry.file.startswith("/"):
        yield "the path of its weights is not relative to the index"


def _runs(manifest: Manifest) -> Iterator[str]:
    """A basis for each training run, and trained weights; steps that ascend."""
    by_run: dict[int, list[CheckpointEntry]] = {}
    for entry in manifest.checkpoints:
        by_run.setdefault(entry.run, []).append(entry)
    if sorted(by_run) != list(range(len(manifest.basis.files))):
        numbers = sorted(by_run)[:9]
        yield f"its checkpoints are of the training runs {numbers}, and it has {len(manifest.basis.files)} bases"
    for run, entries in sorted(by_run.items()):
        if all(entry.kind != "weights" for entry in entries):
            yield f"training run {run} has no checkpoint that training wrote"
        trained = [entry.step for entry in entries if entry.kind == "weights"]
        steps = [entry.step for entry in entries]
        if trained != sorted(set(trained)) or steps != sorted(steps):
            yield f"the checkpoints of training run {run} are not in the order of training"
    scales = len(manifest.basis.files) if manifest.precision == "int4" else 0
    if len(manifest.column_scales) != scales:
        yield f"it has {len(manifest.column_scales)} files of column scales, not {scales}"
    needed = len(manifest.checkpoints) if manifest.basis.has_curvature else 0
    if len(manifest.curvature) != needed and (manifest.complete or len(manifest.curvature) > needed):
        yield f"it has {len(manifest.curvature)} files of curvature, not {needed}"


def _files(manifest: Manifest) -> Iterator[str]:
    by_path: dict[str, FileEntry] = {}
    for entry in _all_files(manifest):
        if (problem := name_problem(entry.path)) is not None:
            yield problem
        elif not 0 <= entry.bytes < _LARGEST or not _XXH3.fullmatch(entry.xxh3):
            yield f"the size or the checksum of {shortened(entry.path)} is malformed"
        elif by_path.setdefault(entry.path, entry) != entry:
            yield f"{shortened(entry.path)} is named with two sizes or checksums"


def _all_files(manifest: Manifest) -> Iterator[FileEntry]:
    """Also those that are stale."""
    yield from manifest.files()
    yield from (entry.file for entry in (manifest.searcher, manifest.representer) if entry is not None)


def _shards(manifest: Manifest) -> Iterator[str]:
    """Complete: they tile the rows in the same stretches at every checkpoint. Unfinished: they do not overlap."""
    by_checkpoint: dict[int, list[ShardEntry]] = {number: [] for number in range(len(manifest.checkpoints))}
    for shard in manifest.shards:
        if shard.checkpoint not in by_checkpoint or not 0 <= shard.start < shard.stop <= manifest.rows:
            yield f"it has a shard of rows {shard.start} to {shard.stop} at checkpoint {shard.checkpoint}"
            return
        by_checkpoint[shard.checkpoint].append(shard)
    first = [(shard.start, shard.stop) for shard in by_checkpoint[0]]
    for number, shards in by_checkpoint.items():
        stretches = [(shard.start, shard.stop) for shard in shards]
        gaps = [start - stop for (_, stop), (start, _) in pairwise([(0, 0), *stretches, (manifest.rows, 0)])]
        if min(gaps) < 0 or (manifest.complete and (any(gaps) or stretches != first)):
            name = manifest.checkpoints[number].name
            yield f"the shards of checkpoint {name} do not cover the rows, in the stretches of the first checkpoint"
    for shard in manifest.shards:
        if (shard.segment is not None) != manifest.basis.is_sparse:
            yield "only shards of sparse rows have postings"
            break
        if shard.segment is not None and not (
            0 <= shard.segment.lists <= shard.segment.pairs < _MOST_POSTINGS
            and shard.stop - shard.start <= _LARGEST_SEGMENT
        ):
            yield f"its shard of rows {shard.start} to {shard.stop} has impossible numbers of rows or postings"
            break
    paths = [shard.rows.path for shard in manifest.shards]
    if len(set(paths)) < len(paths):
        yield "two of its shards are in one file"
    represented = set(manifest.represented)
    if any((shard.representations is not None) != (shard.checkpoint in represented) for shard in manifest.shards):
        yield "representations are missing, or are of other checkpoints than the last ones"


def _row_sets(manifest: Manifest) -> Iterator[str]:
    """Ids, deleted and skipped rows, and the rows by which the task is recognised."""
    rows, train_rows = manifest.rows, manifest.task.train_rows
    if (rows if manifest.row_ids is None else train_rows) != train_rows or (
        manifest.row_ids is not None and manifest.row_ids.bytes != 8 * rows
    ):
        yield "its row ids are not those of its rows"
    if manifest.deleted is not None and (manifest.deleted.bytes % 8 or not 0 < manifest.deleted.bytes < 8 * rows):
        yield "its deleted rows are not some of its rows"
    if any(not 0 <= row < train_rows for row in manifest.skipped):
        yield "it skips rows that the training data does not have"
    probe = manifest.task.probe
    if not len(probe.rows) == len(probe.sha256) == len(probe.losses) or any(
        not 0 <= r < train_rows for r in probe.rows
    ):
        yield "the rows by which its task is recognised are malformed"
    digests = (*probe.sha256, manifest.task.parameters_sha256, manifest.task.architecture_sha256)
    if not all(_SHA256.fullmatch(digest) for digest in digests):
        yield "a SHA-256 of its task is malformed"


def _derived(manifest: Manifest) -> Iterator[str]:
    """What was computed from the rows."""
    kernels, refit, searcher = manifest.kernels, manifest.representer, manifest.searcher
    names = {entry.name for entry in manifest.checkpoints}
    if kernels and (not kernels.files.keys() <= names or not 0 < kernels.damping < math.inf):
        yield "its kernels are of other checkpoints, or their damping is not above zero"
    if manifest.representations and not 1 <= manifest.representations.dimensions <= _MOST_COLUMNS:
        yield f"representations of {manifest.representations.dimensions} features are impossible"
    if refit and (manifest.representations is None or not 0 < refit.l2 < math.inf or not math.isfinite(refit.residual)):
        yield "its refitted layer has no representations, or no finite numbers"
    if refit and not (1 <= refit.fitted_rows <= _MOST_ROWS and 1 <= (refit.classes or 1) <= _MOST_COLUMNS):
        yield "the numbers of its refitted layer are impossible"
    if searcher and not (1 <= searcher.k <= _MOST_ROWS and 0 <= searcher.queries <= _MOST_ROWS):
        yield "the numbers of its searcher's queries are impossible"
    shares = [share for recall in searcher.recall.values() for share in (recall.top, recall.bottom)] if searcher else []
    if not all(0 <= share <= 1 for share in shares):
        yield "a recall of its searcher is not between 0 and 1"
