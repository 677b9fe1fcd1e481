"""Everything that an index needs, read and compared with what its manifests say."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch

from gradtrace.basis import load_bases
from gradtrace.checkpoints.indexed import directories_of_runs, indexed_checkpoint
from gradtrace.errors import CheckpointError, GradtraceError, IncompleteIndexError, StoreError
from gradtrace.fitted.curvature import Curvature, load_curvature
from gradtrace.fitted.representer_head import load_refit
from gradtrace.fitted.trak_kernels import load_kernels
from gradtrace.sparse.coordinates import load_coordinates
from gradtrace.sparse.store import index_rows
from gradtrace.sparse.whitening import WeightCurvature, load_weight_curvature
from gradtrace.store.index_files import file_problems
from gradtrace.store.manifest import MANIFEST_NAME, PENDING_NAME, FileEntry, Manifest
from gradtrace.store.manifest_file import read_manifest
from gradtrace.store.rows import representation_store
from gradtrace_indexer.generations import earlier_generations, read_pending
from gradtrace_indexer.progress import progress_bar

_CURRENT, _UNFINISHED = "", "unfinished: "


def verify(
    path: str | Path,
    *,
    all_generations: bool = False,
    checkpoints: str | Path | Sequence[str | Path] | None = None,
    progress: bool = True,
) -> list[str]:
    """All problems of an index, one sentence each; empty if it is undamaged.

    Every byte of the current generation and of an unfinished one is read, the weights of their checkpoints, and the
    manifests of the earlier generations.

    Args:
        all_generations: read the files of the earlier generations, too.
        checkpoints: directory of the weights, if they were moved since the build; of several training runs, one each.

    Raises:
        StoreError: there is no index.
    """
    directory = Path(path)
    if not any(os.path.lexists(directory / name) for name in (MANIFEST_NAME, PENDING_NAME)):
        read_manifest(directory)  # says that there is none
    generations, problems = _manifests(directory)
    newest = {title: generations[title] for title in (_CURRENT, _UNFINISHED) if title in generations}
    read = generations if all_generations else newest
    by_file = _file_problems(directory, read.values(), progress)
    for title, manifest in read.items():
        of_files = [by_file[entry] for entry in manifest.files() if entry in by_file]
        problems += [title + problem for problem in of_files or _content_problems(directory, manifest)]
    for manifest in newest.values():
        problems += _weight_problems(directory, manifest, checkpoints)
    return list(dict.fromkeys(problems))


def _manifests(directory: Path) -> tuple[dict[str, Manifest], list[str]]:
    """The generations whose manifests can be read, by how problems begin that are theirs; and what is wrong with the
    other manifests."""
    generations: dict[str, Manifest] = {}
    problems: list[str] = []
    try:
        generations[_CURRENT] = read_manifest(directory)
    except IncompleteIndexError:
        problems.append("the build was interrupted: run it again to resume")
    except StoreError as error:
        problems.append(str(error))
    try:
        if (pending := read_pending(directory)) is not None:
            generations[_UNFINISHED] = pending
    except StoreError as error:
        problems.append(str(error))
    for number, kept in (earlier_generations(directory) if _CURRENT in generations else {}).items():
        if isinstance(kept, Manifest):
            generations[f"generation {number}: "] = kept
        else:
            problems.append(f"generation {number}: {kept}")
    return generations, problems


def _file_problems(directory: Path, generations: Iterable[Manifest], progress: bool) -> dict[FileEntry, str]:
    """The problem of each file that has one. Every file is read once, however many generations name it."""
    files = list(dict.fromkeys(entry for manifest in generations for entry in manifest.files()))
    checked = file_problems(directory, [(entry, True) for entry in files])
    bar = progress_bar("verify", len(files), " files", progress and bool(files), checked)
    return {entry: problem for entry, problem in zip(files, bar, strict=True) if problem is not None}


def _content_problems(directory: Path, manifest: Manifest) -> Iterator[str]:
    """What opening a generation would refuse although its files are those that its manifest names."""
    readers: list[Callable[[], object]] = [
        lambda: index_rows(directory, manifest).row_ids,
        lambda: [index_rows(directory, manifest).columns(number) for number in range(len(manifest.checkpoints))],
        lambda: index_rows(directory, manifest).open_all(),
        lambda: representation_store(directory, manifest),
        lambda: _curvature(directory, manifest),
        lambda: load_kernels(directory, manifest, torch.device("cpu")),
        lambda: load_refit(directory, manifest),
    ]
    for read in readers if manifest.complete else ():
        try:
            read()
        except GradtraceError as error:
            yield str(error)


def _curvature(directory: Path, manifest: Manifest) -> Sequence[Curvature | WeightCurvature]:
    """With the bases, or the coordinates of sparse rows, that it is of."""
    if manifest.basis.is_sparse:
        return load_weight_curvature(directory, manifest, load_coordinates(directory, manifest))
    return load_curvature(directory, manifest, load_bases(directory, manifest))


def _weight_problems(
    directory: Path, manifest: Manifest, checkpoints: str | Path | Sequence[str | Path] | None
) -> Iterator[str]:
    """Of the checkpoints' weights and second moments, averages included."""
    try:
        moved = directories_of_runs(checkpoints, len(manifest.basis.files))
    except CheckpointError as error:
        yield str(error)
        return
    for entry in manifest.checkpoints:
        try:
            checkpoint = indexed_checkpoint(directory, entry, moved[entry.run])
            if checkpoint.moments_sha256() != entry.moments_sha256:
                yield f"the second moments beside {checkpoint.path} are not those that were indexed: restore the file"
        except GradtraceError as error:
            yield str(error)
