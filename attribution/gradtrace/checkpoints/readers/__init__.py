"""Readers of other frameworks' checkpoints. To add a framework, add a file here and its reader to READERS."""

from gradtrace.checkpoints.readers import accelerate, lightning, transformers
from gradtrace.checkpoints.readers.base import Reader, Reading

READERS = tuple(Reader(framework.find, framework.read) for framework in (transformers, accelerate, lightning))

__all__ = ["READERS", "Reader", "Reading"]
