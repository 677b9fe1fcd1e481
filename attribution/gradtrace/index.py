"""An open index: answers which training rows pushed a prediction towards or away from what it is."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradtrace import methods
from gradtrace.basis import Basis, load_basis, require_layers
from gradtrace.checkpoints import Checkpoint
from gradtrace.devices import pick_device
from gradtrace.encoder import GradientModel
from gradtrace.errors import CheckpointError, CorruptIndexError, IncompleteIndexError, MismatchError, QueryError
from gradtrace.fingerprint import check_probe_losses, check_task
from gradtrace.guards import check_dataset
from gradtrace.manifest import CheckpointEntry, Manifest, read_manifest
from gradtrace.queries import Query, resolve_queries
from gradtrace.results import Hit, InfluenceResult
from gradtrace.row_filter import RowFilter
from gradtrace.search import ProgressiveSearcher, SearchResult, exhaustive_scores
from gradtrace.store import RowStore
from gradtrace.task import Example, Task

_QUERY_BATCH = 64


class Index:
    """A read-only index with its task and the models of all its checkpoints. One thread at a time may use it.

    Attributes:
        rows: number of training rows.
        methods: names of the methods that it answers.
        columns: label, prediction, loss, correct and norm of every row at the last checkpoint, each [rows].
        last_timing: milliseconds of the last `influence` call: "gradient", "search" and "rest".
    """

    def __init__(
        self, task: Task, manifest: Manifest, store: RowStore, models: list[GradientModel], basis: Basis
    ) -> None:
        self.task, self.manifest = task, manifest
        self.rows = manifest.rows
        self.methods = tuple(methods.METHODS)
        self.columns: dict[str, NDArray[Any]] = store.columns(store.checkpoints - 1)
        self.last_timing: dict[str, float] = {}
        self._store, self._models, self._basis = store, models, basis
        self._searcher = ProgressiveSearcher(store, device=str(models[0].device))

    def influence(
        self,
        examples: Sequence[Example],
        *,
        k: int = 10,
        method: str = "tracin",
        checkpoints: Sequence[str] | None = None,
        weights: str | None = None,
        filter: RowFilter | None = None,  # noqa: A002  (the word of the HTTP contract)
        target: str | None = None,
    ) -> list[InfluenceResult]:
        """The k strongest proponents and opponents of each example.

        Args:
            examples: items of the kind that `task.train[i]` returns; one without a label is explained for the model's
                own prediction.
            checkpoints: names of those to sum over; default: all, or the last one for graddot and cosine.
            weights: of the checkpoints: "learning_rate", "learning_rate_steps" or "equal".
            target: "loss" explains the loss even where the task defines a measurement.

        Raises:
            QueryError: something asked for does not exist.
            LossError: a query's loss is NaN or infinite.
        """
        if k < 1:
            raise QueryError(f"k must be at least 1, not {k}")
        started = time.perf_counter()
        chosen = _Choice(self, method, checkpoints, weights)
        allowed = (filter or RowFilter()).mask(self.rows, self.columns)
        queries = self._resolved(examples, target)
        coordinates, losses = self._gradients(queries, chosen.checkpoints)
        vectors = chosen.vectors(coordinates)
        encoded = time.perf_counter()
        found = self._searcher.search(vectors, chosen.checkpoints, k, row_scale=chosen.row_scale(), allowed=allowed)
        searched = time.perf_counter()
        names = [self.manifest.checkpoints[c].name for c in chosen.checkpoints]
        results = [self._result(*one, method, names) for one in zip(queries, losses, found, strict=True)]
        self.last_timing = {
            "gradient": 1e3 * (encoded - started),
            "search": 1e3 * (searched - encoded),
            "rest": 1e3 * (time.perf_counter() - searched),
        }
        return results

    def scores(
        self,
        examples: Sequence[Example],
        *,
        method: str = "tracin",
        checkpoints: Sequence[str] | None = None,
        weights: str | None = None,
        target: str | None = None,
    ) -> NDArray[np.float32]:
        """The score of every training row for each example. float32 [queries, rows]. Raises as `influence`."""
        chosen = _Choice(self, method, checkpoints, weights)
        vectors = chosen.vectors(self._gradients(self._resolved(examples, target), chosen.checkpoints)[0])
        return exhaustive_scores(self._store, vectors, chosen.checkpoints, chosen.row_scale())

    def self_influence(
        self, *, method: str = "tracin", checkpoints: Sequence[str] | None = None, weights: str | None = None
    ) -> NDArray[np.float32]:
        """The score of each training row on itself; high ones are worth a look for wrong labels. float32 [rows]."""
        chosen = _Choice(self, method, checkpoints, weights)
        return methods.self_influence(chosen.method, chosen.norms(), chosen.weights)

    def _resolved(self, examples: Sequence[Example], target: str | None) -> list[Query]:
        if not len(examples):
            raise QueryError("no example to explain")
        parts = (examples[start : start + _QUERY_BATCH] for start in range(0, len(examples), _QUERY_BATCH))
        return [query for part in parts for query in resolve_queries(self._models[-1], part, target)]

    def _gradients(self, queries: Sequence[Query], checkpoints: Sequence[int]) -> tuple[Tensor, list[float]]:
        """Compressed gradients of the queries, float32 [queries, checkpoints, dimensions], and their losses at the last
        checkpoint, from the same pass where it is the loss that is explained there."""
        last = len(self._models) - 1
        losses = [math.nan] * len(queries)
        out = torch.empty(len(queries), len(checkpoints), self._basis.dimensions, device=self._models[0].device)
        for measure in dict.fromkeys(query.measure for query in queries):
            rows = [number for number, query in enumerate(queries) if query.measure == measure]
            for start in range(0, len(rows), _QUERY_BATCH):
                part = rows[start : start + _QUERY_BATCH]
                batch = self._models[last].batch([queries[number].example for number in part])
                for position, checkpoint in enumerate(checkpoints):
                    out[part, position], values = self._models[checkpoint].encode(self._basis, batch, measure)
                if measure != self.task.loss or checkpoints[-1] != last:
                    values = self._models[last].losses(batch)
                for number, value in zip(part, values.tolist(), strict=True):
                    losses[number] = value
        return out, losses

    def _result(
        self, query: Query, loss: float, found: SearchResult, method: str, names: Sequence[str]
    ) -> InfluenceResult:
        return InfluenceResult(
            proponents=self._hits(found.top_rows, found.top_scores, found.top_parts, names),
            opponents=self._hits(found.bottom_rows, found.bottom_scores, found.bottom_parts, names),
            method=method,
            target=query.target,
            label=query.label,
            prediction=query.prediction,
            loss=loss,
            exact=found.exact,
            rows_touched=found.rows_touched,
            rows_searched=found.rows_searched,
        )

    def _hits(
        self, rows: NDArray[np.int64], scores: NDArray[np.float32], parts: NDArray[np.float32], names: Sequence[str]
    ) -> list[Hit]:
        return [
            Hit(
                row=row,
                score=score,
                parts=dict(zip(names, part, strict=True)),
                label=_plain(self.columns["label"][row]),
                prediction=_plain(self.columns["prediction"][row]),
                loss=float(self.columns["loss"][row]),
                correct=_plain(self.columns["correct"][row]),
            )
            for row, score, part in zip(rows.tolist(), scores.tolist(), parts.tolist(), strict=True)
        ]


class _Choice:
    """A method with the checkpoints and weights that a request names, or its defaults."""

    def __init__(self, index: Index, method: str, checkpoints: Sequence[str] | None, weights: str | None) -> None:
        entries = index.manifest.checkpoints
        self.method = methods.method_named(method)
        self.checkpoints = methods.chosen_checkpoints(self.method, entries, checkpoints)
        self.weights = methods.checkpoint_weights(self.method, entries, self.checkpoints, weights)
        self._store = index._store

    def norms(self) -> NDArray[np.float32]:
        """[chosen checkpoints, rows]."""
        return np.stack([self._store.norms(checkpoint) for checkpoint in self.checkpoints])

    def vectors(self, coordinates: Tensor) -> Tensor:
        return methods.query_vectors(self.method, coordinates, self.weights)

    def row_scale(self) -> Tensor | None:
        return methods.row_scale(self.method, self.norms()) if self.method.normalized else None


def _plain(value: Any) -> Any:
    """A column's value as a Python number; None where it is not known."""
    value = value.item() if hasattr(value, "item") else value
    return None if value is None or value != value else value


def open_index(
    path: str | Path, task: Task, *, checkpoints: str | Path | None = None, device: str = "auto", verify: bool = True
) -> Index:
    """Open an index for queries, after checking that it is whole and belongs to the task.

    Args:
        checkpoints: directory of the weights, if they were moved since the build.
        verify: read every file and compare its checksum; False compares sizes only (for indexes that take too long).

    Raises:
        StoreError: no index, an unfinished one (IncompleteIndexError), damaged files (CorruptIndexError), or an index
            of another task, data set or checkpoint (MismatchError).
        CheckpointError: weights are missing or do not fit the model.
    """
    directory = Path(path)
    manifest = read_manifest(directory)
    if not manifest.complete:
        raise IncompleteIndexError(
            f"the build of {directory} was interrupted; run it again with the same arguments to resume"
        )
    store = RowStore(directory, manifest)
    problems = store.check_files(deep=verify)
    if problems:
        raise CorruptIndexError(
            f"{directory} is damaged: {'; '.join(problems)}. Restore the files, or remove and rebuild the index"
        )
    check_dataset(task)
    check_task(task, manifest.task)
    entry = manifest.basis
    basis = load_basis(directory / entry.file.path, entry.kind, entry.dimensions, entry.seed)
    where = torch.device(pick_device(device))
    probe = [task.train[row] for row in range(min(2, len(task.train)))]
    models = [
        GradientModel(task, _checkpoint(directory, found, checkpoints), where, probe) for found in manifest.checkpoints
    ]
    for model in models:
        require_layers(basis, model.plan.layers)
    check_probe_losses(task, models[-1], manifest.task)
    return Index(task, manifest, store, models, basis.to(where))


def _checkpoint(directory: Path, entry: CheckpointEntry, moved_to: str | Path | None) -> Checkpoint:
    """The checkpoint of an entry, if it is still the file that was indexed."""
    path = Path(moved_to) / entry.name if moved_to is not None else directory.resolve() / entry.file
    if not path.exists():
        raise CheckpointError(
            f"the weights of checkpoint {entry.name} are not at {path}: restore the file, or name the directory that "
            "it was moved to (checkpoints=...)"
        )
    checkpoint = Checkpoint(path, entry.step, entry.learning_rate)
    if checkpoint.sha256() != entry.sha256:
        raise MismatchError(
            f"{path} is not the checkpoint {entry.name} that was indexed (its SHA-256 differs): restore that file or "
            "rebuild the index"
        )
    return checkpoint
