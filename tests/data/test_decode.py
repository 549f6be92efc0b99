"""Pixels of image files, against Pillow's."""

import io
import itertools
import struct

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from tests.helpers.corrupt_images import CORRUPT, PHOTO
from tests.helpers.tiny_data import (
    TINY_TRAIN,
    decode_by_pillow,
    encode,
    encode_animation,
    encode_with_exif,
    noise,
)
from vgg_jax.configs.colours import IMAGENET
from vgg_jax.data import decode, eval_batches, open_split, train_batches
from vgg_jax.data.decode import MAX_DECODED_PIXELS


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
}


def test_decode_equals_pillow(map_rows):
    for name, pixels in zip(FILES, map_rows(decode, list(FILES.values())), strict=True):
        np.testing.assert_array_equal(pixels, decode_by_pillow(FILES[name]), name)


def test_decode_cmyk_jpeg(map_rows):
    """Adobe's files hold inverted CMYK. libjpeg and Pillow round colour times black differently."""
    encoded = encode_in_mode("CMYK", "JPEG", quality=95)
    assert b"Adobe" in encoded
    [pixels] = map_rows(decode, [encoded])
    np.testing.assert_allclose(pixels.astype(int), decode_by_pillow(encoded), atol=2)
    np.testing.assert_allclose(pixels.astype(int), noise(21, 34), atol=40)


def test_decode_drops_alpha(map_rows):
    rgba = np.dstack([noise(21, 34), np.arange(21 * 34).reshape(21, 34).astype(np.uint8)])
    files = [encode(rgba), encode(rgba, "WEBP", lossless=True, exact=True)]
    for pixels in map_rows(decode, files):
        np.testing.assert_array_equal(pixels, rgba[..., :3])


def test_decode_keeps_high_byte_of_16_bits(map_rows):
    deep = (np.arange(20 * 30, dtype=np.uint16) * 109).reshape(20, 30)
    [pixels] = map_rows(decode, [encode(deep)])
    np.testing.assert_array_equal(pixels, np.repeat((deep >> 8)[..., None], 3, -1))


@pytest.mark.parametrize("name", ["jpeg", "png", "webp", "gif", "bmp"])
def test_decode_truncated_file(map_rows, name):
    with pytest.raises((tf.errors.InvalidArgumentError, ValueError)):
        map_rows(decode, [FILES[name][: len(FILES[name]) // 3]])


def test_decode_refuses_bomb():
    assert MAX_DECODED_PIXELS < 20_000**2
    with pytest.raises(tf.errors.InvalidArgumentError, match="more than 178,956,970 pixels"):
        decode(tf.constant(CORRUPT["bomb.png"]))


ORIENTED = [
    encode_with_exif(*options) for options in itertools.product(range(1, 9), "<>", (True, False))
]


def test_decode_exif_orientation(map_rows):
    upright = map_rows(decode, ORIENTED)
    stored = map_rows(lambda encoded: decode(encoded, exif=False), ORIENTED)
    assert [pixels.shape for pixels in upright] == [(21, 34, 3)] * 16 + [(34, 21, 3)] * 16
    for encoded, upright_pixels, stored_pixels in zip(ORIENTED, upright, stored, strict=True):
        np.testing.assert_array_equal(upright_pixels, decode_by_pillow(encoded))
        np.testing.assert_array_equal(stored_pixels, decode_by_pillow(encoded, exif=False))


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


def test_decode_ignores_broken_exif(map_rows):
    upright = decode_by_pillow(encode_with_exif(1))
    for pixels in map_rows(decode, broken_exif()):
        np.testing.assert_array_equal(pixels, upright)


def turned_jpeg() -> bytes:
    exif = Image.Exif()
    exif[0x112] = 6
    return encode(PHOTO, "JPEG", exif=exif)


UNUSUAL = {
    "one_pixel.png": encode(noise(1, 1)),
    "line.png": encode(noise(1, 5000)),
    "column.jpg": encode(noise(5000, 1), "JPEG"),
    "sixteen_bits.png": encode(np.arange(40 * 50, dtype=np.uint16).reshape(40, 50) * 32),
    "palette.png": encode(Image.fromarray(PHOTO).quantize(16)),
    "one_bit.png": encode(Image.fromarray(PHOTO).convert("1")),
    "alpha.png": encode(np.dstack([PHOTO, noise(40, 50, 1)[..., 0]])),
    "cmyk.jpg": encode(Image.fromarray(PHOTO).convert("CMYK"), "JPEG"),
    "grey.jpg": encode(Image.fromarray(PHOTO).convert("L"), "JPEG"),
    "animated.gif": encode_animation(20, 30, "GIF"),
    "animated.webp": encode_animation(20, 30, "WEBP"),
    "a_png.jpg": encode(PHOTO),
    "turned.jpg": turned_jpeg(),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_decode_unusual_image(name):
    with Image.open(io.BytesIO(UNUSUAL[name])) as image:
        if name == "turned.jpg":
            image = image.transpose(Image.Transpose.ROTATE_270)
        if name == "sixteen_bits.png":
            expected = np.repeat((np.asarray(image) >> 8)[..., None], 3, -1)
        elif name == "alpha.png":
            expected = np.asarray(image)[..., :3]
        else:
            expected = np.asarray(image.convert("RGB"))
    pixels = decode(tf.constant(UNUSUAL[name])).numpy()
    assert pixels.shape == expected.shape
    # No standard converts CMYK to RGB. Of a grey JPEG, only the last bit of a rounding differs.
    tolerance = {"cmyk.jpg": 2, "grey.jpg": 1}.get(name, 0)
    assert np.abs(pixels.astype(int) - expected).max() <= tolerance


def test_batches_of_unusual_images(tmp_path):
    for number, (name, content) in enumerate(UNUSUAL.items()):
        class_folder = tmp_path / f"class {number % 2}\n蚂蚁"
        class_folder.mkdir(exist_ok=True)
        (class_folder / name).write_bytes(content)
    source = open_split(str(tmp_path), "train")
    count = len(UNUSUAL)
    train = train_batches(source, TINY_TRAIN, IMAGENET)
    assert sum(batch["mask"].sum() for batch in train) == TINY_TRAIN.epochs * count
    assert sum(batch["mask"].sum() for batch in eval_batches(source, TINY_TRAIN, 4)) == count
