"""Contents of image files: formats, modes, EXIF orientations, and unusual images."""

import itertools
import struct

import numpy as np
from PIL import Image

from tests.helpers.corrupt_images import PHOTO
from tests.helpers.tiny_data import encode, encode_animation, encode_with_exif, noise


def encode_in_mode(mode: str, format: str, **options) -> bytes:
    return encode(Image.fromarray(noise(21, 34)).convert(mode), format, **options)


FILES = {
    "jpeg": encode_in_mode("RGB", "JPEG"),
    "jpeg 4:4:4": encode_in_mode("RGB", "JPEG", subsampling=0),
    "progressive jpeg": encode_in_mode("RGB", "JPEG", progressive=True),
    "grey jpeg": encode_in_mode("L", "JPEG"),
    "png": encode_in_mode("RGB", "PNG"),
    "grey png": encode_in_mode("L", "PNG"),
    "palette png": encode_in_mode("P", "PNG"),
    "4-bit palette png": encode_in_mode("P", "PNG", bits=4),
    "1-bit png": encode_in_mode("1", "PNG"),
    "transparent palette png": encode_in_mode("P", "PNG", transparency=3),
    "bmp": encode_in_mode("RGB", "BMP"),
    "palette bmp": encode_in_mode("P", "BMP"),
    "grey bmp": encode_in_mode("L", "BMP"),
    "webp": encode_in_mode("RGB", "WEBP"),
    "animated webp": encode_animation(21, 34, "WEBP"),
    "gif": encode_in_mode("P", "GIF"),
    "animated gif": encode_animation(21, 34, "GIF"),
    "tiff": encode_in_mode("RGB", "TIFF"),
    "lzw tiff": encode_in_mode("RGB", "TIFF", compression="tiff_lzw"),
    "grey tiff": encode_in_mode("L", "TIFF"),
    "ppm": encode_in_mode("RGB", "PPM"),
    "pgm": encode_in_mode("L", "PPM"),
    "pbm": encode_in_mode("1", "PPM"),
    "avif": encode_in_mode("RGB", "AVIF"),
    "jpeg 2000": encode_in_mode("RGB", "JPEG2000"),
    "jpeg 2000 codestream": encode_in_mode("RGB", "JPEG2000", no_jp2=True),
}


ORIENTED = [
    encode_with_exif(*options) for options in itertools.product(range(1, 9), "<>", (True, False))
]


def broken_exif():
    intact = encode_with_exif(6)
    start = intact.index(b"Exif\0\0") + 6
    outside = intact[: start + 4] + struct.pack("<I", 10**9) + intact[start + 8 :]
    no_byte_order = intact[:start] + b"XX" + intact[start + 2 :]
    without_tag = intact[start + 10 :].replace(struct.pack("<H", 0x112), b"\0\0", 1)
    endless = intact[: start + 8] + struct.pack("<H", 65535) + without_tag
    no_such_orientation = encode_with_exif(9)
    only_a_comment = encode(noise(21, 34), "JPEG", quality=95, comment=b"Exif\0\0")
    return [outside, no_byte_order, endless, no_such_orientation, only_a_comment]


def turned(format: str = "JPEG", orientation: int = 6, **options) -> bytes:
    """An image file with an EXIF orientation, as Pillow writes it."""
    exif = Image.Exif()
    exif[0x112] = orientation
    return encode(PHOTO, format, exif=exif.tobytes(), **options)


def segment(marker: int, content: bytes) -> bytes:
    """A segment of a JPEG."""
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


def turned_after(*segments: bytes) -> bytes:
    """A JPEG with the EXIF orientation 6 after other segments."""
    encoded = turned()
    return encoded[:20] + b"".join(segments) + encoded[20:]


def turned_png_at_end() -> bytes:
    """A PNG whose EXIF comes after the pixels."""
    encoded = turned("PNG")
    start = encoded.index(b"eXIf") - 4
    stop = start + 12 + int.from_bytes(encoded[start : start + 4])
    end = encoded.index(b"IEND") - 4
    return encoded[:start] + encoded[stop:end] + encoded[start:stop] + encoded[end:]


XMP = segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + bytes(60_000))
ICC = segment(0xE2, b"ICC_PROFILE\0\1\1" + bytes(5_000))
PHOTOSHOP = segment(0xED, b"Photoshop 3.0\x008BIM" + b"\xff\xdb\xff\xda" + bytes(8_000))
TURNED = {
    "after XMP": turned_after(XMP),
    "after ICC": turned_after(ICC),
    "after APP13": turned_after(PHOTOSHOP),
    "after all": turned_after(ICC, PHOTOSHOP, XMP, b"\xff"),
    "png": turned("PNG"),
    "png at its end": turned_png_at_end(),
    "webp": turned("WEBP", lossless=True),
    "avif": turned("AVIF"),
    "tiff": turned("TIFF"),
}


UNUSUAL = {
    "one_pixel.png": encode(noise(1, 1)),
    "line.png": encode(noise(1, 5000)),
    "column.jpg": encode(noise(5000, 1), "JPEG"),
    "sixteen_bits.png": encode(np.arange(40 * 50, dtype=np.uint16).reshape(40, 50) * 32),
    "sixteen_bits.tiff": encode(np.arange(2000, dtype=np.uint16).reshape(40, 50) * 32, "TIFF"),
    "palette.png": encode(Image.fromarray(PHOTO).quantize(16)),
    "one_bit.png": encode(Image.fromarray(PHOTO).convert("1")),
    "alpha.png": encode(np.dstack([PHOTO, noise(40, 50, 1)[..., 0]])),
    "cmyk.jpg": encode(Image.fromarray(PHOTO).convert("CMYK"), "JPEG"),
    "grey.jpg": encode(Image.fromarray(PHOTO).convert("L"), "JPEG"),
    "animated.gif": encode_animation(20, 30, "GIF"),
    "animated.webp": encode_animation(20, 30, "WEBP"),
    "a_png.jpg": encode(PHOTO),
    "turned.jpg": turned(),
}
