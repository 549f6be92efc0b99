"""From the bytes of an image file to its pixels, in TensorFlow operations."""

import io
import struct

import numpy as np
import tensorflow as tf
from PIL import Image

# What Pillow and torchvision decode: pixels are equal to theirs. TensorFlow's default differs by up to 21 levels, 1.2 on average.
DCT = "INTEGER_ACCURATE"


MAX_DECODED_PIXELS = 178_956_970  # pixels of a file's image, Pillow's own bound; one of 20,000 x 20,000 takes 1.2 GB, a kilobyte as a file


EXIF_HEAD = 4096  # bytes; EXIF belongs behind the start of a JPEG, or behind the 18 bytes of JFIF


def decode(encoded: tf.Tensor, exif: bool = True) -> tf.Tensor:
    """uint8 (H, W, 3) RGB of a JPEG, PNG, WebP or BMP image or the first frame of a GIF; alpha is dropped, 16 bits become 8.

    Turned as the EXIF orientation of a JPEG says if `exif`. Raises tf.errors.InvalidArgumentError for what cannot be decoded and for more
    than `MAX_DECODED_PIXELS` pixels, or ValueError if Pillow is asked eagerly (for anything but JPEG and PNG).
    """
    image = decode_pixels(encoded)
    return apply_orientation(image, exif_orientation(encoded)) if exif else image


def decode_pixels(encoded: tf.Tensor) -> tf.Tensor:
    def other() -> tf.Tensor:
        return tf.ensure_shape(
            tf.numpy_function(_decode_by_pillow, [encoded], tf.uint8), (None, None, 3)
        )

    def jpeg() -> tf.Tensor:
        return tf.io.decode_jpeg(
            check_pixel_limit(encoded, tf.io.extract_jpeg_shape(encoded)[:2]),
            channels=3,
            dct_method=DCT,
        )

    def png() -> tf.Tensor:
        sides = tf.io.decode_raw(tf.strings.substr(encoded, 16, 8), tf.int32, little_endian=False)
        return tf.io.decode_png(check_pixel_limit(encoded, sides), channels=3)

    is_png = tf.strings.substr(encoded, 0, 4) == b"\x89PNG"
    return tf.cond(
        is_jpeg(encoded),
        jpeg,
        lambda: tf.cond(is_png, png, other),
    )


def check_pixel_limit(encoded: tf.Tensor, sides: tf.Tensor) -> tf.Tensor:
    pixels = tf.reduce_prod(tf.cast(sides, tf.float64))
    return assert_then(
        pixels > MAX_DECODED_PIXELS, f"it has more than {MAX_DECODED_PIXELS:,} pixels", encoded
    )


def assert_then(wrong: tf.Tensor, told: str, tensor: tf.Tensor) -> tf.Tensor:
    """The tensor, but in a graph not before that is known: by itself an assertion holds nothing up. Raises InvalidArgumentError."""
    asserted = tf.raw_ops.Assert(condition=~wrong, data=[told])
    with tf.control_dependencies([] if asserted is None else [asserted]):
        return tf.identity(tensor)


def _decode_by_pillow(encoded: bytes | np.ndarray) -> np.ndarray:
    """For what TensorFlow decodes only in part: it refuses a BMP with a palette, and WebP before version 2.19."""
    try:
        with Image.open(io.BytesIO(_bytes(encoded))) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError) as error:
        raise ValueError(
            "not an image that Pillow can decode"
            if isinstance(error, Image.UnidentifiedImageError)
            else str(error)
        ) from error


def is_jpeg(encoded: tf.Tensor) -> tf.Tensor:
    return tf.strings.substr(encoded, 0, 3) == b"\xff\xd8\xff"


def exif_orientation(encoded: tf.Tensor) -> tf.Tensor:
    """int32, 1 to 8: how EXIF says that the pixels of a JPEG lie; 1, upright, where it says nothing."""

    def read() -> tf.Tensor:
        return tf.ensure_shape(tf.numpy_function(_read_orientation, [head], tf.int32), ())

    head = tf.strings.substr(encoded, 0, EXIF_HEAD)
    # \C is any byte; "." would stop at one that is not UTF-8. Few photos have EXIF, and Python is asked for those only.
    marked = is_jpeg(encoded) & tf.strings.regex_full_match(head, r"\C*Exif\x00\x00\C*")
    return tf.cond(marked, read, lambda: tf.constant(1))


def _read_orientation(head: bytes | np.ndarray) -> np.int32:
    """Tag 0x112 of the first directory. Not by Pillow, which warns or raises in many ways about the broken EXIF that cameras write."""
    head = _bytes(head)
    start = head.find(b"Exif\0\0") + 6
    order = {b"II": "<", b"MM": ">"}.get(head[start : start + 2])
    if order is None:
        return np.int32(1)
    try:
        directory = start + struct.unpack_from(f"{order}I", head, start + 4)[0]
        for entry in range(struct.unpack_from(f"{order}H", head, directory)[0]):
            at = directory + 2 + 12 * entry
            tag, kind = struct.unpack_from(f"{order}HH", head, at)
            if tag == 0x112:
                value = struct.unpack_from(order + ("I" if kind == 4 else "H"), head, at + 8)[0]
                return np.int32(value if 1 <= value <= 8 else 1)
    except struct.error:  # the directory lies outside the file
        pass
    return np.int32(1)


def _bytes(string: bytes | np.ndarray) -> bytes:
    """`tf.numpy_function` hands over a string as bytes in a graph, but as an array of shape () eagerly."""
    return np.asarray(string, object).item()


def apply_orientation(image: tf.Tensor, turn: tf.Tensor) -> tf.Tensor:
    """(H, W, 3) whose pixels lie as EXIF orientation `turn` says -> (H, W, 3) or (W, H, 3), upright."""
    image = tf.cond(turn >= 5, lambda: tf.transpose(image, (1, 0, 2)), lambda: image)
    image = tf.cond(
        (turn == 3) | (turn == 4) | (turn == 7) | (turn == 8), lambda: image[::-1], lambda: image
    )
    return tf.cond(
        (turn == 2) | (turn == 3) | (turn == 6) | (turn == 7), lambda: image[:, ::-1], lambda: image
    )
