"""Readers of other frameworks' checkpoints. To add a framework, add a file here and its reader to READERS."""

from gradtrace.checkpoints.readers import accelerate, lightning, pretrained, transformers
from gradtrace.checkpoints.readers.base import Reader, Reading

READERS = tuple(Reader(made_by.find, made_by.read) for made_by in (transformers, accelerate, lightning, pretrained))

__all__ = ["READERS", "Reader", "Reading"]
