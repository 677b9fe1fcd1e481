"""Checks of the machine on which an index is served: whether it has what the index needs."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import psutil
import torch

from gradtrace.store.manifest import Manifest
from gradtrace_service.doctor.findings import Says, in_bytes
from gradtrace_service.indexes.hosted import Hosted

_NETWORK = ("nfs", "cifs", "smb", "9p", "ceph", "lustre", "gluster", "afs", "fuse.", "gpfs", "beegfs")
_MORE_DESCRIPTORS = 256  # for connections, models and logs
_CGROUP = Path("/sys/fs/cgroup")
_REPEATED_QUERIES = 5


def file_system(directory: Path) -> Says:
    """Its kind: over a network, locks and renames have their own rules."""
    resolved = directory.resolve()
    mounted = [mount for mount in psutil.disk_partitions(all=True) if resolved.is_relative_to(mount.mountpoint)]
    kind = max(mounted, key=lambda mount: len(mount.mountpoint)).fstype if mounted else "unknown"
    if kind.startswith(_NETWORK):
        yield (
            "warning",
            f"{kind}, over a network: see that it has locks (flock), so that only one process writes the index, and "
            "that rows are read fast enough; a local disk is safer and faster",
        )
    else:
        yield "ok", kind


def disk(directory: Path, manifest: Manifest) -> Says:
    """Free space, beside what updates write: the old generation stays while the new one is written."""
    free, files = shutil.disk_usage(directory).free, os.statvfs(directory)
    whole = sum(entry.bytes for entry in manifest.files())
    checkpoint = sum(shard.rows.bytes + shard.columns.bytes for shard in manifest.shards if shard.checkpoint == 0)
    text = f"{in_bytes(free)} free; a new checkpoint takes {in_bytes(checkpoint)}, compacting up to {in_bytes(whole)}"
    remedy = f"free some, or `gradtrace prune {directory}`"
    if free < checkpoint:
        yield "problem", f"{text}: {remedy}"
    elif free < whole:
        yield "warning", f"{text}: {remedy}"
    else:
        yield "ok", text
    if files.f_files and files.f_favail < len(manifest.files()):
        yield "problem", f"only {files.f_favail} more files can be made (inodes): {remedy}"


def descriptors(manifest: Manifest) -> Says:
    """Open files: each mapped file holds one, and so does each connection."""
    limit, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = len(manifest.files()) + _MORE_DESCRIPTORS
    text = f"{limit:,} may be open here (`ulimit -n`), and the index maps {len(manifest.files())}"
    if limit < needed:
        remedy = f"raise it to {needed:,} or more" + ("" if hard >= needed else f"; the hard limit is {hard:,}")
        yield "warning", f"{text}: {remedy}"
    else:
        yield "ok", text


def memory(directory: Path, manifest: Manifest) -> Says:
    """What exact search holds in each process, and the weights; the stored rows are only mapped."""
    width, levels = manifest.levels[0], len(manifest.levels)
    search = 4 * manifest.rows * len(manifest.checkpoints) * (width + levels)
    files = [directory / entry.file for entry in manifest.checkpoints]
    needed = search + sum(path.stat().st_size for path in files if path.is_file())
    total, available = _memory()
    text = (
        f"{in_bytes(needed)} a process for search and weights, beside PyTorch's own; {in_bytes(available)} of "
        f"{in_bytes(total)} are available"
    )
    remedy = "give the machine or container more, or start fewer --processes"
    if needed > total:
        yield "problem", f"{text}: {remedy}"
    elif needed > available:
        yield "warning", f"{text}: {remedy}"
    else:
        yield "ok", text


def versions(manifest: Manifest) -> Says:
    """Libraries that compute a query's gradient, beside those that computed the rows'."""
    now = {"gradtrace": version("gradtrace"), "torch": torch.__version__, "python": platform.python_version()}
    changed = [
        f"{name} {built} then, {now[name]} now"
        for name, built in manifest.libraries.items()
        if name in now and built.split(".")[:2] != now[name].split(".")[:2]
    ]
    if changed:
        yield "warning", f"{', '.join(changed)}: `gradtrace bench` and a known query show whether answers are the same"
    else:
        yield "ok", ", ".join(f"{name} {number}" for name, number in now.items()) + ", as in the build"


def task(directory: Path, name: str, checkpoints: Sequence[Path] | None, device: str) -> Says:
    """Open the index with its task as the service does, and ask about a training row."""
    started = time.perf_counter()
    hosted = Hosted("", directory, name, None if checkpoints is None else list(checkpoints), device)
    index = hosted.open_or_say_why()
    opened, example = time.perf_counter() - started, index.task.train[int(np.argmax(index.present))]
    seconds = []
    for _ in range(1 + _REPEATED_QUERIES):
        started = time.perf_counter()
        index.influence([example], k=10)
        seconds.append(time.perf_counter() - started)
    yield (
        "ok",
        f"{name} opens in {opened:.1f} s; first query {seconds[0] * 1e3:.0f} ms, then "
        f"{np.median(seconds[1:]) * 1e3:.0f} ms",
    )


def _memory() -> tuple[int, int]:
    """Bytes of the machine, or of the container if it has a limit: in all, and available."""
    whole = psutil.virtual_memory()
    try:
        limit = int((_CGROUP / "memory.max").read_text())  # "max" without a limit
        used = int((_CGROUP / "memory.current").read_text())
    except (OSError, ValueError):
        return whole.total, whole.available
    return min(whole.total, limit), min(whole.available, max(0, limit - used))
