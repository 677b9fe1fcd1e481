"""How an open index shows itself."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gradtrace.results.display import describe, frame, table_html
from gradtrace.store.manifest import Manifest

if TYPE_CHECKING:
    import pandas


class IndexDisplay:
    """What `Index` inherits: a readable repr, a table of its rows, and a page for notebooks."""

    directory: Path
    manifest: Manifest
    methods: tuple[str, ...]
    rows: int
    present: NDArray[np.bool_]
    columns: dict[str, NDArray[Any]]

    def __repr__(self) -> str:
        return f"<Index {self.directory}: {describe(self.manifest)}; methods {', '.join(self.methods)}>"

    def to_pandas(self) -> pandas.DataFrame:
        """A line for each training row: its columns at the last checkpoint, and whether it is `present`, not deleted.

        Raises:
            MissingLibraryError: pandas is not installed.
        """
        table = frame([])
        for name, column in {"row": np.arange(self.rows), "present": self.present, **self.columns}.items():
            table[name] = column
        return table

    def _repr_html_(self) -> str:
        checkpoints = [
            [escape(entry.name), str(entry.step), f"{entry.learning_rate:g}"] for entry in self.manifest.checkpoints
        ]
        table = table_html("Checkpoints", ("name", "step", "learning rate"), checkpoints)
        methods = escape(", ".join(self.methods))
        return (
            f"<div><p>{escape(f'{self.directory}: {describe(self.manifest)}')}<br>Methods: {methods}</p>{table}</div>"
        )
