"""The curvature of the loss at each checkpoint, in the coordinates of an index, as it is stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from gradtrace.basis import Basis
from gradtrace.store.manifest import Manifest
from gradtrace.store.regular_files import regular_path
from gradtrace.store.tensors import load_tensors

Columns = slice | Tensor  # int64 [n], the numbers of columns
ALL_COLUMNS = slice(None)


@dataclass(frozen=True, eq=False, slots=True)
class Curvature:
    """The diagonal of the curvature at one checkpoint. All float32 [dimensions].

    eigenvalues: lambda
    means: the mean eigenvalue that damping is relative to: of the column's layer, where columns belong to layers, or of
        all columns
    preconditioner: Adam's, see `fitted.adam`; None where second moments were not kept
    """

    eigenvalues: Tensor
    means: Tensor
    preconditioner: Tensor | None

    def at(self, columns: Columns) -> Curvature:
        """That in some of the columns."""
        preconditioner = None if self.preconditioner is None else self.preconditioner[columns]
        return Curvature(self.eigenvalues[columns], self.means[columns], preconditioner)


def load_curvature(directory: Path, manifest: Manifest, bases: Sequence[Basis]) -> list[Curvature]:
    """That of each checkpoint; an empty list for bases without curvature.

    bases: of every training run

    Raises:
        CorruptIndexError: a file is missing or damaged.
    """
    columns: tuple[int | None, ...] = (manifest.basis.dimensions,)
    loaded = []
    for file, entry in zip(manifest.curvature, manifest.checkpoints, strict=False):
        basis, path = bases[entry.run], regular_path(directory, file.path)
        kept = {"preconditioner": columns} if entry.second_moments else {}
        means: dict[str, tuple[int | None, ...]] = {"layer_means": (len(basis.layers),)}
        if basis.rotation is not None:
            means = {"mean": ()}
        tensors = load_tensors(path, "rebuild the index", eigenvalues=columns, **means, **kept)
        of_columns = (
            tensors["layer_means"][basis.layer_of_coordinates()]
            if basis.rotation is None
            else tensors["mean"].expand(basis.dimensions)
        )
        loaded.append(Curvature(tensors["eigenvalues"], of_columns, tensors.get("preconditioner")))
    return loaded
