"""What an index's current generation says of its training rows, without a worker: for what is kept about them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from gradtrace import Index
from gradtrace.errors import StoreError
from gradtrace.store.manifest import MANIFEST_NAME
from gradtrace.store.manifest_file import read_manifest
from gradtrace.store.row_ids import read_row_ids
from gradtrace_service.engine.work import IndexUnavailableError
from gradtrace_service.indexes.hosted import Hosted, file_stamp, known_name
from gradtrace_service.indexes.open_index import no_name
from gradtrace_service.state.data_sets import TrainingRows

# By an index's name, None meaning the first; for any thread. Raises FieldError where no index has the name, and
# IndexUnavailableError where its manifest cannot be read.
RowsOf = Callable[[str | None], TrainingRows]


def rows_of_open_index(index: Index) -> RowsOf:
    def rows_of(name: str | None) -> TrainingRows:
        no_name(name)
        return TrainingRows.of("", index.manifest, index.present)

    return rows_of


class RowsOnDisk:
    """Of the generations in the indexes' directories, read again whenever another one was published."""

    def __init__(self, hosted: Sequence[Hosted]) -> None:
        self._hosted = {index.name: index for index in hosted}
        self._known: dict[str, tuple[object, TrainingRows]] = {}
        self._lock = threading.Lock()

    def __call__(self, name: str | None) -> TrainingRows:
        name = known_name(self._hosted, name)
        path = self._hosted[name].path
        with self._lock:
            stamp, known = file_stamp(path / MANIFEST_NAME), self._known.get(name)
            if known is not None and stamp is not None and known[0] == stamp:
                return known[1]
            try:
                manifest = read_manifest(path)
                rows = TrainingRows.of(name, manifest, read_row_ids(path, manifest).present)
            except StoreError as error:
                raise IndexUnavailableError(str(error)) from error
            self._known[name] = stamp, rows
            return rows
