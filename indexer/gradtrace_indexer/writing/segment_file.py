"""Writing a segment of sparse rows."""

from __future__ import annotations

from pathlib import Path

from gradtrace.sparse.segments import SegmentLayout, SegmentRows
from gradtrace.store.manifest import FileEntry
from gradtrace_indexer.writing.files import write_through


def write_segment(directory: Path, name: str, rows: SegmentRows) -> tuple[FileEntry, SegmentLayout]:
    """Write `directory/name` durably and whole, or not at all; the same rows give the same bytes.

    Raises:
        StoreError: as `write_through`.
    """
    layout, blocks = rows.inverted()

    def write(path: Path) -> None:
        with path.open("wb") as file:
            for offset, block in zip(layout.offsets, blocks, strict=False):
                file.seek(offset)
                file.write(block.astype(block.dtype.newbyteorder("<"), copy=False).data)
            file.truncate(layout.bytes)  # the gaps between blocks read as zeros

    return write_through(directory, name, write), layout
