"""Pixels of image files, against Pillow's."""

import importlib
import io
import struct

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from tests.helpers.corrupt_images import CORRUPT, PHOTO
from tests.helpers.image_files import (
    FILES,
    ORIENTED,
    TURNED,
    UNUSUAL,
    broken_exif,
    encode_in_mode,
    turned,
)
from tests.helpers.tiny_data import (
    TINY_TRAIN,
    decode_by_pillow,
    encode,
    encode_with_exif,
    noise,
)
from vgg_jax.configs.colours import IMAGENET
from vgg_jax.data import decode, eval_batches, open_split, resize_and_crop, train_batches
from vgg_jax.preprocessing import MAX_DECODED_PIXELS


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


@pytest.mark.parametrize("format", ["GIF", "TIFF", "WEBP", "AVIF"])
def test_decode_prints_no_traceback(format, capfd):
    """TensorFlow prints the traceback of an exception in a Python function."""
    damaged = encode(noise(40, 50), format)[:-300]
    with pytest.raises(tf.errors.InvalidArgumentError):
        decode(tf.constant(damaged))
    dataset = tf.data.Dataset.from_tensors(damaged).map(decode)
    with pytest.raises(tf.errors.InvalidArgumentError):
        list(dataset)
    assert "Traceback" not in capfd.readouterr().err


def test_decode_exif_orientation(map_rows):
    upright = map_rows(decode, ORIENTED)
    stored = map_rows(lambda encoded: decode(encoded, exif=False), ORIENTED)
    assert [pixels.shape for pixels in upright] == [(21, 34, 3)] * 16 + [(34, 21, 3)] * 16
    for encoded, upright_pixels, stored_pixels in zip(ORIENTED, upright, stored, strict=True):
        np.testing.assert_array_equal(upright_pixels, decode_by_pillow(encoded))
        np.testing.assert_array_equal(stored_pixels, decode_by_pillow(encoded, exif=False))


@pytest.mark.parametrize("name", TURNED)
def test_decode_finds_exif_in_each_container(map_rows, name):
    (pixels,) = map_rows(decode, [TURNED[name]])
    assert pixels.shape == (50, 40, 3)
    np.testing.assert_array_equal(pixels, decode_by_pillow(TURNED[name]))
    crop = resize_and_crop(tf.constant(TURNED[name]), 40, 32, 0.5, 0.5)
    stored = resize_and_crop(tf.constant(TURNED[name]), 40, 32, 0.5, 0.5, exif=False)
    assert np.any(crop != stored)


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_decode_tiff_orientation(orientation, compression, map_rows):
    """Pillow turns a TIFF whether it is asked to or not."""
    encoded = turned("TIFF", orientation, compression=compression)
    (upright,) = map_rows(decode, [encoded])
    np.testing.assert_array_equal(upright, decode_by_pillow(encoded))
    (stored,) = map_rows(lambda encoded: decode(encoded, exif=False), [encoded])
    np.testing.assert_array_equal(stored, PHOTO)


def with_segments(encoded: bytes, markers: bytes) -> bytes:
    """Inserts segments of 60,000 bytes behind the 18 bytes of JFIF."""
    segments = [
        b"\xff%c" % marker + struct.pack(">H", 60_000) + bytes(59_998) for marker in markers
    ]
    return encoded[:20] + b"".join(segments) + encoded[20:]


# A colour profile, a comment, Photoshop's data, ….
SEGMENTS = [b"", b"\xe2", b"\xfe\xed", b"\xed\xe2\xfe", b"\xe2" * 6]


def test_decode_finds_exif_behind_other_segments(map_rows):
    files = [with_segments(encode_with_exif(6), markers) for markers in SEGMENTS]
    for encoded, pixels in zip(files, map_rows(decode, files), strict=True):
        np.testing.assert_array_equal(pixels, decode_by_pillow(encoded))
        assert pixels.shape == (34, 21, 3)


def test_decode_calls_python_only_for_exif(map_rows, monkeypatch):
    module, calls = importlib.import_module("vgg_jax.data.decode"), []

    def count(encoded):
        calls.append(encoded)
        return np.int32(1)

    monkeypatch.setattr(module, "_file_orientation", count)
    photo = encode(noise(21, 34), "JPEG")
    without = [photo, photo[:2] + photo[20:], *(with_segments(photo, m) for m in SEGMENTS[:3])]
    map_rows(decode, without)
    assert not calls
    map_rows(decode, [encode_with_exif(1)])
    assert calls


def test_decode_ignores_broken_exif(map_rows):
    upright = decode_by_pillow(encode_with_exif(1))
    for pixels in map_rows(decode, broken_exif()):
        np.testing.assert_array_equal(pixels, upright)


@pytest.mark.parametrize("name", UNUSUAL)
def test_decode_unusual_image(name):
    with Image.open(io.BytesIO(UNUSUAL[name])) as image:
        if name == "turned.jpg":
            image = image.transpose(Image.Transpose.ROTATE_270)
        if name.startswith("sixteen_bits"):
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
