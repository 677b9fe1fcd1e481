"""Gradtrace: which training examples made this model predict that?"""

from gradtrace.checkpoints import Checkpoint, load_checkpoints
from gradtrace.checkpoints.recorder import CheckpointRecorder
from gradtrace.dry_run import TaskReport, check
from gradtrace.errors import (
    CheckpointError,
    CorruptIndexError,
    CurvatureError,
    DatasetError,
    EvaluationError,
    GradtraceError,
    IncompleteIndexError,
    LossError,
    MismatchError,
    MissingLibraryError,
    QueryError,
    RecordingError,
    SlowPathWarning,
    StoreError,
    TaskError,
    UnsupportedLayerError,
)
from gradtrace.exact.influence import ExactInfluence
from gradtrace.gradients.reference import gradients_reference
from gradtrace.index import Index
from gradtrace.opening import open_index
from gradtrace.recording import InfluenceRecorder, Recording, read_recording
from gradtrace.results.comparison import Comparison, Scores, compare_scores
from gradtrace.results.groups import GroupInfluence, GroupInfluences
from gradtrace.results.hits import Distribution, Histogram, Hit, InfluenceResult, InfluenceResults, Recall
from gradtrace.results.probable_classes import ClassProbability
from gradtrace.results.removal import RemovalEffect
from gradtrace.results.token_scores import RowTokens, TokenScores
from gradtrace.store.row_filter import RowFilter
from gradtrace.task import Task

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "CheckpointRecorder",
    "ClassProbability",
    "Comparison",
    "CorruptIndexError",
    "CurvatureError",
    "DatasetError",
    "Distribution",
    "EvaluationError",
    "ExactInfluence",
    "GradtraceError",
    "GroupInfluence",
    "GroupInfluences",
    "Histogram",
    "Hit",
    "IncompleteIndexError",
    "Index",
    "InfluenceRecorder",
    "InfluenceResult",
    "InfluenceResults",
    "LossError",
    "MismatchError",
    "MissingLibraryError",
    "QueryError",
    "Recall",
    "Recording",
    "RecordingError",
    "RemovalEffect",
    "RowFilter",
    "RowTokens",
    "Scores",
    "SlowPathWarning",
    "StoreError",
    "Task",
    "TaskError",
    "TaskReport",
    "TokenScores",
    "UnsupportedLayerError",
    "check",
    "compare_scores",
    "gradients_reference",
    "load_checkpoints",
    "open_index",
    "read_recording",
]
