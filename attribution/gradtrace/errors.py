"""The exceptions that Gradtrace raises on purpose.

GradtraceError
├── TaskError                 the user's task cannot be attributed as it stands
│   ├── LossError             the loss is not one finite number per example
│   ├── DatasetError          the training data is not a fixed, map-style data set
│   └── UnsupportedLayerError a layer's per-example gradients cannot be computed
├── CheckpointError           a checkpoint is missing, unreadable, or does not fit the model
├── RecordingError            a training cannot be recorded, or a recording cannot be used with this training
├── CurvatureError            a curvature matrix cannot be inverted
├── StoreError                an index cannot be read or written
│   ├── LockedIndexError      another process is writing it
│   ├── IncompleteIndexError  a build was interrupted: rerun it to resume
│   ├── CorruptIndexError     bytes on disk are not those that were written
│   └── MismatchError         the index was built from another task, checkpoint or basis
├── ShardLostError            a process with some of an open index's rows ended, and again when it was asked anew
├── QueryError                a query names something that the index does not have
├── EvaluationError           scores and ground truth cannot be compared
└── MissingLibraryError       an optional library is not installed
"""

from __future__ import annotations

from collections.abc import Sequence


class GradtraceError(Exception):
    """Base of the exceptions that Gradtrace raises on purpose. The text names the cause and the remedy."""


class TaskError(GradtraceError):
    """The user's task cannot be attributed as it stands."""


class LossError(TaskError):
    """The loss is not one finite number per example; `positions` are those of the bad examples in their batch."""

    def __init__(self, text: str, positions: Sequence[int] = ()) -> None:
        super().__init__(text)
        self.positions = positions

    def naming(self, rows: Sequence[int]) -> LossError:
        """The error with a text that names the bad training rows. rows: the numbers of the batch's training rows"""
        bad = [str(rows[position]) for position in self.positions]
        return LossError(f"training row(s) {', '.join(bad[:5])}{' ...' * (len(bad) > 5)}: {self}") if bad else self

    def naming_asked(self, numbers: Sequence[int], what: str) -> LossError:
        """The error with `positions`, and a text that names them, in a longer list of which the batch is a part.

        numbers: positions of the batch's examples in that list
        what: what the list holds, in the singular: "query" or "training example"
        """
        bad = [numbers[position] for position in self.positions]
        listed = f"{', '.join(map(str, bad[:5]))}{' ...' * (len(bad) > 5)}"
        return LossError(f"{what} {listed}, counted from 0: {self}", bad) if bad else self


class DatasetError(TaskError):
    """The training data is not a fixed, map-style data set."""


class UnsupportedLayerError(TaskError):
    """A layer's per-example gradients cannot be computed."""


class SharedPositionsError(UnsupportedLayerError):
    """Several examples of a batch share positions of a layer, so that the gradient there is not any one example's."""


class CheckpointError(GradtraceError):
    """A checkpoint is missing, unreadable, or does not fit the model."""


class RecordingError(GradtraceError):
    """A training cannot be recorded, or a recording is unfinished, damaged or of another training."""


class CurvatureError(GradtraceError):
    """A curvature matrix cannot be inverted: it is not positive definite, or the iterations did not suffice."""


class StoreError(GradtraceError):
    """An index cannot be read or written."""


class LockedIndexError(StoreError):
    """Another process is writing the index. Try again when it has ended."""


class IncompleteIndexError(StoreError):
    """A build was interrupted. Rerun it to resume."""


class CorruptIndexError(StoreError):
    """Bytes on disk are not those that were written."""


class MismatchError(StoreError):
    """The index was built from another task, data set, checkpoint or basis."""


class ShardLostError(GradtraceError):
    """A process with some of an open index's rows ended, and again when it was asked anew, or could not be restarted.
    Nothing is answered without these rows; the same question may be answered later."""


class QueryError(GradtraceError):
    """A query names something that the index does not have."""


class EvaluationError(GradtraceError):
    """Scores and ground truth cannot be compared: they are of different rows, queries or subsets, or not finite."""


class MissingLibraryError(GradtraceError):
    """An optional library is not installed; Gradtrace's `extra` installs it."""

    def __init__(self, library: str, extra: str) -> None:
        super().__init__(f"{library} is not installed; pip install 'gradtrace[{extra}]'")


class SlowPathWarning(UserWarning):
    """Gradients of some of the model's parameters are computed one example at a time."""
