"""Data sets of records (dicts by column) in files: JSON Lines, CSV, Parquet, and folders of datasets' save_to_disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.csv
import pyarrow.parquet

from gradtrace.errors import DatasetError
from gradtrace.tasks.language.optional import imported
from gradtrace.tasks.payload import listed

Record = Mapping[str, Any]


class JsonLines:
    """A file with a JSON object a line. Lines are read as they are asked for; empty ones are not counted.

    Not memory-mapped: a program that is served from a mapped file dies when someone rewrites the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        starts, position = [], 0
        with path.open("rb") as file:
            for line in file:
                if not line.isspace():
                    starts.append(position)
                position += len(line)
        self._starts = np.array(starts, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, row: int) -> Record:
        with self._path.open("rb") as file:
            file.seek(self._starts[row])
            line = file.readline()
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DatasetError(f"{self._path}, record {row}: not JSON ({error}); write one object a line") from None
        if not isinstance(record, dict):
            raise DatasetError(f"{self._path}, record {row} is a {type(record).__name__}; write one object a line")
        return record


class ArrowTable:
    """A table in memory."""

    def __init__(self, table: pyarrow.Table) -> None:
        self._table = table

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __getitem__(self, row: int) -> Record:
        record: Record = self._table.slice(row, 1).to_pylist()[0]
        return record


def _csv(path: Path) -> ArrowTable:
    texts = pyarrow.csv.ParseOptions(newlines_in_values=True)
    return ArrowTable(pyarrow.csv.read_csv(path, parse_options=texts))


def _parquet(path: Path) -> ArrowTable:
    return ArrowTable(pyarrow.parquet.read_table(path))


def _saved_folder(path: Path) -> Any:
    datasets = imported("datasets")
    saved = datasets.load_from_disk(str(path))
    if isinstance(saved, datasets.DatasetDict):
        raise DatasetError(
            f"{path} holds the splits {listed(list(saved))}; name one of them, as {path / next(iter(saved))}"
        )
    return saved


_READERS: dict[str, Callable[[Path], Any]] = {
    ".jsonl": JsonLines,
    ".json": JsonLines,
    ".csv": _csv,
    ".parquet": _parquet,
}


def open_records(source: Any) -> Sequence[Record]:
    """A map-style data set of records from a path, or the data set itself if it is one.

    Raises:
        DatasetError: there is no such file, it is of another kind, damaged, or empty.
        MissingLibraryError: for a folder, if datasets is not installed.
    """
    if not isinstance(source, str | Path):
        return source  # type: ignore[no-any-return]
    path = Path(source)
    if not path.exists():
        raise DatasetError(f"there is no data in {path}; give a file, or a folder of datasets' save_to_disk")
    reader = _saved_folder if path.is_dir() else _READERS.get(path.suffix.lower())
    if reader is None:
        raise DatasetError(f"the kind of {path} is not known; files of records end in {', '.join(_READERS)}")
    try:
        records: Sequence[Record] = reader(path)
    except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
        raise DatasetError(f"{path} cannot be read: {error}") from error
    if not len(records):
        raise DatasetError(f"{path} has no row; give a file with one record at least")
    return records
