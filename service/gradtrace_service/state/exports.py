"""Marks as files: CSV, Parquet, or the numbers of their rows. Made piece by piece, from pages of marks."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any, Protocol

import pyarrow
import pyarrow.parquet

from gradtrace_client.state_schemas import ExportFormat, Mark

_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")  # with which a spreadsheet's formulas begin, also after white space
_SCHEMA = pyarrow.schema(
    {
        "row": pyarrow.int64(),
        "mark": pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
        "label": pyarrow.float64(),
        "label_name": pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
        "note": pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),  # thousands of rows may share one
        "who": pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
        "when": pyarrow.timestamp("ms", tz="UTC"),
        "version": pyarrow.int64(),
    }
)


class Export(Protocol):
    """media_type: of the file, whose name ends with `suffix`"""

    media_type: str
    suffix: str

    def piece(self, marks: Sequence[Mark]) -> bytes:
        """The next piece of the file."""

    def end(self) -> bytes:
        """Its last piece."""


def export(kind: ExportFormat) -> Export:
    kinds: dict[ExportFormat, type[Export]] = {"csv": _Csv, "parquet": _Parquet, "rows": _Rows}
    return kinds[kind]()


class _Csv:
    media_type, suffix = "text/csv; charset=utf-8; header=present", "csv"

    def __init__(self) -> None:
        self._text = io.StringIO(newline="")
        self._writer = csv.writer(self._text)
        self._writer.writerow(Mark.model_fields)

    def piece(self, marks: Sequence[Mark]) -> bytes:
        for mark in marks:
            cells = mark.model_copy(update={"when": mark.when.isoformat(timespec="milliseconds")}).__dict__
            self._writer.writerow(map(_harmless, cells.values()))
        return self._taken()

    def end(self) -> bytes:
        return self._taken()

    def _taken(self) -> bytes:
        text = self._text.getvalue()
        self._text.seek(0)
        self._text.truncate()
        return text.encode()


def _harmless(cell: Any) -> Any:
    """The cell; of a text that a spreadsheet would compute, with an apostrophe before it."""
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(_FORMULA) else cell


class _Rows:
    media_type, suffix = "text/plain; charset=utf-8", "txt"

    def piece(self, marks: Sequence[Mark]) -> bytes:
        return "".join(f"{mark.row}\n" for mark in marks).encode()

    def end(self) -> bytes:
        return b""


class _Parquet:
    media_type, suffix = "application/vnd.apache.parquet", "parquet"

    def __init__(self) -> None:
        self._sink = _Sink()
        self._writer = pyarrow.parquet.ParquetWriter(self._sink, _SCHEMA)

    def piece(self, marks: Sequence[Mark]) -> bytes:
        if marks:
            columns = [[getattr(mark, name) for mark in marks] for name in _SCHEMA.names]
            arrays = [pyarrow.array(values, kind) for values, kind in zip(columns, _SCHEMA.types, strict=True)]
            self._writer.write_table(pyarrow.Table.from_arrays(arrays, schema=_SCHEMA))
        return self._sink.taken()

    def end(self) -> bytes:
        self._writer.close()
        return self._sink.taken()


class _Sink(io.RawIOBase):
    """Holds what was written until it is taken; its position goes on all the while."""

    def __init__(self) -> None:
        self._held, self._position = bytearray(), 0

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        self._held += data
        self._position += size
        return size

    def taken(self) -> bytes:
        held, self._held = bytes(self._held), bytearray()
        return held
