"""Listening sockets: one that was inherited, and one that hears no new connections."""

from __future__ import annotations

import ctypes
import socket
import struct

from gradtrace_service.settings import SettingsError

_SO_ATTACH_FILTER = 26  # Linux; the module socket does not name it
# A classic BPF program over the TCP header: drops a segment with SYN among its flags, in byte 13, and passes others on.
# SYN opens a connection; what is open, or half open, goes on.
_DROP_SYN = [
    (0x30, 0, 0, 13),  # load byte 13
    (0x45, 0, 1, 0x02),  # SYN? else skip one
    (0x06, 0, 0, 0),  # drop
    (0x06, 0, 0, 0xFFFFFFFF),  # pass
]


def deaf(listener: socket.socket) -> socket.socket:
    """A copy of the listener. From now on, whoever connects is not answered, as if the packet was lost, and tries again
    after a second. This applies to the socket, and so to all descriptors of it, in other processes, too.

    Raises:
        OSError: the operating system does not offer this.
    """
    program = b"".join(struct.pack("HBBI", *instruction) for instruction in _DROP_SYN)
    buffer = ctypes.create_string_buffer(program)
    copy = socket.fromfd(listener.fileno(), listener.family, listener.type)
    copy.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("HL", len(_DROP_SYN), ctypes.addressof(buffer)))
    return copy


def inherited(descriptor: int) -> socket.socket:
    """The listening socket that whoever started the program left open for it.

    Raises:
        SettingsError: the descriptor is not one.
    """
    try:
        listener = socket.socket(fileno=descriptor)
        listening = listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError as error:
        raise SettingsError(f"--fd {descriptor} is not a socket ({error.strerror}); {_FD_REMEDY}") from error
    if not listening:
        raise SettingsError(f"--fd {descriptor} is a socket that does not listen; {_FD_REMEDY}")
    if listener.family != socket.AF_UNIX:
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # connections inherit it
    return listener


_FD_REMEDY = "systemd passes the first socket of a unit as 3; without socket activation, give --host and --port"


def host_of(listener: socket.socket) -> str:
    """The address that it listens on; of a Unix socket, which other machines do not reach, localhost."""
    return "localhost" if listener.family == socket.AF_UNIX else str(listener.getsockname()[0])
