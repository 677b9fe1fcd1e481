"""What of a PNG or JPEG file makes its pixels. Everything else is left out before the file is opened: Pillow unpacks
colour profiles and texts, a megabyte each and as many as there are, to read the header only."""

from __future__ import annotations

import re

from gradtrace.errors import QueryError

MAX_METADATA = 256 << 10  # bytes of an image file beyond those that its pixels can need
MAX_SCANS = 32  # of a JPEG: each covers all pixels; progressive files have about ten
_MAX_PIECES = 100  # chunks or segments of a file, beside those of its pixels
_CHUNK_BYTES = 4096  # writers of PNG put no fewer of the pixels' bytes into a chunk
_PNG = b"\x89PNG\r\n\x1a\n"
_PIXEL_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
_LEFT_OUT_SEGMENTS = {0xFE, *range(0xE1, 0xEE), 0xEF}  # comments and APPn, but for JFIF (APP0) and Adobe's (APP14)
_MARKER = re.compile(rb"\xff+([^\xff])")  # of a JPEG's segment: any number of bytes may fill the gap before it
_START_OF_SCAN = 0xDA
_REMEDY = "save it again, as a baseline JPEG or a PNG without metadata"
_LACKS_END = '"image" lacks the end of its file; send the whole file'


def pixel_parts(content: bytes, size: int) -> bytes:
    """The file without what its pixels do not need.

    Args:
        size: number of values of the pixels

    Raises:
        QueryError: it is not a PNG or JPEG, lacks its end, or would take long to decode for its number of pixels.
    """
    if len(content) > 2 * size + MAX_METADATA:
        raise QueryError(f'"image" has {len(content):,} bytes, far more than its pixels; {_REMEDY}')
    if content.startswith(_PNG):
        return _png_parts(content)
    if content.startswith(b"\xff\xd8\xff"):
        return _jpeg_parts(content)
    raise QueryError('"image" is not a PNG or JPEG file; send a whole file of either kind')


def _png_parts(content: bytes) -> bytes:
    kept, start = [_PNG], len(_PNG)
    for _ in range(_MAX_PIECES + len(content) // _CHUNK_BYTES):
        length, kind = int.from_bytes(content[start : start + 4], "big"), content[start + 4 : start + 8]
        end = start + 12 + length  # with the length itself, the kind and the checksum
        if end > len(content):
            raise QueryError(_LACKS_END)
        if kind in _PIXEL_CHUNKS:
            kept.append(content[start:end])
        if kind == b"IEND":
            return b"".join(kept)
        start = end
    raise QueryError(f'"image" has too many chunks for its size; {_REMEDY}')


def _jpeg_parts(content: bytes) -> bytes:
    kept, start = [content[:2]], 2
    for _ in range(_MAX_PIECES):
        marker = _MARKER.match(content, start)
        end = marker.end() + int.from_bytes(content[marker.end() : marker.end() + 2], "big") if marker else 0
        if marker is None or end > len(content):
            raise QueryError(_LACKS_END)
        kind = marker[1][0]
        if kind == _START_OF_SCAN:
            return b"".join([*kept, _scans(content[marker.end() - 2 :])])
        if kind not in _LEFT_OUT_SEGMENTS:
            kept.append(content[marker.end() - 2 : end])
        start = end
    raise QueryError(f'"image" has too many segments; {_REMEDY}')


def _scans(content: bytes) -> bytes:
    if content.count(b"\xff\xda") > MAX_SCANS:
        raise QueryError(f'"image" has more than {MAX_SCANS} scans; {_REMEDY}')
    if b"\xff\xd9" not in content:
        raise QueryError(_LACKS_END)
    return content
