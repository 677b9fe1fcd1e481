"""Who besides this process may change a file, or read it."""

from __future__ import annotations

import grp
import os
import pwd
import stat
from collections.abc import Iterator
from pathlib import Path

_WRITE, _READ = stat.S_IWGRP | stat.S_IWOTH, stat.S_IRGRP | stat.S_IROTH


def others_may_write(path: Path) -> str | None:
    """Why others may change the file, or put another in its place, with the remedy; None: they may not.

    Raises:
        OSError: the file or one of its folders is not there.
    """
    status = path.stat()
    if _for_others(status, _WRITE) and not _is_read_only(path):
        return f"{path} may be written by others than its owner: `chmod go-w {path}`"
    for folder in _folders(path):
        status = folder.stat()
        # In a folder with the sticky bit, such as /tmp, only its owner may replace a file.
        if _for_others(status, _WRITE) and not status.st_mode & stat.S_ISVTX and not _is_read_only(folder):
            return (
                f"{path} may be replaced by others than its owner, who may write to the folder {folder}: "
                f"`chmod go-w {folder}`, or move the file"
            )
    return None


def others_may_read(path: Path) -> str | None:
    """The remedy where others may read a file that is this user's; what another's file allows, this user needs.

    Raises:
        OSError: the file is not there.
    """
    status = path.stat()
    if status.st_uid == os.geteuid() and _for_others(status, _READ):
        return f"{path} may be read by others than its owner: `chmod go-rwx {path}`"
    return None


def _for_others(status: os.stat_result, bits: int) -> int:
    """Which of these permissions others have. A group that holds nobody but the owner is not another: where each user
    has one, it may write by default."""
    given = status.st_mode & bits
    return given & ~stat.S_IRWXG if _is_private(status) else given


def _is_private(status: os.stat_result) -> bool:
    try:
        owner, group = pwd.getpwuid(status.st_uid), grp.getgrgid(status.st_gid)
    except KeyError:  # without a name, as in a container
        return False
    return group.gr_gid == owner.pw_gid and group.gr_name == owner.pw_name and {*group.gr_mem} <= {owner.pw_name}


def _is_read_only(path: Path) -> bool:
    """Whether it is mounted so that nobody may write, as secrets in a container are."""
    return bool(os.statvfs(path).f_flag & os.ST_RDONLY)


def _folders(path: Path) -> Iterator[Path]:
    """Those through which the file is reached: also those of the file that a link leads to."""
    absolute = Path(os.path.abspath(path))  # noqa: PTH100 - resolve() would follow the link
    yield from dict.fromkeys((*absolute.parents, *path.resolve().parents))
