"""manifest.json: the only commit point of an index. What it does not name is not part of the index.

The manifest of an unfinished build or update lies beside it as pending.json; those of earlier generations lie in
generations/.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import xxhash
from pydantic import BaseModel, ConfigDict, ValidationError

from gradtrace.errors import CorruptIndexError, IncompleteIndexError, StoreError

FORMAT_VERSION = 3
MANIFEST_NAME = "manifest.json"
PENDING_NAME = "pending.json"

Precision = Literal["float16", "int8", "int4"]
BasisKind = Literal["spectral", "two-sided", "gaussian", "rademacher", "none"]
Output = Literal["log odds", "value"]  # of the model: of the label's class, or what the label is a value of
FisherSource = Literal["loss", "predict", "empirical"]  # of the labels: the loss's law, Task.predict, the rows' own
# average: of the weights of several checkpoints in a row;  recorded: rows of a recording of the training
CheckpointKind = Literal["weights", "average", "recorded"]
Operation = Literal[
    "build",
    "add checkpoints",
    "add run",
    "append rows",
    "delete rows",
    "compact",
    "roll back",
    "set searcher",
    "add kernels",
    "fit representer",
]


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileEntry(_Entry):
    """A file inside the index directory, `path` relative to it, with its xxh3-128 as hexadecimal digits."""

    path: str
    bytes: int
    xxh3: str


class OptimizerEntry(_Entry):
    name: str
    momentum: float
    weight_decay: float


class CheckpointEntry(_Entry):
    """A checkpoint, and the column block that every stored row has of it."""

    name: str  # unique in an index; the key of Hit.parts. The file's, after "run-1/", "run-2/" ... for later runs
    file: str  # where the weights lie, relative to the index directory
    step: int
    learning_rate: float
    sha256: str
    moments_sha256: str | None = None  # of the file with the optimizer's second moments, if they were kept
    run: int = 0  # which training run it is of, counted from 0; those of one run are in training order
    kind: CheckpointKind = "weights"
    optimizer: OptimizerEntry | None = None
    batch_size: int | None = None
    learning_rate_sum: float | None = None  # of all steps up to this one, from the training's first; None: not known
    second_moments: bool = False  # whether Adam's were kept with it; then its curvature file has a preconditioner
    recording: str | None = None  # of kind "recorded" alone: xxh3-128 of its rows; the weights are those at its end


class Probe(_Entry):
    """A few training rows with their content hashes and their losses at the last checkpoint, to recognise a task."""

    rows: list[int]
    sha256: list[str]
    losses: list[float]


class TaskEntry(_Entry):
    name: str
    train_rows: int  # ids of rows are below this, also those of deleted rows
    layers: list[str] | None = None  # patterns of the parameters that count; None: all that are trained
    parameters_sha256: str  # of the names, shapes and dtypes in the model's state dict
    architecture_sha256: str  # of the model's repr
    probe: Probe


class BasisEntry(_Entry):
    kind: BasisKind
    dimensions: int
    requested: int  # the dimensions that were asked for; some models and kinds have fewer
    seed: int
    fitted_rows: int  # the samples for basis and curvature are drawn from the first so many training rows
    files: list[FileEntry]  # one for each training run, whose gradients at all its checkpoints it projects


class FisherEntry(_Entry):
    """At what labels the gradients were taken of which the curvature is the mean square."""

    source: FisherSource
    description: str

    @property
    def sentence(self) -> str:
        """What the curvature is, without a full stop."""
        kind = {
            "loss": "Fisher information, with labels from the law that the loss implies",
            "predict": "Fisher information, with labels from the task's predictions",
            "empirical": "empirical Fisher information, with the rows' own labels",
        }
        return f"{kind[self.source]}: {self.description}"


class ShardEntry(_Entry):
    """Stored rows [start, stop) at one checkpoint."""

    checkpoint: int  # position in Manifest.checkpoints
    start: int
    stop: int
    rows: FileEntry
    columns: FileEntry
    representations: FileEntry | None = None  # at the checkpoints of Manifest.represented, as a shard of one level


class RepresentationsEntry(_Entry):
    """The last hidden representations of the rows, float16 in shards of one level."""

    source: str  # the layer whose input they are, or "Task.representation"
    dimensions: int


class RepresenterEntry(_Entry):
    """The last layer refitted on the representations (Yeh et al. 2018), and each row's share in its weights."""

    file: FileEntry
    l2: float
    classes: int | None  # None: it predicts a value
    fitted_rows: int
    residual: float  # norm of the shares' sum less the weights, relative to the weights; the largest of all checkpoints
    rows: str  # Manifest.representations_digest of what it was fitted on


class RecallEntry(_Entry):
    """Shares of the exact k best and k worst rows that an approximate searcher found, over held-out queries."""

    top: float
    bottom: float


class SearcherEntry(_Entry):
    """An approximate searcher over all stored rows, with their coordinates at all checkpoints side by side."""

    name: str  # as it was asked for: "faiss:HNSW32,SQfp16", "annoy:50"
    parameters: str  # of its searches, "efSearch=128"
    library: str  # that wrote it, with its version
    file: FileEntry
    rows: str  # Manifest.rows_digest of the rows in it
    recall: dict[str, RecallEntry]  # by method, all checkpoints and rows, default weights
    k: int  # hits at each end that the recall counts
    queries: int
    split: Literal["query", "train"]  # where the queries are from


class KernelsEntry(_Entry):
    """Inverses of TRAK's kernels; those that an update made stale are gone, so some may lack."""

    output: Output
    damping: float  # relative to each kernel's mean diagonal
    files: dict[str, FileEntry]  # by checkpoint name


class Manifest(_Entry):
    """Shards are ordered by checkpoint, then by start, and tile [0, rows) for every checkpoint once complete."""

    format: int = FORMAT_VERSION
    generation: int  # counts up, whatever is published
    made_by: Operation = "build"
    complete: bool
    task: TaskEntry
    checkpoints: list[CheckpointEntry]
    basis: BasisEntry
    curvature: list[FileEntry]  # one file a checkpoint, in their order; empty for bases without curvature
    fisher: FisherEntry | None = None  # None: no curvature
    precision: Precision
    column_scales: list[FileEntry] = []  # int4 only: what each column was divided by, for life; one file a run
    levels: list[int]  # column boundaries of the levels, ascending, the last equals basis.dimensions
    rows: int  # stored rows, at positions 0, 1, ... in the shards
    row_ids: FileEntry | None = None  # int64 [rows], ascending: the training row at each position; None: that number
    deleted: FileEntry | None = None  # int64 [n], ascending: ids of stored rows that no answer may name
    skipped: dict[int, str] = {}  # by row why it is not indexed: such rows are deleted, and stored as zeros
    shard_rows: int
    shards: list[ShardEntry]
    libraries: dict[str, str]
    representations: RepresentationsEntry | None = None  # None: the model has none
    representer: RepresenterEntry | None = None
    searcher: SearcherEntry | None = None  # None: exact search alone
    kernels: KernelsEntry | None = None  # None: no answers by TRAK
    checksum: str = ""  # xxh3-128 of the file's bytes with this text left empty

    @property
    def last_checkpoint(self) -> int:
        """Position of the last run's trained model, of which predictions and losses are told."""
        return trained_models(self.checkpoints)[-1]

    @property
    def represented(self) -> list[int]:
        """Positions of the checkpoints at which rows have representations."""
        return [] if self.representations is None else trained_models(self.checkpoints)

    def with_skipped(self, rows: Mapping[int, str]) -> Manifest:
        """With these rows, by number and reason, among those that are not indexed."""
        return self.model_copy(update={"skipped": dict(sorted((self.skipped | dict(rows)).items()))})

    def files(self) -> list[FileEntry]:
        """Every file of this generation beside the manifest itself."""
        some = [entry for entry in (self.row_ids, self.deleted) if entry is not None]
        some += [self.searcher.file] if self.searcher and not self.searcher_is_stale() else []
        some += self.kernels.files.values() if self.kernels else []
        some += [self.representer.file] if self.representer and not self.representer_is_stale() else []
        shards = [file for shard in self.shards for file in shard_files(shard)]
        return [*self.basis.files, *self.column_scales, *self.curvature, *some, *shards]

    def searcher_is_stale(self) -> bool:
        """Whether the searcher is of other rows than these, so that exact search answers."""
        return self.searcher is not None and self.searcher.rows != self.rows_digest()

    def lacking_kernels(self) -> list[str]:
        """Names of the checkpoints without a kernel."""
        there = self.kernels.files if self.kernels else {}
        return [entry.name for entry in self.checkpoints if entry.kind == "weights" and entry.name not in there]

    def representer_is_stale(self) -> bool:
        """Whether the refitted layer is of other rows or checkpoints than these, so that it must not answer."""
        return self.representer is not None and self.representer.rows != self.representations_digest()

    def representations_digest(self) -> str:
        """Tells apart what is in the rows' representations, and which rows are deleted: xxh3-128 over checksums."""
        files = [*(shard.representations for shard in self.shards), self.deleted]
        return xxhash.xxh3_128_hexdigest("".join(file.xxh3 for file in files if file is not None).encode())

    def stretches(self) -> list[tuple[int, int]]:
        """(start, stop) of the rows that lie in one shard, ascending, as far as the first checkpoint has them."""
        return sorted((shard.start, shard.stop) for shard in self.shards if shard.checkpoint == 0)

    def rows_digest(self) -> str:
        """Tells apart what is in the rows' files, at all checkpoints: xxh3-128 over their checksums."""
        return xxhash.xxh3_128_hexdigest("".join(shard.rows.xxh3 for shard in self.shards).encode())

    def sealed(self) -> Manifest:
        """The same manifest with its checksum filled in."""
        blank = self.model_copy(update={"checksum": ""})
        return self.model_copy(update={"checksum": xxhash.xxh3_128_hexdigest(blank.content())})

    def content(self) -> bytes:
        """What the file holds."""
        return self.model_dump_json(indent=1).encode()


def by_run(entries: Sequence[CheckpointEntry], positions: Iterable[int]) -> list[list[int]]:
    """Positions in the manifest's checkpoints, ascending, one list for each training run that has any of them."""
    runs: dict[int, list[int]] = {}
    for position in sorted(positions, key=lambda position: (entries[position].run, position)):
        runs.setdefault(entries[position].run, []).append(position)
    return list(runs.values())


def weights_positions(entries: Sequence[CheckpointEntry]) -> list[int]:
    """Positions of the checkpoints that are a model's weights as training left them, of all runs."""
    return [position for position, entry in enumerate(entries) if entry.kind == "weights"]


def trained_models(entries: Sequence[CheckpointEntry]) -> list[int]:
    """The position of each run's last checkpoint, by run."""
    return [run[-1] for run in by_run(entries, weights_positions(entries))]


def shard_files(shard: ShardEntry) -> list[FileEntry]:
    """Those of one stretch at one checkpoint."""
    return [file for file in (shard.rows, shard.columns, shard.representations) if file is not None]


def read_manifest(directory: Path) -> Manifest:
    """Read and validate `directory/manifest.json`, the current generation.

    Raises:
        StoreError: no manifest there, or one of another format version.
        IncompleteIndexError: the first build was interrupted.
        CorruptIndexError: the manifest does not parse.
    """
    if not (directory / MANIFEST_NAME).exists() and (directory / PENDING_NAME).exists():
        raise IncompleteIndexError(
            f"the build of {directory} was interrupted; run it again with the same arguments to resume"
        )
    return read_generation(directory, MANIFEST_NAME)


def read_generation(directory: Path, name: str) -> Manifest:
    """Read and validate the manifest in one of an index's files. Raises as `read_manifest`."""
    path = directory / name
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise StoreError(f"no index at {directory}: {name} is missing; build one with `gradtrace build`") from None
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror}") from error
    _check_format(path, content)
    try:
        manifest = Manifest.model_validate_json(content)
    except ValidationError as error:
        raise CorruptIndexError(f"{path} is damaged or of another format: {error}") from None
    blank = content.replace(b'"checksum": "%b"' % manifest.checksum.encode(), b'"checksum": ""')
    if xxhash.xxh3_128_hexdigest(blank) != manifest.checksum:
        raise CorruptIndexError(
            f"{path} is damaged: its checksum does not match its content; restore it or rebuild the index"
        )
    return manifest


def _check_format(path: Path, content: bytes) -> None:
    """Before anything else, which another format may have otherwise. Raises StoreError for another one."""
    try:
        found = json.loads(content)["format"]
    except (ValueError, KeyError, TypeError):
        return  # damaged: the schema says how
    if found != FORMAT_VERSION:
        raise StoreError(f"{path} has format {found}; this release reads {FORMAT_VERSION}: rebuild the index")
