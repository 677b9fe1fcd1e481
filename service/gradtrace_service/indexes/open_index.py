"""An index that was opened by whoever made the service."""

from __future__ import annotations

from gradtrace import Index
from gradtrace.store.index_files import FileStamp, check_files, written_to
from gradtrace_service.engine.work import IndexUnavailableError
from gradtrace_service.errors import FieldError


def no_name(name: str | None) -> None:
    """Raises FieldError for a name: the only index has none."""
    if name is not None:
        raise FieldError("index", f"there is no index {name!r}; this service has one, without a name: leave it out")


class OpenIndex:
    """One open index, whose generation does not change."""

    def __init__(self, index: Index) -> None:
        self._index = index
        self._files = {entry: FileStamp.of(index.directory / entry.path) for entry in index.manifest.files()}
        self._available = True

    def get(self, name: str | None) -> Index:
        no_name(name)
        self.check(name, self._index)
        return self._index

    def check(self, name: str | None, index: Index) -> None:
        """Raises IndexUnavailableError for files that were written to, unless they are right again."""
        written = bool(written_to(index.directory, self._files))
        problems = check_files(index.directory, index.manifest, True, self._files) if written else []
        self._available = not problems
        if problems:
            raise IndexUnavailableError(f"the index is damaged: {'; '.join(problems)}")

    def open_default(self) -> None:
        """It is open."""

    def states(self) -> dict[str, bool | None]:
        return {"index": True if self._available else None}
