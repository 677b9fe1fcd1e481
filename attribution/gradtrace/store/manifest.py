"""manifest.json: its schema. It is the only commit point: a file that it does not name is not part of
the index.

The manifest of an unfinished build or update is pending.json beside it; those of earlier generations are in
generations/.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

import xxhash
from pydantic import BaseModel, ConfigDict, FiniteFloat

FORMAT_VERSION = 5
OLDEST_FORMAT = 3  # that is still read: 4 has the basis "gauss-newton" besides, 5 sparse rows
MANIFEST_NAME = "manifest.json"
PENDING_NAME = "pending.json"

Precision = Literal["float16", "int8", "int4"]
# sparse: no common basis, each row keeps the strongest of its own coordinates; the coordinates are single weights
BasisKind = Literal["gauss-newton", "spectral", "two-sided", "gaussian", "rademacher", "none", "sparse"]
Output = Literal["log odds", "value"]  # TRAK's model output: the log odds of the label's class, or a predicted value
# Where the labels of the Fisher information are from: the law that the loss implies, Task.predict, or the training data
# ("empirical"). "rows": none are drawn, the curvature is that of the weighted gradients of the rows themselves
FisherSource = Literal["loss", "predict", "empirical", "rows"]
# average: the mean weights of several consecutive checkpoints;  recorded: the rows are from a recording of the training
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
    """A file in the index directory: `path` relative to the directory, xxh3-128 as hexadecimal digits."""

    path: str
    bytes: int
    xxh3: str


@dataclass(frozen=True, slots=True)
class Optimizer:
    """The settings of the optimizer that methods need. `name` is its class name in lower case ("sgd", "adamw")."""

    name: str
    momentum: FiniteFloat = 0.0
    weight_decay: FiniteFloat = 0.0

    __pydantic_config__ = ConfigDict(extra="forbid", revalidate_instances="always")


class CheckpointEntry(_Entry):
    """A checkpoint, at which every stored row has a block of columns."""

    name: str  # unique in the index, the key of Hit.parts: the file's name, with "run-1/", "run-2/" ... for later runs
    file: str  # path of the weights, relative to the index directory
    step: int
    learning_rate: float
    sha256: str
    moments_sha256: str | None = None  # of the file with the optimizer's second moments, if they were kept
    run: int = 0  # number of the training run; a run's checkpoints are in the order of training
    kind: CheckpointKind = "weights"
    optimizer: Optimizer | None = None
    batch_size: int | None = None
    learning_rate_sum: float | None = None  # over all steps from the training's first to this one; None: unknown
    second_moments: bool = False  # whether Adam's were kept; the curvature file then holds a preconditioner
    recording: str | None = None  # only for kind "recorded": xxh3-128 of its rows; the weights are those at its end


class Probe(_Entry):
    """A few training rows, with content hashes and losses at the last checkpoint, by which a task is recognised."""

    rows: list[int]
    sha256: list[str]
    losses: list[float]


class TaskEntry(_Entry):
    name: str
    train_rows: int  # number of training rows, also deleted ones
    layers: list[str] | None = None  # patterns of the attributed parameters' names; None: all that require a gradient
    parameters_sha256: str  # of the names, shapes and dtypes in the model's state dict
    architecture_sha256: str  # of the model's repr
    probe: Probe


class BasisEntry(_Entry):
    kind: BasisKind
    dimensions: int
    requested: int  # the dimensions that were asked for; small models and some kinds have fewer
    seed: int
    fitted_rows: int  # basis and curvature are fitted on samples of the first `fitted_rows` training rows
    files: list[FileEntry]  # one for each training run, used at all checkpoints of the run
    damping: float | None = None  # of the whitening by which sparse rows choose and scale their coordinates

    @property
    def is_sparse(self) -> bool:
        """Whether each row has coordinates of its own, `dimensions` in number."""
        return self.kind == "sparse"

    @property
    def has_curvature(self) -> bool:
        """Whether the curvature is known in its coordinates."""
        return self.kind in ("gauss-newton", "spectral", "sparse")


class FisherEntry(_Entry):
    """The labels of the Fisher information: the curvature is the mean square of the gradients at these labels.

    output: for source "rows", what the loss is of, and so what their weights are (`fitted.gauss_newton`)
    """

    source: FisherSource
    description: str
    output: Output | None = None

    @property
    def sentence(self) -> str:
        """A description of the curvature, without a full stop."""
        kind = {
            "loss": "Fisher information, with labels from the law that the loss implies",
            "predict": "Fisher information, with labels from the task's predictions",
            "empirical": "empirical Fisher information, with the rows' own labels",
            "rows": "Gauss-Newton matrix" if self.output else "empirical Fisher information, with the rows' own labels",
        }
        return f"{kind[self.source]}: {self.description}"


class SegmentSizes(_Entry):
    """Of a shard of sparse rows: how many lists of postings it has, and pairs of postings in all."""

    lists: int
    pairs: int


class ShardEntry(_Entry):
    """The stored rows [start, stop) at one checkpoint."""

    checkpoint: int  # position in Manifest.checkpoints
    start: int
    stop: int
    rows: FileEntry
    columns: FileEntry
    representations: FileEntry | None = None  # a shard of one level, only at the checkpoints of Manifest.represented
    segment: SegmentSizes | None = None  # only of sparse rows


class RepresentationsEntry(_Entry):
    """The last hidden representations of the rows, float16 in shards of one level."""

    source: str  # the layer whose input they are, or "Task.representation"
    dimensions: int


class RepresenterEntry(_Entry):
    """The last layer, refitted on the representations (Yeh et al. 2018), and the share of each row in its weights."""

    file: FileEntry
    l2: float
    classes: int | None  # None: the layer predicts a value
    fitted_rows: int
    residual: float  # |sum of the shares - weights| / |weights|, the largest of all checkpoints
    rows: str  # Manifest.representations_digest of the representations that it was fitted on


class RecallEntry(_Entry):
    """Recall of an approximate searcher on held-out queries: of the exact k best rows, and of the k worst."""

    top: float
    bottom: float


class SearcherEntry(_Entry):
    """An approximate searcher over all stored rows, with their coordinates at all checkpoints side by side."""

    name: str  # as given to the build: "faiss:HNSW32,SQfp16", "annoy:50"
    parameters: str  # search parameters, "efSearch=128"
    library: str  # that wrote the file, with its version
    file: FileEntry
    rows: str  # Manifest.rows_digest of the rows in it
    recall: dict[str, RecallEntry]  # by method, for all checkpoints and rows and the method's default options
    k: int  # number of hits at each end that recall is measured for
    queries: int  # number of held-out queries
    split: Literal["query", "train"]  # which data set they are from


class KernelsEntry(_Entry):
    """Inverses of TRAK's kernels, one per checkpoint; absent where an update invalidated it."""

    output: Output
    damping: float  # relative to the mean diagonal of each kernel
    files: dict[str, FileEntry]  # by checkpoint name


class Manifest(_Entry):
    """manifest.json.

    Shards are ordered by checkpoint, then by start. Once complete, those of each checkpoint tile [0, rows).
    """

    format: int = FORMAT_VERSION
    generation: int  # increases with every published manifest
    made_by: Operation = "build"
    complete: bool
    task: TaskEntry
    checkpoints: list[CheckpointEntry]
    basis: BasisEntry
    curvature: list[FileEntry]  # one file for each checkpoint, in their order; empty for bases without curvature
    fisher: FisherEntry | None = None  # None: no curvature
    precision: Precision
    column_scales: list[FileEntry] = []  # int4 only, one file for each run; never changed
    levels: list[int]  # column boundaries of the levels, ascending; the last equals basis.dimensions
    rows: int  # number of stored rows, at positions 0, 1, ... in the shards
    row_ids: FileEntry | None = None  # int64 [rows], ascending: the training row at each position; None: the position
    deleted: FileEntry | None = None  # int64 [n], ascending: ids of stored rows that answers leave out
    skipped: dict[int, str] = {}  # row -> why it is not indexed; such rows are stored as zeros, and deleted
    shard_rows: int
    shards: list[ShardEntry]
    libraries: dict[str, str]
    representations: RepresentationsEntry | None = None  # None: the model has none
    representer: RepresenterEntry | None = None
    searcher: SearcherEntry | None = None  # None: exact search only
    kernels: KernelsEntry | None = None  # None: no method `trak`
    checksum: str = ""  # xxh3-128 of the file's bytes with an empty text here

    @property
    def last_checkpoint(self) -> int:
        """Position of the last run's trained model, whose predictions and losses answers report."""
        return trained_models(self.checkpoints)[-1]

    @property
    def represented(self) -> list[int]:
        """Positions of the checkpoints at which rows have representations."""
        return [] if self.representations is None else trained_models(self.checkpoints)

    def with_skipped(self, rows: Mapping[int, str]) -> Manifest:
        """The manifest with these rows added to `skipped`. rows: row -> reason"""
        return self.model_copy(update={"skipped": dict(sorted((self.skipped | dict(rows)).items()))})

    def files(self) -> list[FileEntry]:
        """All files of this generation except the manifest."""
        optional = [entry for entry in (self.row_ids, self.deleted) if entry is not None]
        optional += [self.searcher.file] if self.searcher and not self.searcher_is_stale() else []
        optional += self.kernels.files.values() if self.kernels else []
        optional += [self.representer.file] if self.representer and not self.representer_is_stale() else []
        shards = [file for shard in self.shards for file in shard_files(shard)]
        return [*self.basis.files, *self.column_scales, *self.curvature, *optional, *shards]

    def searcher_is_stale(self) -> bool:
        """Whether the searcher was built from other rows than the stored ones; exact search then answers."""
        return self.searcher is not None and self.searcher.rows != self.rows_digest()

    def lacking_kernels(self) -> list[str]:
        """Names of the checkpoints without a kernel."""
        with_kernel = self.kernels.files if self.kernels else {}
        return [entry.name for entry in self.checkpoints if entry.kind == "weights" and entry.name not in with_kernel]

    def representer_is_stale(self) -> bool:
        """Whether the representer was fitted on other rows or checkpoints; method `representer` is then unavailable."""
        return self.representer is not None and self.representer.rows != self.representations_digest()

    def representations_digest(self) -> str:
        """Identifies the content of the representations and the deleted rows: xxh3-128 over the files' checksums."""
        files = [*(shard.representations for shard in self.shards), self.deleted]
        return xxhash.xxh3_128_hexdigest("".join(file.xxh3 for file in files if file is not None).encode())

    def stretches(self) -> list[tuple[int, int]]:
        """(start, stop) of the rows in each shard of the first checkpoint, ascending."""
        return sorted((shard.start, shard.stop) for shard in self.shards if shard.checkpoint == 0)

    def rows_digest(self) -> str:
        """Identifies the content of the rows at all checkpoints: xxh3-128 over the shards' checksums."""
        return xxhash.xxh3_128_hexdigest("".join(shard.rows.xxh3 for shard in self.shards).encode())

    def sealed(self) -> Manifest:
        """The manifest in this format, whatever it was read in, with its checksum."""
        blank = self.model_copy(update={"checksum": "", "format": FORMAT_VERSION})
        return blank.model_copy(update={"checksum": xxhash.xxh3_128_hexdigest(blank.content())})

    def content(self) -> bytes:
        """The bytes of the file."""
        return self.model_dump_json(indent=1).encode()


def by_run(entries: Sequence[CheckpointEntry], positions: Iterable[int]) -> list[list[int]]:
    """The given positions of checkpoints, ascending, in one list for each training run."""
    ordered = sorted(positions, key=lambda position: (entries[position].run, position))
    return [list(run) for _, run in groupby(ordered, key=lambda position: entries[position].run)]


def weights_positions(entries: Sequence[CheckpointEntry]) -> list[int]:
    """Positions of the checkpoints of kind "weights", in all runs."""
    return [position for position, entry in enumerate(entries) if entry.kind == "weights"]


def trained_models(entries: Sequence[CheckpointEntry]) -> list[int]:
    """The position of the last checkpoint of kind "weights" in each run."""
    return [run[-1] for run in by_run(entries, weights_positions(entries))]


def shard_files(shard: ShardEntry) -> list[FileEntry]:
    """The files of one shard."""
    return [file for file in (shard.rows, shard.columns, shard.representations) if file is not None]
