"""An index that was opened by whoever made the service."""

from __future__ import annotations

from gradtrace import Index
from gradtrace.store.index_files import FileStamp, written_to
from gradtrace_service.engine.work import IndexUnavailableError, Opening
from gradtrace_service.errors import FieldError


def no_name(name: str | None) -> None:
    """Raises FieldError for a name: the only index has none."""
    if name is not None:
        raise FieldError("index", f"there is no index {name!r}; this service has one, without a name: leave it out")


class OpenIndex:
    """One open index, whose generation does not change. Once a file of it was written to, it answers nothing any more:
    what was computed from the file meanwhile may be kept in the index, also after the file is right again."""

    def __init__(self, index: Index) -> None:
        self._index = index
        self._files = {entry: FileStamp.of(index.directory / entry.path) for entry in index.manifest.files()}
        self._written: list[str] = []

    def get(self, name: str | None) -> Index:
        no_name(name)
        self.check(name, self._index)
        return self._index

    def check(self, name: str | None, index: Index) -> None:
        """Raises IndexUnavailableError if files were written to since the index was opened."""
        self._written = self._written or written_to(index.directory, self._files)
        if self._written:
            raise IndexUnavailableError(
                f"the index was written to while it was open ({', '.join(self._written)}): the program that serves it "
                "must open it anew, and make the service anew, once `gradtrace verify` finds no problem"
            )

    def open_default(self) -> None:
        """It is open."""

    def states(self) -> dict[str, bool | None]:
        return {"index": None if self._written else True}

    def openings(self) -> dict[str, Opening]:
        return {}

    def close(self) -> None:
        """Nothing runs beside it."""
