import io
import itertools
import struct

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageOps

from tests.helpers.tiny_data import SEED, encode, noise
from vgg_jax.configs.colours import IMAGENET, ColourStatistics
from vgg_jax.configs.train import TrainConfig
from vgg_jax.data.decode import decode
from vgg_jax.data.transforms import (
    eval_example,
    flip,
    resize_and_crop,
    resize_shorter_side,
    sample_augmentation,
    train_example,
)

TINY = TrainConfig(image_size=32, scale=(32, 40))


def eagerly(function, *columns):
    return [
        tf.nest.map_structure(lambda tensor: tensor.numpy(), function(*map(tf.constant, row)))
        for row in zip(*columns, strict=True)
    ]


def mapped(function, *columns):
    rows = tf.data.Dataset.from_tensor_slices(tuple(map(tf.constant, columns)))
    return list(rows.map(function).as_numpy_iterator())


@pytest.fixture(params=[eagerly, mapped])
def run(request):
    """Calls a function of one example for each row of some columns."""
    return request.param


def pillow(encoded: bytes) -> np.ndarray:
    return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(encoded))).convert("RGB"))


def as_mode(mode: str, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(noise(21, 34)).convert(mode).save(buffer, format, **options)
    return buffer.getvalue()


def animated(format: str) -> bytes:
    buffer = io.BytesIO()
    frames = [Image.fromarray(noise(21, 34, seed)) for seed in range(3)]
    frames[0].save(buffer, format, save_all=True, append_images=frames[1:], lossless=True)
    return buffer.getvalue()


def palette_with_alpha() -> bytes:
    return as_mode("P", "PNG", transparency=3)


FILES = {
    "jpeg": as_mode("RGB", "JPEG"),
    "jpeg 4:4:4": as_mode("RGB", "JPEG", subsampling=0),
    "progressive jpeg": as_mode("RGB", "JPEG", progressive=True),
    "grey jpeg": as_mode("L", "JPEG"),
    "png": as_mode("RGB", "PNG"),
    "grey png": as_mode("L", "PNG"),
    "palette png": as_mode("P", "PNG"),
    "4-bit palette png": as_mode("P", "PNG", bits=4),
    "1-bit png": as_mode("1", "PNG"),
    "transparent palette png": palette_with_alpha(),
    "bmp": as_mode("RGB", "BMP"),
    "palette bmp": as_mode("P", "BMP"),
    "grey bmp": as_mode("L", "BMP"),
    "webp": as_mode("RGB", "WEBP"),
    "animated webp": animated("WEBP"),
    "gif": as_mode("P", "GIF"),
    "animated gif": animated("GIF"),
}


def test_pixels_equal_pillows(run):
    for name, pixels in zip(FILES, run(decode, list(FILES.values())), strict=True):
        np.testing.assert_array_equal(pixels, pillow(FILES[name]), name)


def test_cmyk_jpeg(run):
    """Adobe's files hold inverted CMYK. libjpeg and Pillow round the product of colour and black in different ways."""
    encoded = as_mode("CMYK", "JPEG", quality=95)
    assert b"Adobe" in encoded
    [pixels] = run(decode, [encoded])
    np.testing.assert_allclose(pixels.astype(int), pillow(encoded), atol=2)
    np.testing.assert_allclose(pixels.astype(int), noise(21, 34), atol=40)


def test_alpha_is_dropped(run):
    rgba = np.dstack([noise(21, 34), np.arange(21 * 34).reshape(21, 34).astype(np.uint8)])
    for pixels in run(decode, [encode(rgba), encode(rgba, "WEBP", lossless=True, exact=True)]):
        np.testing.assert_array_equal(pixels, rgba[..., :3])


def test_16_bit_png_keeps_the_high_byte(run):
    deep = (np.arange(20 * 30, dtype=np.uint16) * 109).reshape(20, 30)
    np.testing.assert_array_equal(
        run(decode, [encode(deep)])[0], np.repeat((deep >> 8)[..., None], 3, -1)
    )


def exif_jpeg(orientation: int, byte_order: str = "<", jfif: bool = True) -> bytes:
    """By hand: the directory has a text, which lies behind it, and the orientation, a short."""
    directory = struct.pack(
        f"{byte_order}HHHIIHHIHHI", 2, 0x010F, 2, 9, 38, 0x0112, 3, 1, orientation, 0, 0
    )
    magic = {"<": b"II*\0", ">": b"MM\0*"}[byte_order] + struct.pack(f"{byte_order}I", 8)
    encoded = encode(
        noise(21, 34), "JPEG", quality=95, exif=b"Exif\0\0" + magic + directory + b"a camera\0"
    )
    assert encoded[2:4] == b"\xff\xe0" and b"JFIF" in encoded[:20]
    return encoded if jfif else encoded[:2] + encoded[20:]


ORIENTED = [exif_jpeg(*each) for each in itertools.product(range(1, 9), "<>", (True, False))]


def test_exif_orientation(run):
    turned, plain = run(decode, ORIENTED), run(lambda data: decode(data, exif=False), ORIENTED)
    assert [pixels.shape for pixels in turned] == [(21, 34, 3)] * 16 + [(34, 21, 3)] * 16
    for encoded, upright, stored in zip(ORIENTED, turned, plain, strict=True):
        np.testing.assert_array_equal(upright, pillow(encoded))
        np.testing.assert_array_equal(stored, np.asarray(Image.open(io.BytesIO(encoded))))


def test_crops_are_upright_too(run):
    for encoded, crop in zip(
        ORIENTED, run(lambda data: resize_and_crop(data, 40, 32, 0.2, 0.9), ORIENTED), strict=True
    ):
        assert np.abs(crop - crop_of(pillow(encoded), 40, 32, 0.2, 0.9).astype(float)).max() <= 3


def broken_exif():
    whole = exif_jpeg(6)
    start = whole.index(b"Exif\0\0") + 6
    yield (
        whole[: start + 4] + struct.pack("<I", 10**9) + whole[start + 8 :]
    )  # the directory outside the file
    yield whole[:start] + b"XX" + whole[start + 2 :]  # no byte order
    yield (
        whole[: start + 8]
        + struct.pack("<H", 65535)
        + whole[start + 10 :].replace(struct.pack("<H", 0x112), b"\0\0", 1)
    )  # endless
    yield exif_jpeg(9)  # no such orientation
    yield encode(noise(21, 34), "JPEG", quality=95, comment=b"Exif\0\0")


def test_broken_exif_is_no_orientation(run):
    for pixels in run(decode, list(broken_exif())):
        np.testing.assert_array_equal(pixels, np.asarray(Image.open(io.BytesIO(exif_jpeg(1)))))


def crop_of(image: np.ndarray, scale: int, size: int, y: float, x: float) -> np.ndarray:
    """Pillow: rescale the shorter side to `scale`, then cut."""
    height, width = (round(side * scale / min(image.shape[:2])) for side in image.shape[:2])
    top, left = (
        min(int(f * (side - size + 1)), side - size) for f, side in ((y, height), (x, width))
    )
    rescaled = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
    return rescaled[top : top + size, left : left + size]


PLACES = [(0.0, 0.0), (0.5, 0.5), (0.999, 0.3), (1.0, 1.0)]
SIDES = [(100, 140), (140, 101), (32, 32), (8, 8), (333, 90), (1, 1), (1, 500), (500, 1)]


def test_crop_is_pillows_rescaled_and_cut(run):
    rng = np.random.default_rng(0)
    images = [
        rng.integers(0, 256, (*sides, 3), np.uint8) for sides in SIDES
    ]  # the hardest case: no pixel is like its neighbours
    cases = list(itertools.product(range(len(images)), (32, 45, 64), PLACES))
    columns = (
        [encode(images[i]) for i, _, _ in cases],
        [scale for _, scale, _ in cases],
        *np.array([place for *_, place in cases]).T,
    )
    crops = run(lambda data, scale, y, x: resize_and_crop(data, scale, 32, y, x), *columns)
    for (i, scale, place), crop in zip(cases, crops, strict=True):
        difference = np.abs(crop - crop_of(images[i], scale, 32, *place).astype(float))
        assert difference.max() <= 1, (SIDES[i], scale, place)  # Pillow resamples in fixed point


def test_crop_decoded_in_part(run):
    files = [
        encode(np.asarray(Image.fromarray(noise(150, 203)).convert(mode)), "JPEG", quality=90)
        for mode in ("RGB", "L")
    ]
    files.append(encode_cmyk(noise(150, 203)))
    cases = list(itertools.product(files, (64, 100, 256), PLACES))
    columns = (
        [data for data, _, _ in cases],
        [scale for _, scale, _ in cases],
        *np.array([place for *_, place in cases]).T,
    )
    crops = run(lambda data, scale, y, x: resize_and_crop(data, scale, 64, y, x), *columns)
    for (data, scale, place), crop in zip(cases, crops, strict=True):
        difference = np.abs(crop - crop_of(pillow(data), scale, 64, *place).astype(float))
        assert difference.mean() < 0.5 and difference.max() <= 3, (scale, place)


def encode_cmyk(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert("CMYK").save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def test_extreme_sides(run):
    files = [encode(np.full((*sides, 3), 77, np.uint8)) for sides in ((1, 5000), (5000, 1), (1, 1))]
    for fraction in (0.0, 0.999):
        assert np.all(
            np.array(run(lambda data, f=fraction: resize_and_crop(data, 256, 224, f, f), files))
            == 77
        )


def test_a_crop_of_the_size_of_the_image_is_the_image(run):
    image = noise(32, 32)
    np.testing.assert_array_equal(
        run(lambda data: resize_and_crop(data, 32, 32, 0.7, 0.1), [encode(image)])[0], image
    )


def test_uniform_fractions_pick_every_offset_alike():
    image = np.broadcast_to(np.arange(36, dtype=np.uint8)[:, None, None], (36, 36, 3)).copy()
    crops = tf.data.Dataset.from_tensor_slices(np.arange(0.005, 1, 0.01)).map(
        lambda y: resize_and_crop(encode(image), 36, 32, y, 0.0)
    )
    tops = [crop[0, 0, 0] for crop in crops.as_numpy_iterator()]
    assert np.bincount(tops).tolist() == [20] * 5


def test_rescale(run):
    image, scales = noise(50, 71), [20, 50, 99]
    for scale, ours in zip(
        scales,
        run(lambda scale: resize_shorter_side(tf.constant(image), scale), scales),
        strict=True,
    ):
        reference = np.asarray(
            Image.fromarray(image).resize(
                (round(71 * scale / 50), scale), Image.Resampling.BILINEAR
            )
        ).astype(float)
        assert ours.dtype == np.uint8 and np.abs(ours - reference).max() <= 1


def test_flip(run):
    image = noise(5, 6)
    mirrored, same = run(lambda coin: flip(tf.constant(image), coin), [True, False])
    np.testing.assert_array_equal(mirrored, np.asarray(ImageOps.mirror(Image.fromarray(image))))
    np.testing.assert_array_equal(same, image)


@pytest.fixture(scope="module")
def draws():
    """5,000 draws: scale in 32..36, deviations of colour."""
    config = TrainConfig(image_size=32, scale=(32, 36))
    return next(
        tf.data.Dataset.range(5000)
        .batch(5000)
        .map(lambda i: sample_augmentation(SEED, i, config, IMAGENET))
        .as_numpy_iterator()
    )


def test_draws_are_the_same_one_by_one(draws):
    config = TrainConfig(image_size=32, scale=(32, 36))
    for i in (0, 1, 4999):
        for one, all_of_them in zip(
            sample_augmentation(SEED, tf.constant(i, tf.int64), config, IMAGENET),
            draws,
            strict=True,
        ):
            np.testing.assert_array_equal(one, all_of_them[i])


def test_draws_of_neighbours_and_of_epochs_are_independent(draws):
    """What follows in the order of the images, and what the same image draws under the next seed."""
    later = sample_augmentation(
        SEED + tf.constant([0, 1], tf.int64),
        tf.range(5000, dtype=tf.int64),
        TrainConfig(image_size=32, scale=(32, 36)),
        IMAGENET,
    )
    for name in ("y_fraction", "x_fraction"):
        ours, theirs = getattr(draws, name), getattr(later, name).numpy()
        assert (
            abs(np.corrcoef(ours[1:], ours[:-1])[0, 1]) < 0.05
            and abs(np.corrcoef(ours, theirs)[0, 1]) < 0.05
        )
        cells = np.histogram2d(ours[1:], ours[:-1], 10, [[0, 1], [0, 1]])[0]
        assert (
            (cells - 50) ** 2 / 50
        ).sum() < 150  # chi-squared with 99 degrees of freedom: 3.6 deviations


def test_draws_are_uniform(draws):
    assert sorted(set(draws.scale.tolist())) == [32, 33, 34, 35, 36]
    np.testing.assert_allclose(np.bincount(draws.scale)[32:] / 5000, 0.2, atol=0.03)
    for fraction in (draws.y_fraction, draws.x_fraction):
        assert fraction.min() >= 0 and fraction.max() < 1
        np.testing.assert_allclose(np.histogram(fraction, 5, (0, 1))[0] / 5000, 0.2, atol=0.03)
    assert abs(draws.flip.mean() - 0.5) < 0.03
    columns = np.stack(
        [draws.scale, draws.y_fraction, draws.x_fraction, draws.flip, *draws.colour_shift.T[:1]]
    )
    np.testing.assert_allclose(np.corrcoef(columns), np.eye(5), atol=0.06)


def test_colour_shift_is_alpha_along_the_components(draws):
    """Krizhevsky: p1 alpha1 λ1 + …; the first component's deviation is 11.9 levels (MatConvNet's 0.1 · √0.2175 · 255)."""
    vectors = np.array(IMAGENET.eigenvectors)
    along = draws.colour_shift @ np.linalg.inv(vectors).T
    np.testing.assert_allclose(
        along.std(0), [0.1 * 255 * np.sqrt(value) for value in (0.2175, 0.0188, 0.0045)], rtol=0.04
    )
    np.testing.assert_allclose(along.mean(0) / along.std(0), 0, atol=0.05)
    np.testing.assert_allclose(np.corrcoef(along.T), np.eye(3), atol=0.05)


def test_colour_convention_and_strength(run):
    statistics = ColourStatistics(
        (0.0, 0.0, 0.0), (400.0, 100.0, 25.0), ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
    )

    def shift(**options):
        config = TrainConfig(image_size=32, scale=(32,), **options)
        [drawn] = run(
            lambda index: sample_augmentation(SEED, index, config, statistics), np.array([2])
        )
        return drawn.colour_shift

    alpha = shift() / [20, 10, 5]
    np.testing.assert_allclose(
        shift(colour_convention="variance"), alpha * [400 / 255, 100 / 255, 25 / 255], rtol=1e-5
    )
    np.testing.assert_allclose(shift(colour_shift=0.2), shift() * 2, rtol=1e-6)
    assert shift(colour_shift=0.0).tolist() == [0, 0, 0]


def test_no_flip_and_one_scale():
    config = TrainConfig(image_size=32, scale=(40,), flip=False)
    drawn = sample_augmentation(SEED, tf.range(20, dtype=tf.int64), config, IMAGENET)
    assert set(drawn.scale.numpy()) == {40} and not drawn.flip.numpy().any()


def test_train_example_is_made_of_its_draws(run):
    def example_of(data, label):
        return train_example(
            {"encoded": data, "label": label},
            TINY,
            sample_augmentation(SEED, tf.cast(label, tf.int64), TINY, IMAGENET),
        )

    for i, example in enumerate(run(example_of, [encode(noise(60, 50))] * 6, list(range(6)))):
        drawn = sample_augmentation(SEED, tf.constant(i, tf.int64), TINY, IMAGENET)
        reference = crop_of(
            noise(60, 50), int(drawn.scale), 32, float(drawn.y_fraction), float(drawn.x_fraction)
        ).astype(float)
        reference = reference[:, ::-1] if drawn.flip else reference
        assert (
            example.keys() == {"label", "image", "colour_shift"}
            and example["image"].dtype == np.uint8
            and example["label"] == i
        )
        assert np.abs(example["image"] - reference).max() <= 1
        np.testing.assert_allclose(example["colour_shift"], drawn.colour_shift, rtol=1e-5)


def test_eval_example_is_the_centre_crop_in_the_middle_of_the_range(run):
    [example] = run(
        lambda data, label: eval_example({"encoded": data, "label": label}, TINY),
        [encode(noise(60, 50))],
        [3],
    )
    assert (
        np.abs(example["image"] - crop_of(noise(60, 50), 36, 32, 0.5, 0.5).astype(float)).max() <= 1
    )
    assert example["colour_shift"].tolist() == [0, 0, 0] and example["label"] == 3
    assert TrainConfig(scale=(256, 512)).test_scale == 384  # Table 3
    assert TrainConfig(scale=(384,)).test_scale == 384


@pytest.mark.parametrize("name", ["jpeg", "png", "webp", "gif", "bmp"])
def test_half_an_image_is_an_error(run, name):
    with pytest.raises((tf.errors.InvalidArgumentError, ValueError)):
        run(decode, [FILES[name][: len(FILES[name]) // 3]])
