"""Imports of the libraries that only these tasks need."""

from __future__ import annotations

import importlib
from typing import Any

from gradtrace.errors import MissingLibraryError


def imported(library: str) -> Any:
    """The module of transformers, peft or datasets. Raises MissingLibraryError if it is not installed."""
    try:
        return importlib.import_module(library)
    except ImportError as error:
        raise MissingLibraryError(library, "hf") from error
