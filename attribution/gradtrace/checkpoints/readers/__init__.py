"""Checkpoints as other frameworks leave them. A new framework is one file here and its reader in READERS."""

from gradtrace.checkpoints.readers.accelerate import AccelerateReader
from gradtrace.checkpoints.readers.base import Reader, Reading
from gradtrace.checkpoints.readers.lightning import LightningReader
from gradtrace.checkpoints.readers.transformers import TransformersReader

READERS: tuple[Reader, ...] = (TransformersReader(), AccelerateReader(), LightningReader())

__all__ = ["READERS", "Reader", "Reading"]
