"""The files of a recording, and reading them. `recording.json` is written last: without it there is no recording.

recording.json      format, seed, steps, sizes of the arrays in the other files, and the files' checksums
rows.f32            HyDRA's rows, float32 [rows, dimensions], little endian, without header
basis.safetensors   the basis of the rows, as in an index
probes.safetensors  scores: float64 [probes, rows]; losses: float64 [2, probes], before the first and after the last
                    step
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.numpy import load_file
from safetensors.torch import save_file
from torch import Tensor

from gradtrace.basis import Basis, load_basis
from gradtrace.durable import write_whole
from gradtrace.errors import RecordingError
from gradtrace.store.index_files import hash_file
from gradtrace.store.manifest import FileEntry

RECORDING_NAME, ROWS_NAME = "recording.json", "rows.f32"
BASIS_NAME, PROBES_NAME = "basis.safetensors", "probes.safetensors"
_FORMAT = 1


class RecordingEntry(BaseModel):
    """recording.json."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: int = _FORMAT
    rows: int  # number of training rows
    dimensions: int  # of HyDRA's rows; 0: none were recorded
    requested: int  # the dimensions that were asked for; two-sided projections may round them down
    seed: int
    steps: int
    probes: int  # number of probes
    weights_sha256: str  # of the parameters after the last step
    files: list[FileEntry]


@dataclass(frozen=True)
class Recording:
    """A finished recording.

    entry: the content of recording.json
    """

    directory: Path
    entry: RecordingEntry

    @cached_property
    def hydra_rows(self) -> NDArray[np.float32]:
        """-d theta_T / d w_z of each row z, with the final weights theta_T and the row's weight w_z in the loss, in
        `basis`. Memory-mapped, float32 [rows, dimensions].

        Raises:
            RecordingError: none were recorded.
        """
        self._require_rows()
        return np.memmap(self.directory / ROWS_NAME, "<f4", "r", shape=(self.entry.rows, self.entry.dimensions))

    @cached_property
    def basis(self) -> Basis:
        """The basis of `hydra_rows`, a two-sided random projection. Raises as `hydra_rows`."""
        self._require_rows()
        return load_basis(self.directory / BASIS_NAME, "two-sided", self.entry.dimensions, self.entry.seed)

    def _require_rows(self) -> None:
        if not self.entry.dimensions:
            raise RecordingError(f"{self.directory} holds scores on probes alone; record with dimensions=...")

    @cached_property
    def probe_scores(self) -> NDArray[np.float64]:
        """TracIn by step: how much each row lowered each probe's loss in the whole training. float64 [probes, rows]."""
        return self._probes["scores"]

    @cached_property
    def probe_losses(self) -> NDArray[np.float64]:
        """The probes' losses before the first and after the last step. float64 [2, probes]."""
        return self._probes["losses"]

    @cached_property
    def _probes(self) -> dict[str, NDArray[np.float64]]:
        return dict(load_file(self.directory / PROBES_NAME))


def write_recording(
    directory: Path,
    entry: RecordingEntry,
    probes: dict[str, Tensor],
    basis: Basis | None,
    write_rows: Callable[[Path], object] | None,
) -> None:
    """Write the files, then recording.json with their checksums. write_rows: to a path, if there are rows in `basis`"""
    writers: dict[str, Callable[[Path], object]] = {PROBES_NAME: partial(save_file, probes)}
    if basis is not None and write_rows is not None:
        tensors = basis.to(torch.device("cpu")).tensors()
        writers |= {ROWS_NAME: write_rows, BASIS_NAME: partial(save_file, tensors)}
    for name, write in writers.items():
        write_whole(directory / name, write)
    files = [FileEntry(path=n, bytes=(directory / n).stat().st_size, xxh3=hash_file(directory / n)) for n in writers]
    content = entry.model_copy(update={"files": files}).model_dump_json(indent=1)
    write_whole(directory / RECORDING_NAME, lambda path: path.write_text(content, "utf-8"))


def read_recording(directory: str | Path) -> Recording:
    """Open a recording and verify the checksums of its files.

    Raises:
        RecordingError: the recording is missing or unfinished, or a file is damaged.
    """
    directory = Path(directory)
    try:
        entry = RecordingEntry.model_validate_json((directory / RECORDING_NAME).read_bytes())
        damaged = [file.path for file in entry.files if hash_file(directory / file.path) != file.xxh3]
    except FileNotFoundError as error:
        raise RecordingError(
            f"{error.filename} is missing: {directory} is not a finished recording; call InfluenceRecorder.finish() at "
            "the end of the training"
        ) from None
    except (OSError, ValidationError) as error:
        raise RecordingError(f"{directory} cannot be read as a recording ({error}); restore it") from None
    if damaged or entry.format != _FORMAT:
        problem = f"{', '.join(damaged)} of {directory} differs from its checksum" if damaged else "of another format"
        raise RecordingError(f"{problem}: restore the recording, or train and record again")
    return Recording(directory, entry)
