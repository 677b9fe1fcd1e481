"""Readers of other frameworks' checkpoints. To add a framework, add a file here and its reader to READERS."""

from gradtrace.checkpoints.readers.accelerate import AccelerateReader
from gradtrace.checkpoints.readers.base import Reader, Reading
from gradtrace.checkpoints.readers.lightning import LightningReader
from gradtrace.checkpoints.readers.transformers import TransformersReader

READERS: tuple[Reader, ...] = (TransformersReader(), AccelerateReader(), LightningReader())

__all__ = ["READERS", "Reader", "Reading"]
