"""Checkpoints as other frameworks leave them. A new framework is one file here and its reader in READERS."""

from gradtrace.readers.accelerate import AccelerateReader
from gradtrace.readers.base import Reader, Reading
from gradtrace.readers.lightning import LightningReader
from gradtrace.readers.transformers import TransformersReader

READERS: tuple[Reader, ...] = (TransformersReader(), AccelerateReader(), LightningReader())

__all__ = ["READERS", "Reader", "Reading"]
