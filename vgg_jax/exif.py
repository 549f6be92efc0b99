"""The EXIF orientation of image files.

Pillow's `Image.getexif` is no substitute. In damaged EXIF it loses orientations that are intact, or
raises. It also warns, and `warnings.catch_warnings` is not safe in the threads that decode. Of a
TIFF it is used, because Pillow calls it for each TIFF that it loads.
"""

import io
import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage

EXIF_MARKER = b"Exif\0\0"
_ORIENTATION_TAG = 0x112
_LONG = 4  # EXIF's number for the type "32-bit integer"


def file_orientation(encoded: bytes) -> int:
    """Reads the EXIF orientation of an image file.

    Args:
        encoded: Content of a JPEG, PNG, WebP, TIFF or AVIF file. Other formats have no EXIF.

    Returns:
        The orientation, 1 to 8. Without a valid one it is 1, upright.
    """
    is_tiff = encoded.startswith((b"II", b"MM"))
    if encoded[4:8] != b"ftyp" and not is_tiff:
        return read_orientation(encoded[find_exif(encoded)])
    from PIL import Image

    try:
        with Image.open(io.BytesIO(encoded)) as image:
            if is_tiff:
                return tiff_orientation(image)
            return read_orientation(image.info.get("exif", b""))
    # Decoding the pixels reports the same error.
    except (OSError, ValueError, SyntaxError, RuntimeError, struct.error, TypeError):
        return 1
    except Image.DecompressionBombError:
        return 1


def tiff_orientation(image: "PILImage") -> int:
    """Tells how Pillow turns a TIFF image while it loads it.

    Args:
        image: The image as `Image.open` returns it, before its pixels are read.

    Returns:
        The orientation that it undoes, 1 to 8. Without a valid one it is 1, upright.
    """
    orientation = image.getexif().get(_ORIENTATION_TAG, 1)
    return orientation if orientation in range(1, 9) else 1


def read_orientation(exif: bytes) -> int:
    """Reads the orientation tag in the first directory of EXIF.

    Args:
        exif: The EXIF data, with or without its marker.

    Returns:
        The orientation, 1 to 8. Without a valid one it is 1, upright.
    """
    exif = exif.removeprefix(EXIF_MARKER)
    byte_order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    if byte_order is None:
        return 1
    try:
        directory = struct.unpack_from(f"{byte_order}I", exif, 4)[0]
        for entry in range(struct.unpack_from(f"{byte_order}H", exif, directory)[0]):
            offset = directory + 2 + 12 * entry
            tag, value_type = struct.unpack_from(f"{byte_order}HH", exif, offset)
            if tag == _ORIENTATION_TAG:
                value_format = byte_order + ("I" if value_type == _LONG else "H")
                value = struct.unpack_from(value_format, exif, offset + 8)[0]
                return int(value) if 1 <= value <= 8 else 1
    except struct.error:  # the directory lies outside of the data
        pass
    return 1


def find_exif(encoded: bytes) -> slice:
    """Finds the EXIF data of a JPEG, PNG or WebP file.

    Args:
        encoded: Content of the file.

    Returns:
        Where the data is in the file, with its marker. The slice is empty if there is none.
    """
    if encoded.startswith(b"\xff\xd8\xff"):
        chunks, name = _jpeg_segments(encoded), b"\xff\xe1"
    elif encoded.startswith(b"\x89PNG"):
        chunks, name = _png_chunks(encoded), b"eXIf"
    elif encoded.startswith(b"RIFF"):
        chunks, name = _webp_chunks(encoded), b"EXIF"
    else:
        return slice(0)
    for chunk_name, start, stop in chunks:
        # XMP has the same name in a JPEG.
        is_exif = name != b"\xff\xe1" or encoded.startswith(EXIF_MARKER, start)
        if chunk_name == name and is_exif:
            return slice(start, stop)
    return slice(0)


def _jpeg_segments(encoded: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yields name, start and stop of the segments before the pixels of a JPEG."""
    position = 2
    while encoded.startswith(b"\xff", position):
        if encoded.startswith(b"\xff", position + 1):  # fill bytes may precede a segment
            position += 1
            continue
        name = encoded[position : position + 2]
        stop = position + 2 + int.from_bytes(encoded[position + 2 : position + 4], "big")
        if name == b"\xff\xda" or stop < position + 4:  # the pixels, or damage
            return
        yield name, position + 4, stop
        position = stop


def _png_chunks(encoded: bytes) -> Iterator[tuple[bytes, int, int]]:
    position = 8
    while position + 8 <= len(encoded):
        length, name = struct.unpack_from(">I4s", encoded, position)
        yield name, position + 8, position + 8 + length
        position += 12 + length  # with the checksum


def _webp_chunks(encoded: bytes) -> Iterator[tuple[bytes, int, int]]:
    position = 12
    while position + 8 <= len(encoded):
        name, length = struct.unpack_from("<4sI", encoded, position)
        yield name, position + 8, position + 8 + length
        position += 8 + length + length % 2
