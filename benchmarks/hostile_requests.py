"""A grammar of hostile requests, as bytes to send: drawn from a seed, the same ones each time."""

from __future__ import annotations

import base64
import gzip
import io
import json
import random
import socket
import struct
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from PIL import Image

_ASKED = ("/influence", "/influence/groups", "/influence/pairs")
_POSTED = (*_ASKED, "/reindex")
_READ = ("/index", "/self-influence", "/examples/train/0", "/jobs", "/metrics", "/docs", "/")
_JUNK = (
    b"[]",
    b"{}",
    b'""',
    b"0",
    b"-1",
    b"1e308",
    b"null",
    b"true",
    b'"a"',
    b'"\\ud800"',
    b'"\\u0000"',
    b"1.5",
    b"9" * 400,
    b"NaN",
    b"[[[]]]",
    b'{"a":[]}',
)
_FIELDS = (
    "query_rows",
    "train_rows",
    "examples",
    "example",
    "include",
    "checkpoints",
    "method",
    "index",
    "damping",
    "k",
    "segments",
    "filter",
    "aggregate",
    "rescore",
    "target",
    "weights",
    "by",
    "roll_back_to",
    "unknown",
)
_FILTERS = ("labels", "rows", "exclude_rows", "where", "correct_only", "unknown")
_ODD_PATHS = (
    "//",
    "/%00",
    "/../../etc/passwd",
    "/index/",
    "http://evil.example/index",
    "*",
    "evil:443",
    "/" + "a" * 9000,
    "/jobs/%2e%2e%2f",
    "/examples/train/99999999999999999999",
    "/jobs/" + "a" * 999,
)
_SIDE = 8  # of the digits
_SILENCE_SECONDS = 0.3  # after the first piece of an answer


@dataclass(frozen=True)
class Hostile:
    """kind: what is drawn;  pieces: what is sent, one after the other;  pause: seconds between them;  hang_up: whether
    the connection is reset after the last one, without waiting for an answer"""

    kind: str
    pieces: list[bytes]
    pause: float = 0.0
    hang_up: bool = False


def drawn(seed: int) -> Hostile:
    """The request of this number."""
    draw = random.Random(seed)
    make = draw.choice(_KINDS)
    return make(draw)


def statuses(host: str, port: int, hostile: Hostile, patience: float = 10.0, address: str = "") -> list[int]:
    """Send it, from an address of this machine. Returns the statuses that were answered; none where the connection was
    closed without an answer."""
    with socket.create_connection((host, port), timeout=patience, source_address=(address, 0)) as connection:
        with suppress(OSError):  # the service may answer, and hang up, before it has read everything
            for piece in hostile.pieces:
                connection.sendall(piece)
                time.sleep(hostile.pause)
        if hostile.hang_up:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return []
        return _answered(connection)


def _answered(connection: socket.socket) -> list[int]:
    """What comes until the other side hangs up, or says nothing more."""
    heard = b""
    with suppress(OSError):
        while piece := connection.recv(1 << 20):
            heard += piece
            connection.settimeout(_SILENCE_SECONDS)
    lines = [line for line in heard.split(b"\r\n") if line.startswith((b"HTTP/1.1 ", b"HTTP/1.0 "))]
    return [int(line[9:12]) for line in lines if line[9:12].isdigit()]


def request(body: bytes, path: str = "/influence", method: str = "POST", **headers: str) -> bytes:
    """A well-formed request. headers: in place of the usual ones, with _ for -"""
    fields = {"host": "127.0.0.1", "content-type": "application/json", "content-length": str(len(body))} | headers
    lines = "".join(
        f"{name.replace('_', '-')}: {value}\r\n" for name, value in {**fields, "connection": "close"}.items()
    )
    return f"{method} {path} HTTP/1.1\r\n{lines}\r\n".encode("latin-1") + body


def _size(draw: random.Random, most: int) -> int:
    """As many small ones as large ones."""
    return int(most ** draw.random())


def _many(draw: random.Random) -> Hostile:
    """A field with very many elements, or very many fields."""
    junk, count = draw.choice(_JUNK), _size(draw, 500_000)
    if draw.random() < 0.3:
        keys = b",".join(b'"%d":%s' % (number, junk) for number in range(count // 4))
        body = (
            draw.choice((b'{%s,"query_rows":[0]}', b'{"query_rows":[0],"filter":{"where":{%s}}}', b'{"example":{%s}}'))
            % keys
        )
        return Hostile("many keys", [request(body, draw.choice(_POSTED))])
    elements = b"[" + b",".join([junk] * count) + b"]"
    if draw.random() < 0.5:
        body = b'{"query_rows":[0],"filter":{"%s":%s}}' % (draw.choice(_FILTERS).encode(), elements)
    else:
        body = b'{"query_rows":[0],"%s":%s}' % (draw.choice(_FIELDS).encode(), elements)
    return Hostile("many elements", [request(body, draw.choice(_POSTED))])


def _deep(draw: random.Random) -> Hostile:
    depth, opening, closing = _size(draw, 1_000_000), *draw.choice(((b"[", b"]"), (b'{"a":', b"}")))
    value = opening * depth + b"0" + closing * (depth if draw.random() < 0.7 else 0)
    return Hostile("deep", [request(draw.choice((value, b'{"example":{"image":' + value + b"}}")))])


def _types(draw: random.Random) -> Hostile:
    fields = b",".join(
        b'"%s":%s' % (name.encode(), draw.choice(_JUNK)) for name in draw.sample(_FIELDS, draw.randint(1, 8))
    )
    return Hostile("types", [request(b"{" + fields + b"}", draw.choice(_POSTED))])


def _long(draw: random.Random) -> Hostile:
    text, name = "x" * _size(draw, 12 << 20), draw.choice(_FIELDS)
    body = draw.choice(
        (
            {name: text, "query_rows": [0]},
            {text: 1},
            {"query_rows": [0], "checkpoints": [text]},
            {"example": {"image": text}},
            {"example": {"image": " x" * (len(text) // 2)}},
        )
    )
    return Hostile("long text", [request(json.dumps(body).encode(), draw.choice(_POSTED))])


def _encoded(draw: random.Random) -> Hostile:
    text = json.dumps({"query_rows": [0], "index": "é"}, ensure_ascii=False)
    encoding = draw.choice(("utf-16", "utf-32", "latin-1", "utf-8-sig", "utf-7"))
    bodies: list[tuple[bytes, dict[str, str]]] = [
        (text.encode(encoding), {}),
        (gzip.compress(text.encode() * _size(draw, 1000)), {"content_encoding": "gzip"}),
        (text.encode(), {"content_type": draw.choice(("", "text/plain", "multipart/form-data; boundary=x"))}),
        (b"\0" * _size(draw, 1 << 20), {}),
        (draw.randbytes(_size(draw, 1 << 20)), {}),
        (b'{"query_rows":[0],"query_rows":[1],"k":' + b"1" * _size(draw, 1 << 20) + b"}", {}),
    ]
    body, headers = draw.choice(bodies)
    return Hostile("encoding", [request(body, draw.choice(_POSTED), **headers)])


def _framed(draw: random.Random) -> Hostile:
    """Bodies whose length is another than is said."""
    body = b'{"query_rows":[0]}'
    length = draw.choice(("-1", "1", "17", "19", "1000", "99999999999999999999", "0x12", "18, 19", "+18", ""))
    chunks = draw.choice(
        (
            b"zz\r\n",
            b"12\r\n%s\r\n0\r\n\r\n" % body,
            b"ffffffffffffffff\r\n",
            b"12\r\n" + body,
            b"12;" + b"x" * 100_000,
            b"1\r\n{\r\n" * _size(draw, 10_000) + b"0\r\n\r\n",
        )
    )
    head = b"POST /influence HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    return Hostile(
        "framing",
        [
            draw.choice(
                (
                    request(body, content_length=length),
                    head + b"Transfer-Encoding: chunked\r\n\r\n" + chunks,
                    head + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n" + chunks,
                    head + b"Content-Length: 5\r\nContent-Length: 18\r\n\r\n" + body,
                    head + b"Transfer-Encoding: gzip, chunked\r\n\r\n" + chunks,
                )
            )
        ],
    )


def _image(draw: random.Random) -> Hostile:
    image, buffer = Image.frombytes("L", (_SIDE, _SIDE), draw.randbytes(_SIDE * _SIDE)), io.BytesIO()
    kind, packed = draw.choice(("PNG", "JPEG", "GIF", "BMP", "TIFF")), b"a\0\0" + zlib.compress(bytes(1 << 20), 9)
    image.save(buffer, kind)
    file = buffer.getvalue()
    change: Callable[[], bytes] = draw.choice(
        (
            lambda: file[: draw.randrange(len(file))],
            lambda: file[:33] + _chunk(b"iCCP", packed) * draw.randint(1, 99) + file[33:],
            lambda: file[:33] + _chunk(b"zTXt", packed) * draw.randint(1, 99) + file[33:],
            lambda: file[:33] + _chunk(b"eXIf", draw.randbytes(999)) * draw.randint(1, 9999) + file[33:],
            lambda: file[:2] + b"\xff" * _size(draw, 200_000) + file[2:],
            lambda: file[:16] + draw.randbytes(8) + file[24:],
            lambda: file + draw.randbytes(_size(draw, 200_000)),
            lambda: bytes(byte ^ (draw.random() < 0.02) for byte in file),
        )
    )
    text = base64.b64encode(change()).decode()
    count = max(1, min(_size(draw, 128), (12 << 20) // (len(text) + 1)))
    return Hostile("image", [request(json.dumps({"examples": [{"image": text}] * count, "k": 1}).encode())])


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _head(draw: random.Random) -> Hostile:
    line, size = b"GET /index HTTP/1.1\r\n", _size(draw, 4 << 20)
    return Hostile(
        "head",
        [
            draw.choice(
                (
                    line + b"Host: 127.0.0.1\r\nX-Long: " + b"a" * size + b"\r\n\r\n",
                    line
                    + b"Host: 127.0.0.1\r\n"
                    + b"".join(b"x-%d: y\r\n" % number for number in range(size // 20))
                    + b"\r\n",
                    line + b"Host: 127.0.0.1\r\nHost: y\r\n\r\n",
                    line + b"\r\n",
                    b"GET /index HTTP/1.0\r\nHost: 127.0.0.1\r\nHost: y\r\n\r\n",
                    b"GET /index\r\n\r\n",
                    b"GET /index HTTP/9.9\r\nHost: 127.0.0.1\r\n\r\n",
                    b"GET /index HTTP\r\n\r\n",
                    b"\x16\x03\x01" + draw.randbytes(200),
                    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
                    b"\r\n" * size,
                    line + b"Host: 127.0.0.1\r\nA: b\r\n c\r\n\r\n",
                    line + b"Host: 127.0.0.1\r\nA\0: b\r\n\r\n",
                    line + b"Host: 127.0.0.1\r\nContent-Length: 3\r\n\r\nabc",
                    line + b"Host: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
                    line
                    + b"Host: 127.0.0.1\r\nAuthorization: Bearer "
                    + draw.randbytes(40).replace(b"\n", b"")
                    + b"\r\n\r\n",
                    b"GET /self-influence?" + b"&labels=1" * (size // 10) + b" HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
                    b"GET /self-influence?" + b"&x=1" * (size // 100) + b" HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
                )
            )
        ],
    )


def _address(draw: random.Random) -> Hostile:
    method = draw.choice(("TRACE", "CONNECT", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "get", "X" * 500, "POST"))
    path = draw.choice((*_READ, *_POSTED, *_ODD_PATHS))
    return Hostile(
        "address", [request(b"", path, method, host=draw.choice(("127.0.0.1", "evil.example", "", "x" * 999)))]
    )


def _slow(draw: random.Random) -> Hostile:
    whole = request(b'{"query_rows":[0],"k":1}' + b" " * 40, draw.choice(_POSTED))
    count = draw.randint(2, 12)
    pieces = [whole[start : start + -(-len(whole) // count)] for start in range(0, len(whole), -(-len(whole) // count))]
    return Hostile("slow", pieces, pause=draw.random() / 4, hang_up=draw.random() < 0.3)


def _pipelined(draw: random.Random) -> Hostile:
    fields = b"Host: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: "
    line = draw.choice(
        (
            b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
            b"GET /nowhere HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
            b"POST /influence HTTP/1.1\r\n" + fields + b"2\r\n\r\n{}",
        )
    )
    return Hostile("pipelined", [line * _size(draw, 200)], hang_up=draw.random() < 0.5)


def _large(draw: random.Random) -> Hostile:
    size = 17 << 20
    if draw.random() < 0.5:
        return Hostile("too large", [request(b" ", content_length=str(size)), b" " * size], hang_up=draw.random() < 0.5)
    return Hostile(
        "too large", [request(b" " * _size(draw, size), draw.choice((*_READ, *_POSTED)), draw.choice(("GET", "POST")))]
    )


_KINDS = (
    _many,
    _many,
    _deep,
    _types,
    _long,
    _encoded,
    _framed,
    _image,
    _image,
    _head,
    _address,
    _slow,
    _pipelined,
    _large,
)
