"""Decodes image files to pixels, in TensorFlow operations."""

import numpy as np
import tensorflow as tf

from vgg_jax.exif import file_orientation
from vgg_jax.preprocessing import (
    MAX_DECODED_PIXELS,
    decode_by_pillow,
)

# Pillow and torchvision decode JPEG with this method, so the pixels equal theirs. TensorFlow's
# default differs (docs/performance.md#jpeg-decoding).
DCT = "INTEGER_ACCURATE"
# Segments of a JPEG that are passed over in search of EXIF: JFIF, a colour profile, a comment, ….
SEGMENTS_BEFORE_TABLES = 3


def decode(encoded: tf.Tensor, exif: bool = True) -> tf.Tensor:
    """Decodes an image file.

    The formats are those of `vgg_jax.image_files`; of several frames the first one is decoded. An
    alpha channel is dropped, and 16 bits become 8.

    Args:
        encoded: Content of the file, a scalar string.
        exif: Turn and mirror an image as its EXIF orientation says.

    Returns:
        RGB pixels, uint8 (H, W, 3).

    Raises:
        tf.errors.InvalidArgumentError: The image cannot be decoded, or has more than
            `MAX_DECODED_PIXELS` pixels.
    """
    image = decode_pixels(encoded)
    return apply_orientation(image, exif_orientation(encoded)) if exif else image


def decode_pixels(encoded: tf.Tensor) -> tf.Tensor:
    """Decodes an image file without regard to its EXIF orientation.

    Args:
        encoded: Content of the file, a scalar string.

    Returns:
        RGB pixels as the file stores them, uint8 (H, W, 3).

    Raises:
        tf.errors.InvalidArgumentError: As `decode` does.
    """

    def jpeg() -> tf.Tensor:
        sides = tf.io.extract_jpeg_shape(encoded)[:2]
        checked = check_pixel_limit(encoded, sides)
        return tf.io.decode_jpeg(checked, channels=3, dct_method=DCT)

    def png() -> tf.Tensor:
        sides = tf.io.decode_raw(tf.strings.substr(encoded, 16, 8), tf.int32, little_endian=False)
        return tf.io.decode_png(check_pixel_limit(encoded, sides), channels=3)

    def other() -> tf.Tensor:
        image, fault = tf.numpy_function(_decode_by_pillow, [encoded], [tf.uint8, tf.string])
        return tf.ensure_shape(assert_then(fault != b"", fault, image), (None, None, 3))

    is_png = tf.strings.substr(encoded, 0, 4) == b"\x89PNG"
    return tf.cond(is_jpeg(encoded), jpeg, lambda: tf.cond(is_png, png, other))


def check_pixel_limit(encoded: tf.Tensor, sides: tf.Tensor) -> tf.Tensor:
    """Returns `encoded` unless the image has more than `MAX_DECODED_PIXELS` pixels.

    Args:
        encoded: Content of the file, a scalar string.
        sides: Height and width, int32 (2,).

    Returns:
        `encoded`.

    Raises:
        tf.errors.InvalidArgumentError: The image has too many pixels.
    """
    too_many = tf.reduce_prod(tf.cast(sides, tf.float64)) > MAX_DECODED_PIXELS
    return assert_then(too_many, f"it has more than {MAX_DECODED_PIXELS:,} pixels", encoded)


def assert_then(wrong: tf.Tensor, message: str | tf.Tensor, tensor: tf.Tensor) -> tf.Tensor:
    """Returns `tensor` unless `wrong`.

    In a graph, the tensor waits for the assertion. A plain assertion would run beside the
    operations that it should prevent.

    Args:
        wrong: Condition of the error, a scalar bool.
        message: Message of the error.
        tensor: Any tensor.

    Returns:
        `tensor`.

    Raises:
        tf.errors.InvalidArgumentError: `wrong` is true.
    """
    assertion = tf.raw_ops.Assert(condition=~wrong, data=[message])
    with tf.control_dependencies([] if assertion is None else [assertion]):
        return tf.identity(tensor)


def is_jpeg(encoded: tf.Tensor) -> tf.Tensor:
    """Tells whether a file begins as a JPEG does.

    Args:
        encoded: Content of the file, a scalar string.

    Returns:
        Scalar bool.
    """
    return tf.strings.substr(encoded, 0, 3) == b"\xff\xd8\xff"


def exif_orientation(encoded: tf.Tensor) -> tf.Tensor:
    """Reads the EXIF orientation of an image file.

    Args:
        encoded: Content of the file, a scalar string.

    Returns:
        int32 scalar, 1 to 8. Without an orientation it is 1, upright.
    """

    def read() -> tf.Tensor:
        orientation = tf.numpy_function(_file_orientation, [encoded], tf.int32)
        return tf.ensure_shape(orientation, ())

    # Only files that may have EXIF are worth a call of Python (docs/performance.md#exif).
    is_png = tf.strings.substr(encoded, 0, 4) == b"\x89PNG"
    may_have_exif = tf.case(
        [
            (is_jpeg(encoded), lambda: _jpeg_may_have_exif(encoded)),
            (is_png, lambda: tf.strings.regex_full_match(encoded, r"\C*eXIf\C*")),
        ],
        default=lambda: tf.constant(True),
    )
    return tf.cond(may_have_exif, read, lambda: tf.constant(1))


def _jpeg_may_have_exif(encoded: tf.Tensor) -> tf.Tensor:
    """Tells whether a segment that may have EXIF precedes the tables of the pixels.

    EXIF must be the first or second segment by its standard. EXIF behind the tables is not found.
    """

    def read_segment(position: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        head = tf.strings.substr(encoded, position, 4)
        numbers = tf.io.decode_raw(head, tf.uint16, little_endian=False, fixed_length=4)
        marker, length = tf.unstack(tf.cast(numbers, tf.int32), 2)
        return marker, tf.minimum(position + 2 + length, tf.strings.length(encoded))

    position = tf.constant(2)
    for _ in range(SEGMENTS_BEFORE_TABLES):
        marker, end = read_segment(position)
        is_application = (marker >= 0xFFE0) & (marker <= 0xFFEF)
        has_no_exif = (is_application & (marker != 0xFFE1)) | (marker == 0xFFFE)
        position = tf.where(has_no_exif, end, position)
    marker, _ = read_segment(position)
    return marker != 0xFFDB


def apply_orientation(image: tf.Tensor, orientation: tf.Tensor) -> tf.Tensor:
    """Turns and mirrors an image so that it is upright.

    Args:
        image: Stored pixels, (H, W, 3).
        orientation: EXIF orientation of the stored pixels, int32 scalar.

    Returns:
        Upright pixels, (H, W, 3) or (W, H, 3).
    """

    def is_one_of(*numbers: int) -> tf.Tensor:
        return tf.reduce_any(orientation == tf.constant(numbers))

    image = tf.cond(orientation >= 5, lambda: tf.transpose(image, (1, 0, 2)), lambda: image)
    image = tf.cond(is_one_of(3, 4, 7, 8), lambda: image[::-1], lambda: image)
    return tf.cond(is_one_of(2, 3, 6, 7), lambda: image[:, ::-1], lambda: image)


def _decode_by_pillow(encoded: bytes | np.ndarray) -> tuple[np.ndarray, bytes]:
    """Decodes the other formats, most of which TensorFlow lacks. Returns pixels, or a fault."""
    try:
        return decode_by_pillow(_to_bytes(encoded)), b""
    except ValueError as error:  # TensorFlow would print the traceback of an exception
        return np.zeros((1, 1, 3), np.uint8), str(error).encode()


def _file_orientation(encoded: bytes | np.ndarray) -> np.int32:
    return np.int32(file_orientation(_to_bytes(encoded)))


def _to_bytes(string: bytes | np.ndarray) -> bytes:
    """Converts a string from `tf.numpy_function`: bytes in a graph, an array () if eager."""
    return np.asarray(string, object).item()
