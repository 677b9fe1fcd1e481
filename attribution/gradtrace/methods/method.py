"""The interface of every method of attribution: queries become vectors whose inner products with rows are scores.

Positive scores are proponents: training on that row lowers what is explained.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Generic, Literal, TypeVar, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import TypedDict

from gradtrace.contents import IndexContents
from gradtrace.errors import QueryError
from gradtrace.methods.position_scores import PositionQuestion, PositionScores
from gradtrace.methods.vectors import SparseQueries
from gradtrace.models.queries import Query
from gradtrace.search.scored_rows import Doubles, Floats, Rows, SearchResult
from gradtrace.search.searcher import DenseSearcher
from gradtrace.store.dense_rows import DenseRows
from gradtrace.store.manifest import CheckpointEntry, CheckpointKind, Manifest
from gradtrace.store.stored_rows import StoredRows
from gradtrace.task import Example

V = TypeVar("V", Tensor, SparseQueries)  # vectors of queries or rows; a tensor is [queries, blocks, dimensions]

Weights = Literal["learning_rate", "learning_rate_steps", "equal"]
Similarity = Literal["cosine", "dot", "l2"]


class MethodOptions(TypedDict, total=False):
    """Options of methods; None, like leaving an option out, is the method's default.

    checkpoints: names of those that are used.
    weights: of the checkpoints, for the methods that sum over them: one of `Weights`.
    damping: of the inverse curvature, relative to the mean eigenvalue.
    segments: number of segments of the training, with one curvature each.
    similarity: how representations are compared: one of `Similarity`.
    """

    checkpoints: Sequence[str] | None
    weights: str | None
    damping: float | None
    segments: int | None
    similarity: str | None


class Scoring(ABC, Generic[V]):
    """A method with its options, bound to an open index.

    score(row) = row_scale[row] * sum over column blocks c of <query vector[c], row[c]>, unless a subclass defines
    `search` and `scores` itself

    Attributes:
        store: the rows that are scored.
        blocks: the column blocks that are summed over; positions in the manifest's checkpoints. A hit's `parts` are
            the terms of this sum.
        full_gradient_weights: float64 [blocks]; scores are sums with these weights of inner products of the gradients
            of query and row, each at its block's checkpoint, so full gradients can rescore them. None: they are not.
        normalized: scores are divided by the norms of query and row, each over all blocks together.
        removal_factors: float64 [blocks]; a score's parts times these sum to how much what is explained is predicted
            to rise, in its own unit, when the row is left out of the training. None: no such prediction is made; set
            where the method has `removal`, whose scores are then linear in the query's vectors.
    """

    store: StoredRows
    blocks: list[int]
    full_gradient_weights: Doubles | None = None
    normalized: bool = False
    removal_factors: Doubles | None = None

    @abstractmethod
    def query_vectors(self, queries: Sequence[Query]) -> tuple[V, list[float]]:
        """The vectors of queries, and their losses at the last checkpoint. The mean of several queries' vectors must
        give the means of their scores.

        Raises:
            LossError: a loss or a gradient is NaN or infinite; `positions` are the numbers of these queries.
        """

    @abstractmethod
    def row_vectors(self, examples: Sequence[Example]) -> V:
        """The rows that training examples would have in the index, times their scale and not rounded.

        Raises:
            QueryError: the method has rows only for examples that were trained on.
            LossError: a loss or a gradient is NaN or infinite.
        """

    @abstractmethod
    def products(self, vectors: V, rows: V) -> Floats:
        """The scores of training examples, by their `row_vectors`. float32 [queries, examples]"""

    @abstractmethod
    def search(self, vectors: V, k: int, allowed: NDArray[np.bool_] | None) -> list[SearchResult]:
        """Both ends for each query vector. allowed: bool [stored rows] that may be found; None: all."""

    @abstractmethod
    def scores(self, vectors: V) -> Floats:
        """Of every row for each query vector. float32 [queries, stored rows]"""

    def row_scale(self) -> Tensor | None:
        """float32 [stored rows], finite; None: 1 for all."""
        return None

    @abstractmethod
    def self_influence(self) -> Floats:
        """The score of each row on itself. float32 [stored rows]

        Raises:
            QueryError: the method has none.
        """

    @abstractmethod
    def row_products(self, positions: Rows) -> Doubles:
        """Inner products of stored rows, over all blocks, without their scale. positions: [m] -> float64 [m, m]"""

    def shares_by_layer(self, vector: V, positions: Rows) -> Mapping[str, Doubles]:
        """By layer the sum over its columns, and over the checkpoints, of query vector times row. Only of methods that
        compare gradients.

        vector: one query's, [blocks, dimensions];  positions: of the rows, ascending [m]
        """
        raise NotImplementedError

    def position_scores(self, question: PositionQuestion) -> PositionScores:
        """Only of methods that split scores by token.

        Raises:
            QueryError: no layer of the model runs over sequences of these lengths, or the query's measurement could not
                be tried, so that no layers are known for it.
            LossError: a loss or a gradient is NaN or infinite.
        """
        raise NotImplementedError


class DenseScoring(Scoring[Tensor]):
    """Of rows that all have the same columns. Vectors are [queries, blocks, dimensions of the store].

    searcher: of the rows
    """

    store: DenseRows
    searcher: DenseSearcher

    def search(self, vectors: Tensor, k: int, allowed: NDArray[np.bool_] | None) -> list[SearchResult]:
        return self.searcher.search(vectors, self.blocks, k, row_scale=self.row_scale(), allowed=allowed)

    def scores(self, vectors: Tensor) -> Floats:
        return self.searcher.scores(vectors, self.blocks, row_scale=self.row_scale())

    def products(self, vectors: Tensor, rows: Tensor) -> Floats:
        products: Floats = (vectors.flatten(1) @ rows.flatten(1).T).cpu().numpy()
        return products

    @property
    def store_blocks(self) -> Sequence[int]:
        """Where `blocks` are in the store."""
        return self.blocks

    def row_products(self, positions: Rows) -> Doubles:
        products = torch.zeros(len(positions), len(positions), dtype=torch.float64)
        for block in self.store_blocks:  # one at a time: a thousand rows of all blocks may take much memory
            rows = self.store.gather([block], positions)[:, 0].double()  # [m, dimensions]
            products += rows @ rows.T
        return products.numpy()


class Method(ABC):
    """A method of attribution.

    name: in requests
    options: the fields of MethodOptions that it takes
    meaning: what a score is, with its unit, as a sentence without a full stop
    sign: what a positive and a negative score mean, as sentences; empty if `meaning` says so
    signed: whether positive scores are proponents and negative ones opponents
    compares: what scores are made of: "gradients", in the coordinates of the index, "representations" or "words"
    uses_curvature: whether scores depend on the Fisher information in the index
    splits_by_token: whether scores can be split into those of the tokens of row and query
    uses_labels: whether scores depend on the query's label
    forecasts: whether scores estimate the effect of training without the row
    removal: what rows' scores predict when these rows are left out of the training, in the unit of what is explained,
        as the end of a sentence about that rise; None: scores are in no such unit, and only order sets of rows
    """

    name: ClassVar[str]
    options: ClassVar[tuple[str, ...]]
    meaning: ClassVar[str]
    sign: ClassVar[str] = (
        "Positive: a proponent, training on the row lowered what is explained. Negative: an opponent, it raised it. "
    )
    signed: ClassVar[bool] = True
    compares: ClassVar[Literal["gradients", "representations", "words"]] = "gradients"
    splits_by_token: ClassVar[bool] = True
    uses_labels: ClassVar[bool] = True
    forecasts: ClassVar[bool] = False
    removal: ClassVar[str | None] = None
    uses_curvature: ClassVar[bool] = False

    @property
    def compares_gradients(self) -> bool:
        return self.compares == "gradients"

    def unfit(self, contents: IndexContents) -> str | None:
        """Why an index that `lacks` nothing does not answer by this method because of its task; None if it does."""
        return None

    def lacks(self, manifest: Manifest) -> str | None:
        """What an index lacks to answer by this method, and the command that adds it; None if it lacks nothing."""
        if self.uses_curvature and len(manifest.curvature) < len(manifest.checkpoints):
            return "it has no curvature; build it with basis='gauss-newton' or 'spectral' (`gradtrace build`)"
        if self.compares == "representations" and manifest.representations is None:
            return (
                "it holds no last hidden representations, since the model's last fully connected layer is not given "
                "one vector for each example, or since it was built by an earlier release; define representation(self, "
                "model, batch) in the task if need be (of a language model that writes: --representations), and build "
                "it again (`gradtrace build`)"
            )
        return None

    def meaning_with(self, options: MethodOptions) -> str:
        """`meaning` with these options."""
        return self.meaning

    @abstractmethod
    def scoring(self, contents: IndexContents, options: MethodOptions) -> Scoring[Any]:
        """Bind the method to an index that lacks nothing, with options that `check_options` accepts.

        Raises:
            QueryError: an option's value does not fit the index.
        """

    def check_options(self, options: MethodOptions) -> None:
        """
        Raises:
            TypeError: no method has such an option.
            QueryError: this method does not take an option, or an option does not take this value.
        """
        names = MethodOptions.__annotations__
        unknown = [name for name in options if name not in names]
        if unknown:
            raise TypeError(f"unknown option {unknown[0]!r}; options are {', '.join(names)}")
        foreign = [name for name, value in options.items() if value is not None and name not in self.options]
        if foreign:
            taken = ", ".join(self.options) or "none"
            raise QueryError(f"method {self.name!r} takes no {foreign[0]}: leave it out ({self.name!r} takes {taken})")
        for name, value, values in (
            ("weights", options.get("weights"), get_args(Weights)),
            ("similarity", options.get("similarity"), get_args(Similarity)),
        ):
            if value is not None and value not in values:
                raise QueryError(f"unknown {name} {value!r}; choose from {', '.join(values)}")
        damping, segments = options.get("damping"), options.get("segments")
        if damping is not None and not 0 < damping < float("inf"):
            raise QueryError(f"damping must be a number above zero, not {damping}")
        if segments is not None and segments < 1:
            raise QueryError(f"segments must be at least 1, not {segments}")


def chosen_checkpoints(
    entries: Sequence[CheckpointEntry], options: MethodOptions, default: list[int], kind: CheckpointKind = "weights"
) -> list[int]:
    """Positions of the checkpoints that the options name, all of one kind, in training order.

    Raises:
        QueryError: an unknown or repeated name, or none at all.
    """
    names = options.get("checkpoints")
    if names is None:
        return default
    known = {entry.name: position for position, entry in enumerate(entries) if entry.kind == kind}
    unknown = [name for name in names if name not in known]
    if unknown or not names or len(set(names)) < len(names):
        problem = f"unknown checkpoint {unknown[0]!r}" if unknown else "checkpoints must be named, each once"
        raise QueryError(f"{problem}; choose from {', '.join(known)}")
    return sorted(known[name] for name in names)
