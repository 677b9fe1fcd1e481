"""What an open index consists of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from gradtrace.basis import Basis
from gradtrace.data.dataset import fetch
from gradtrace.fitted.curvature import Columns, Curvature
from gradtrace.fitted.representer_head import Refit
from gradtrace.fitted.trak_kernels import Kernel
from gradtrace.fitted.word_scores import WordScores, text_of, word_scores
from gradtrace.models.class_probabilities import number_of_classes
from gradtrace.models.gradient_model import GradientModel
from gradtrace.search.searcher import DenseSearcher
from gradtrace.sharded.row_shards import RowShards
from gradtrace.sparse.coordinates import WeightCoordinates
from gradtrace.sparse.inverted_rows import InvertedRows
from gradtrace.sparse.whitening import WeightCurvature, whitening_factors
from gradtrace.store.dense_rows import DenseRows
from gradtrace.store.manifest import Manifest
from gradtrace.task import Example, Task

_TEXT_BATCH = 256  # rows that are fetched at a time for their texts


@dataclass
class IndexContents:
    """models: of every checkpoint, in the manifest's order;  bases: of every training run, on the models' device; none
        where rows are sparse
    coordinates: of sparse rows, those of every training run
    searcher: of rows that are not sparse
    curvature: of every checkpoint, or empty, see `load_curvature`
    kernels: TRAK's, by checkpoint, on that device
    representations: see `representation_store`;  refit: of the last layer, if there is one for these rows
    verified: whether the checksums of the rows were compared at the opening, too
    shards: that have the rows of `store` and `representations`; None: they are read here
    adam_factors: see `fitted.adam.adam_factors`, by checkpoint, of those that were queried so far
    """

    directory: Path
    manifest: Manifest
    task: Task
    models: list[GradientModel]
    bases: list[Basis]
    coordinates: list[WeightCoordinates]
    curvature: Sequence[Curvature | WeightCurvature]
    store: DenseRows | InvertedRows
    searcher: DenseSearcher | None
    kernels: Mapping[int, Kernel]
    representations: DenseRows | None
    refit: Refit | None
    verified: bool
    shards: RowShards | None = None
    adam_factors: dict[int, Mapping[str, Tensor]] = field(default_factory=dict)

    @property
    def is_sparse(self) -> bool:
        """Whether rows are."""
        return self.manifest.basis.is_sparse

    @property
    def columns_of_curvature(self) -> int:
        """Number of the coordinates in which the curvature is known."""
        return self.coordinates[0].count if self.is_sparse else self.bases[0].dimensions

    @property
    def sums_checkpoints(self) -> bool:
        """Whether influence functions and SOURCE take the query's gradient at each checkpoint, as the rows', since that
        predicted retraining better in measurements (docs/methods.md); else that of the trained model."""
        return self.is_sparse or self.bases[0].rotation is not None

    @property
    def projects_all_layers(self) -> bool:
        """Whether every layer is projected to all columns; else each coordinate belongs to one layer."""
        return not self.is_sparse and self.bases[0].projects_all_layers

    def whitening(self, checkpoint: int, columns: Columns) -> Tensor:
        """What some coordinates of sparse rows were multiplied by. float32 [n], on the CPU"""
        damping, curvature = self.manifest.basis.damping, self.curvature[checkpoint].at(columns)
        assert damping is not None  # rows are sparse
        return whitening_factors(curvature.eigenvalues, curvature.means, damping)

    def basis_of(self, checkpoint: int) -> Basis:
        """The basis of the rows at a checkpoint: its training run's."""
        return self.bases[self.manifest.checkpoints[checkpoint].run]

    @cached_property
    def columns(self) -> dict[str, NDArray[Any]]:
        """label, prediction, loss, correct and norm at the last checkpoint, each [stored rows]."""
        return self.store.columns(self.manifest.last_checkpoint)

    @cached_property
    def classes(self) -> int | None:
        """The number of classes that labels are of; None: labels are values, or there are none."""
        return number_of_classes(self.last_model, self.first_row, self.columns["label"].astype(np.float64))

    @cached_property
    def word_scores(self) -> WordScores:
        """Of the rows that are there, by BM25; made when it is first asked for, which reads all their texts.

        Raises:
            MissingLibraryError: bm25s is not installed.
        """
        ids = self.store.row_ids.live_ids().tolist()
        batches = (ids[start : start + _TEXT_BATCH] for start in range(0, len(ids), _TEXT_BATCH))
        texts = [text_of(self.task, row) or "" for batch in batches for row in fetch(self.task.train, batch)]
        return word_scores(texts)

    @property
    def first_row(self) -> Example:
        """The first training row that is there."""
        (example,) = fetch(self.task.train, self.store.row_ids.live_ids()[:1].tolist())
        return example

    @cached_property
    def last_model(self) -> GradientModel:
        """The model after the last checkpoint; its losses and predictions are the ones reported."""
        return self.models[self.manifest.last_checkpoint]
