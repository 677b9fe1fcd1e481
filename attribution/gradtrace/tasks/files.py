"""Paths of the example data sets."""

from __future__ import annotations

import os
from pathlib import Path

from gradtrace.errors import DatasetError

VARIABLE = "GRADTRACE_DATA"


def data_file(name: str) -> Path:
    """The path of a file in the directory that the environment variable GRADTRACE_DATA names.

    Raises:
        DatasetError: the variable is not set, or the file is missing.
    """
    directory = os.environ.get(VARIABLE)
    if not directory:
        raise DatasetError(f"{name} is needed; set {VARIABLE} to the directory that holds it")
    path = Path(directory) / name
    if not path.is_file():
        raise DatasetError(f"{name} is not in {directory}; set {VARIABLE} to the directory that holds it")
    return path
