"""The column block and the basis that an index takes from a recording of the training."""

from __future__ import annotations

from gradtrace.basis import Basis, check_layers
from gradtrace.errors import RecordingError
from gradtrace.models.gradient_model import GradientModel
from gradtrace.recording import Recording
from gradtrace.recording.files import ROWS_NAME
from gradtrace.recording.influence_recorder import weights_sha256
from gradtrace.store.manifest import CheckpointEntry


def recorded_entry(recording: Recording, trained: CheckpointEntry) -> CheckpointEntry:
    """The column block of a recording, whose training ended with these weights."""
    rows = next(file for file in recording.entry.files if file.path == ROWS_NAME)
    return trained.model_copy(update={"name": "recording", "kind": "recorded", "recording": rows.xxh3})


def recorded_basis(recording: Recording, reference: GradientModel, rows: int) -> Basis:
    """Raises RecordingError if the recording is not of the training that ended with the reference's weights."""
    if recording.entry.rows != rows or recording.entry.weights_sha256 != weights_sha256(reference.model):
        raise RecordingError(
            f"{recording.directory} records a training on {recording.entry.rows} rows that ended, after "
            f"{recording.entry.steps} steps, with other weights than those of the last checkpoint, or on other than "
            f"{rows} rows: save a checkpoint after the last recorded step, and give checkpoints up to it"
        )
    check_layers(recording.basis, reference.plan.layers)
    return recording.basis
