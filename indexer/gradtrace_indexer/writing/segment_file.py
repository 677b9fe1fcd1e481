"""Writing a shard of sparse rows."""

from __future__ import annotations

from pathlib import Path

from gradtrace.sparse.segments import SegmentRows
from gradtrace.store.manifest import FileEntry, SegmentSizes
from gradtrace_indexer.writing.files import write_through


class SegmentWriter(SegmentRows):
    """Collects the rows of a segment, and writes them at the end. `name` is relative to the index directory."""

    def __init__(self, directory: Path, name: str) -> None:
        super().__init__()
        self._directory, self._name = directory, name

    def commit(self) -> tuple[FileEntry, SegmentSizes]:
        """Write the file durably and whole, or not at all; the same rows give the same bytes.

        Raises:
            StoreError: as `write_through`.
        """
        layout, blocks = self.inverted()

        def write(path: Path) -> None:
            with path.open("wb") as file:
                for offset, block in zip(layout.offsets, blocks, strict=False):
                    file.seek(offset)
                    file.write(block.astype(block.dtype.newbyteorder("<"), copy=False).data)
                file.truncate(layout.bytes)  # the gaps between blocks read as zeros

        entry = write_through(self._directory, self._name, write)
        return entry, SegmentSizes(lists=layout.lists, pairs=layout.pairs)
