"""What is kept of an open index for those who look through its data, and completed in the background."""

from __future__ import annotations

from functools import cached_property
from weakref import WeakKeyDictionary

from gradtrace import Index
from gradtrace_client.schemas import Split
from gradtrace_service.answers.checkpoint_losses import CheckpointLosses
from gradtrace_service.answers.row_texts import RowTexts
from gradtrace_service.answers.slices import Sliced
from gradtrace_service.answers.split_rows import QueryRows, SplitRows, training_rows
from gradtrace_service.engine.work import each_alone

FIRST_SECONDS = 0.1  # that the request which needs it computes what is not there yet
_FIRST_ROWS = 60  # of the query data set, on the page
_SLICE_SECONDS = 0.05  # that another request may have to wait for the background


class Browsed:
    """Of one index, which it does not refer to: it ends with its generation."""

    def __init__(self, index: Index) -> None:
        self._task, self._present, self._contents = index.task, index.present, index.contents
        self._columns = index.columns
        self._texts: dict[Split, RowTexts] = {}
        self._begun: list[Sliced] = []

    def split(self, split: Split) -> SplitRows:
        return self._training if split == "train" else self.queries.known()

    @cached_property
    def _training(self) -> SplitRows:
        return training_rows(self._present, self._columns, self._contents)

    @cached_property
    def queries(self) -> QueryRows:
        return QueryRows(self._contents.last_model, self._task.query)

    @cached_property
    def checkpoint_losses(self) -> CheckpointLosses:
        return CheckpointLosses(self._contents)

    def texts(self, split: Split) -> RowTexts:
        if split not in self._texts:
            self._texts[split] = RowTexts(self._task, getattr(self._task, split), self.split(split).present)
        return self._texts[split]

    def begin(self, needed: Sliced, rows: int | None = None) -> None:
        """Compute what is needed for FIRST_SECONDS; the rest is left to the background.

        rows: how many are needed at once; None: all
        """
        needed.advance(FIRST_SECONDS, rows)
        if needed.pending and needed not in self._begun:
            self._begun.append(needed)

    def go_on(self) -> bool:
        """Compute a slice of what was begun. Returns whether all of it is done."""
        self._begun = [begun for begun in self._begun if begun.pending]
        if self._begun:
            self._begun[0].advance(_SLICE_SECONDS)
        return not any(begun.pending for begun in self._begun)


_by_index: WeakKeyDictionary[Index, Browsed] = WeakKeyDictionary()


def browsed(index: Index) -> Browsed:
    if index not in _by_index:
        _by_index[index] = Browsed(index)
    return _by_index[index]


@each_alone
def look_ahead(index: Index, request: None, waited_ms: float) -> None:
    """Read the query data set, and compute what the page shows of it first: its first visitor would wait for it."""
    kept = browsed(index)
    kept.begin(kept.queries, _FIRST_ROWS)


@each_alone
def go_on(index: Index, request: None, waited_ms: float) -> bool:
    """Compute a slice of what others began. Returns whether nothing is left on this worker."""
    return browsed(index).go_on()
