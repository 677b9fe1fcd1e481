"""API keys: shown once when they are made, stored as hashes in a file, and looked up in constant time.

A key is 256 random bits, so its hash needs no salt and no slow function: those protect passwords, which can be guessed.
A fast hash of what cannot be guessed cannot be inverted either, and costs a request next to nothing.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import secrets
from collections.abc import Sequence
from enum import Enum
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gradtrace_service.http.file_permissions import others_may_read, others_may_write
from gradtrace_service.indexes.hosted import file_stamp
from gradtrace_service.settings import SettingsError

_PREFIX = "gradtrace_"  # lets people and scanners for leaked secrets recognise it

_log = logging.getLogger(__name__)


class Scope(str, Enum):
    """What a key may be used for."""

    query = "query"
    admin = "admin"


class ApiKey(BaseModel):
    """One line of a key file, as JSON."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[\w.@-]{1,64}$")
    scopes: tuple[Scope, ...] = Field(min_length=1)
    blake2b: str = Field(pattern=r"^[0-9a-f]{64}$")


class KeyFile:
    """The keys of a file, which is read again whenever it has changed.

    If it can no longer be read, that is logged, and the previous keys stay valid: a half-written file, as an editor
    leaves it for a moment, must lock nobody out.

    Raises:
        SettingsError: as `read_keys`.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp = file_stamp(path)
        self._keys = read_keys(path)
        self._complaint = ""  # the last error logged for a file that cannot be read

    def find(self, key: str) -> ApiKey | None:
        """The entry of a key, or None. The time that it takes reveals nothing about the file."""
        self._follow()
        digest, match = _hash(key), None
        for entry in self._keys:
            if hmac.compare_digest(entry.blake2b, digest):
                match = entry
        return match

    def _follow(self) -> None:
        stamp = file_stamp(self._path)
        if stamp == self._stamp:
            return
        try:
            self._keys, self._stamp, self._complaint = read_keys(self._path), stamp, ""
        except SettingsError as error:  # the next request tries again: a failure may pass
            if str(error) != self._complaint:
                _log.error("%s; the previous keys stay valid", error)
            self._complaint = str(error)


def read_keys(path: Path) -> list[ApiKey]:
    """The keys of a file.

    Raises:
        SettingsError: it cannot be read, holds something other than keys, or others than its owner may write it.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
        changeable, readable = others_may_write(path), others_may_read(path)
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(
            f"the keys in {path} cannot be read ({error}); `gradtrace key new` makes the file"
        ) from None
    if changeable is not None:
        raise SettingsError(f"whoever may write keys has the service: {changeable}")
    if readable is not None:
        _log.warning("%s. It holds the hashes of keys, not the keys, but tells their names and scopes", readable)
    return [_parsed(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]


def add_key(path: Path, name: str, scopes: Sequence[Scope]) -> str:
    """Make a key and add its hash to the file; the key itself is stored nowhere.

    Raises:
        SettingsError: the name is taken or invalid, or as `read_keys`.
    """
    known = read_keys(path) if path.exists() else []
    if name in [entry.name for entry in known]:
        raise SettingsError(f"{path} has a key {name!r} already; take another name, or delete that line first")
    key = _PREFIX + secrets.token_urlsafe(32)
    try:
        entry = ApiKey(name=name, scopes=tuple(dict.fromkeys(scopes)), blake2b=_hash(key))
    except ValidationError:
        raise SettingsError(f"{name!r} is not a name for a key; use up to 64 letters, digits, and . _ @ -") from None
    whole_lines = not known or path.read_bytes().endswith(b"\n")
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "w", encoding="utf-8") as file:  # noqa: PTH123
        file.write("" if whole_lines else "\n")
        file.write(entry.model_dump_json() + "\n")
    return key


def _hash(key: str) -> str:
    return hashlib.blake2b(key.encode(), digest_size=32).hexdigest()


def _parsed(path: Path, number: int, line: str) -> ApiKey:
    try:
        return ApiKey.model_validate_json(line)
    except ValidationError as error:  # quoted without its input: a secret may be in the wrong place
        causes = "; ".join(cause["msg"] for cause in error.errors(include_input=False, include_url=False))
        raise SettingsError(
            f"line {number} of {path} is not a key ({causes}); delete it, and make keys by `gradtrace key new`"
        ) from None
