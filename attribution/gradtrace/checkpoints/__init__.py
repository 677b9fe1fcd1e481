"""Checkpoints: weights, learning rates and optimizer states as trainings write them, and the recorder that writes them.

Other libraries' directories are read by `readers`. No model is run here."""

from gradtrace.checkpoints.checkpoint import Checkpoint, Optimizer, load_into
from gradtrace.checkpoints.discovery import load_checkpoints

__all__ = ["Checkpoint", "Optimizer", "load_checkpoints", "load_into"]
