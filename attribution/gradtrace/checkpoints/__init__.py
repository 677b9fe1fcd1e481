"""Checkpoints: weights, learning rates and optimizer states as trainings write them, and the recorder that writes them.

Other libraries' directories are read by `readers`. No model is run here."""

from gradtrace.checkpoints.checkpoint import Checkpoint, load_into
from gradtrace.checkpoints.discovery import load_checkpoints
from gradtrace.store.manifest import Optimizer

__all__ = ["Checkpoint", "Optimizer", "load_checkpoints", "load_into"]
