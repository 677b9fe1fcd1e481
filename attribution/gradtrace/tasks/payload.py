"""JSON values of requests to Python values, and images back. Input is not trusted: problems raise a QueryError."""

from __future__ import annotations

import base64
import binascii
import io
import string
import struct
import zlib
from collections.abc import Collection, Mapping
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from gradtrace.errors import QueryError
from gradtrace.tasks.image_files import pixel_parts

Pixels = npt.NDArray[np.uint8]  # [height, width, channels]
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_COLOUR_TYPES = {1: 0, 3: 2, 4: 6}  # of PNG
MAX_IMAGE_CHARACTERS = 16 << 20
FLOAT32_MAX = 3.4028235e38  # the shortest decimal that rounds to the largest float32, as `render` writes it
_EIGHT_BIT_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")


def check_keys(payload: Mapping[str, Any], allowed: tuple[str, ...]) -> None:
    """Raise QueryError for what is not a JSON object, and for keys that would be ignored."""
    if not isinstance(payload, Mapping):
        raise QueryError(f"an example is a JSON object with {' or '.join(allowed)}, not a {type(payload).__name__}")
    unknown = [key for key in payload if key not in allowed]
    if unknown:
        raise QueryError(f"an example of this task has no {listed(unknown)}; it takes {', '.join(allowed)}")


def number(value: Any) -> float | None:
    """A JSON number that float32 can hold; None for anything else, including booleans and NaN."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= FLOAT32_MAX:
        return None
    return float(value)


def shown(value: Any, most: int = 60) -> str:
    """A value as text for an error message, of at most `most` characters."""
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits
        text = f"an enormous {type(value).__name__}"
    return text if len(text) <= most else text[:most] + "..."


def listed(names: Collection[object], most: int = 10) -> str:
    """The first names, each shortened, and how many more there are, for an error message."""
    first = ", ".join(name if len(name) <= 60 else f"{name[:60]}..." for name in map(str, islice(names, most)))
    return first if len(names) <= most else f"{first} and {len(names) - most:,} more"


def decode_image(value: Any, height: int, width: int, channels: int) -> Pixels:
    """Pixels [height, width, channels] from a base64 PNG or JPEG (also a data URL), or from nested lists of 0 to 255.

    Images are not resized. Colours are converted to the number of channels.

    Raises:
        QueryError: it is not an image, has another size, or more than 8 bits a channel.
    """
    if isinstance(value, str):
        return _decode_file(_base64(value), height, width, channels)
    if isinstance(value, list):
        return _decode_lists(value, height, width, channels)
    raise QueryError('"image" is a base64 PNG or JPEG, or nested lists of pixel values from 0 to 255')


def encode_image(pixels: Pixels) -> str:
    """A PNG data URL of [height, width, 1, 3 or 4] pixels."""
    return "data:image/png;base64," + base64.b64encode(_png(pixels)).decode("ascii")


def _png(pixels: Pixels) -> bytes:
    """A PNG file, written in a third of Pillow's time for images of 32 x 32, of which an answer has twenty.

    Every line uses filter 1, the difference from the pixel to the left (ISO/IEC 15948, 9.2).
    """
    height, width, channels = pixels.shape
    lines = np.ones((height, 1 + width * channels), dtype=np.uint8)  # each begins with the number of its filter
    lines[:, 1:] = pixels.reshape(height, -1)
    lines[:, 1 + channels :] -= lines[:, 1:-channels].copy()
    header = struct.pack(">IIBBBBB", width, height, 8, _COLOUR_TYPES[channels], 0, 0, 0)
    body = zlib.compress(lines.tobytes(), 1)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", body) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _base64(text: str) -> bytes:
    if len(text) > MAX_IMAGE_CHARACTERS:
        raise QueryError(f'"image" has {len(text):,} characters, more than the {MAX_IMAGE_CHARACTERS:,} that are read')
    head, comma, body = text.partition(",")
    if comma and not (head.startswith("data:image/") and head.endswith(";base64")):
        raise QueryError(
            '"image" is not a base64 data URL; begin it with data:image/png;base64, or send the base64 text alone'
        )
    try:
        letters = (body if comma else text).encode("ascii").translate(None, string.whitespace.encode())
        return base64.b64decode(letters, validate=True)
    except (binascii.Error, ValueError) as error:
        raise QueryError(f'"image" is not base64 text ({error}); encode the bytes of a PNG or JPEG file') from None


def _decode_file(content: bytes, height: int, width: int, channels: int) -> Pixels:
    if channels not in MODES:
        raise QueryError(
            f"PNG and JPEG cannot hold images of {channels} channels; give nested lists [height][width][{channels}]"
        )
    parts = pixel_parts(content, height * width * channels)
    try:
        image = Image.open(io.BytesIO(parts), formats=("PNG", "JPEG"))
        if image.size == (width, height) and image.mode in _EIGHT_BIT_MODES:  # before any pixel is decompressed
            return np.array(image.convert(MODES[channels]), dtype=np.uint8).reshape(height, width, channels)
    except UnidentifiedImageError:
        raise QueryError('"image" begins as a PNG or JPEG but is damaged; send a whole file of either kind') from None
    except Exception as error:  # malformed files make Pillow raise all kinds of exceptions
        raise QueryError(
            f'"image" cannot be decoded as PNG or JPEG ({error}); send a whole file of either kind'
        ) from None
    if image.mode not in _EIGHT_BIT_MODES:
        raise QueryError(f'"image" has more than 8 bits a channel (mode {image.mode}); convert it to 8 bits')
    raise QueryError(
        f'"image" is {image.size[0]} wide and {image.size[1]} high, the task\'s images {width} and {height}; '
        "resize it first, as the training images were"
    )


def _decode_lists(value: list[Any], height: int, width: int, channels: int) -> Pixels:
    shape = (height, width, channels)
    size = f"[{height}][{width}]" + f"[{channels}]" * (channels > 1)
    remedy = f'"image" as lists is {size}, whole numbers 0 to 255'
    pixels = np.array(value, dtype=object)  # as objects: a string in a list would widen every element to its length
    if pixels.shape not in ((shape, shape[:2]) if channels == 1 else (shape,)):
        raise QueryError(f"the image's shape is {list(pixels.shape)}; {remedy}")
    if not all(type(pixel) in (int, float) and 0 <= pixel <= 255 and pixel == int(pixel) for pixel in pixels.flat):
        raise QueryError(f"the image holds values that are not pixels; {remedy}")
    return pixels.astype(np.uint8).reshape(shape)
