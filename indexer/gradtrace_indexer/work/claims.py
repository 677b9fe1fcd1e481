"""Claims of steps: a file that one worker can create, and that it renews for as long as it lives.

A worker that is killed renews its claims no longer. On the machine that it ran on, others see at once that its process
is gone; elsewhere they wait until a claim was not renewed for LEASE_SECONDS, by their own clocks. Then one of them
removes it, and the step is free again. A worker that was stopped for so long and goes on does the step a second time,
with the same result.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import psutil

from gradtrace_indexer.writing.files import write_errors_of

LEASE_SECONDS = 120.0  # network file systems may show a file's old content for a minute
_RENEWAL_SECONDS = 1.0
_CONTENT_BYTES = 512  # renewed in place, so always of one size
_SUFFIX = ".claim"


@dataclass(frozen=True)
class Holder:
    """Who holds a claim.

    worker: its name, for people
    token: of this claim alone
    machine: of the running system and its process ids: those of a container are others than those outside
    pid, started: of the process
    units: of the step that are done
    renewals: how often the claim was renewed
    """

    worker: str
    token: str
    machine: str
    pid: int
    started: float
    units: int = 0
    renewals: int = 0

    def content(self) -> bytes:
        return json.dumps(asdict(self)).encode().ljust(_CONTENT_BYTES)

    def is_gone(self) -> bool:
        """Whether its process has ended, as far as can be seen from here."""
        if self.machine != _machine():
            return False
        try:
            process = psutil.Process(self.pid)
            return process.create_time() != self.started or process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True
        except psutil.AccessDenied:
            return False


@cache
def _machine() -> str:
    """Tells running systems apart, and the namespaces of their process ids."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    return f"{socket.gethostname()} {psutil.boot_time()}"


class Claims:
    """The claims in a folder, which is made when the first is taken.

    worker: name of this process among the others
    """

    def __init__(self, folder: Path, worker: str | None = None) -> None:
        self._folder, self.worker = folder, (worker or f"{socket.gethostname()[:60]}:{os.getpid()}")[:100]
        self._seen: dict[str, tuple[Holder, float]] = {}  # by step, with the time when it was first seen so

    def holders(self) -> dict[str, Holder]:
        """Who holds which steps now."""
        held = {path.name.removesuffix(_SUFFIX): _read(path) for path in sorted(self._folder.glob(f"*{_SUFFIX}"))}
        return {step: holder for step, holder in held.items() if holder is not None}

    @contextmanager
    def claimed(self, step: str, seized: bool = False) -> Iterator[Claim | None]:
        """Hold the claim of a step meanwhile; None where a worker that may be alive holds it.

        seized: take it from whoever holds it

        Raises:
            StoreError: the folder cannot be written.
        """
        if seized:
            with write_errors_of(self._path(step)):
                self._path(step).unlink(missing_ok=True)
        claim = self._taken(step)
        if claim is None:
            yield None
            return
        with claim:
            yield claim

    def is_abandoned(self, step: str) -> bool:
        """Whether no living worker holds the claim of a step."""
        holder = _read(self._path(step))
        return self._is_dead(step, holder) if holder is not None else not self._path(step).exists()

    def _path(self, step: str) -> Path:
        return self._folder / f"{step}{_SUFFIX}"

    def _taken(self, step: str) -> Claim | None:
        path = self._path(step)
        holder = _read(path)
        if holder is None and path.exists():
            holder = Holder("unknown", "", "", 0, 0.0)  # just created, or its content was lost in a crash
        if holder is not None and not (self._is_dead(step, holder) and _removed(path, holder.token)):
            return None
        own = Holder(self.worker, secrets.token_hex(8), _machine(), os.getpid(), psutil.Process().create_time())
        with write_errors_of(path):
            self._folder.mkdir(parents=True, exist_ok=True)
            try:
                return Claim(path, os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666), own)
            except FileExistsError:  # another was faster
                return None

    def _is_dead(self, step: str, holder: Holder) -> bool:
        seen, since = self._seen.get(step, (None, 0.0))
        if seen != holder:
            self._seen[step] = (holder, time.monotonic())
            return holder.is_gone()
        return holder.is_gone() or time.monotonic() - since > LEASE_SECONDS


class Claim:
    """A claim of this process, renewed by a thread of its own until it is left."""

    def __init__(self, path: Path, file: int, holder: Holder) -> None:
        self._path, self._file, self._holder = path, file, holder
        self._ended = threading.Event()
        self._units = 0
        self._thread = threading.Thread(target=self._renew, name="gradtrace-claim", daemon=True)
        try:
            self._write(0)
        except OSError:  # as of a full disk: nobody shall wait for it
            path.unlink(missing_ok=True)
            os.close(file)
            raise

    def advance(self, units: int) -> None:
        """Tell others that so many more units of the step are done."""
        self._units += units

    def __enter__(self) -> Claim:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()
        os.close(self._file)
        if (holder := _read(self._path)) is not None and holder.token == self._holder.token:
            self._path.unlink(missing_ok=True)

    def _renew(self) -> None:
        renewals = 0
        while not self._ended.wait(_RENEWAL_SECONDS):
            renewals += 1
            with suppress(OSError):  # as of a full disk: the step itself will say so
                self._write(renewals)

    def _write(self, renewals: int) -> None:
        """Into the open file: where the claim was taken away, its name belongs to another by now."""
        values = asdict(self._holder) | {"units": self._units, "renewals": renewals}
        os.pwrite(self._file, Holder(**values).content(), 0)


def _read(path: Path) -> Holder | None:
    """None where there is no such file, or no whole content in it."""
    try:
        return Holder(**json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def _removed(path: Path, token: str) -> bool:
    """Take away a dead worker's claim. False where another worker did, and may hold the step by now."""
    taken = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    try:
        path.rename(taken)
    except FileNotFoundError:
        return False
    holder = _read(taken)
    is_dead = (holder.token if holder is not None else "") == token
    if not is_dead:
        with suppress(FileExistsError):
            os.link(taken, path)  # a living worker's: given back
    taken.unlink()
    return is_dead
