"""The input of a net without TensorFlow, against the pixels of TensorFlow's evaluation."""

import io

import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageOps

import vgg_jax
from tests.helpers.corrupt_images import CORRUPT
from tests.helpers.image_files import FILES, ORIENTED, TURNED, UNUSUAL, broken_exif
from tests.helpers.tiny_data import encode, encode_with_exif, noise
from vgg_jax import InputError
from vgg_jax.configs.train import TrainConfig
from vgg_jax.data import decode, eval_batches, open_split, resize_and_crop, resize_shorter_side
from vgg_jax.errors import DataError
from vgg_jax.preprocessing import centre_offset, load_resized

MEAN = (123.0, 117.5, 104.25)
SIDES = [(100, 140), (140, 101), (32, 32), (8, 8), (333, 90), (1, 1), (1, 500), (500, 1)]


def describe(size=32, scale=40, exif=True, **more):
    """Metadata as of a net of `size` pixels."""
    fields = {"mean_rgb": MEAN, "image_size": size, "scale": scale, "exif": exif}
    return {"preprocessing": fields | more}


def torchvision_crop(pixels, scale, size):
    """The crop of `Resize(scale)` and `CenterCrop(size)`, int (size, size, 3).

    The sides are those of `_compute_resized_output_size`, the corner that of `center_crop`, in
    torchvision/transforms/functional.py of 0.28. timm calls both.
    """
    height, width = pixels.shape[:2]
    short, long = min(height, width), max(height, width)
    new_short, new_long = scale, int(scale * long / short)
    sides = (new_short, new_long) if width <= height else (new_long, new_short)
    resized = Image.fromarray(pixels).resize(sides, Image.Resampling.BILINEAR)
    top = round((resized.height - size) / 2.0)
    left = round((resized.width - size) / 2.0)
    return np.asarray(resized.crop((left, top, left + size, top + size))).astype(int)


def to_levels(images):
    """The pixels before the mean is subtracted, int (N, H, W, 3)."""
    levels = np.float64(images) + MEAN
    np.testing.assert_allclose(levels, np.round(levels), atol=1e-4)
    return np.round(levels).astype(int)


def evaluation_crop(encoded, size=32, scale=40, exif=True):
    """The centre crop of `vgg-jax evaluate --protocol center`, int (size, size, 3)."""
    image = resize_shorter_side(decode(tf.constant(encoded), exif), scale).numpy()
    y, x = (centre_offset(side, size, "nearest") for side in image.shape[:2])
    return image[y : y + size, x : x + size].astype(int)


def write(folder, contents):
    """Writes files of these contents, and returns their paths."""
    paths = [folder / f"{number}.bin" for number in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    return paths


def open_image(path):
    """A PIL image that keeps no file open."""
    return Image.open(io.BytesIO(path.read_bytes()))


def check_against_evaluation(paths, metadata):
    """At most one level of difference, by paths and by PIL images. Returns the fraction."""
    images = [open_image(path) for path in paths]
    results = [to_levels(vgg_jax.preprocess(source, metadata)) for source in (paths, images)]
    np.testing.assert_array_equal(*results)
    fields = metadata["preprocessing"]
    settings = {name: fields[name] for name in ("scale", "exif")} | {"size": fields["image_size"]}
    expected = [evaluation_crop(path.read_bytes(), **settings) for path in paths]
    differences = np.abs(results[0] - np.array(expected))
    for path, difference in zip(paths, differences, strict=True):
        assert difference.max() <= 1, path
    return (differences > 0).mean()


def test_preprocess_formats(tmp_path):
    """JPEG, PNG, BMP, WebP and GIF; grey, palettes, alpha, 16 bits, animations, CMYK."""
    lines = ("line.png", "column.jpg")  # too large for the evaluation at the scale
    unusual = [content for name, content in UNUSUAL.items() if name not in lines]
    paths = write(tmp_path, [*FILES.values(), *unusual])
    assert check_against_evaluation(paths, describe()) < 0.01


def test_preprocess_palette_with_several_alphas(tmp_path):
    """Pillow would warn that RGB cannot have them."""
    photo = Image.fromarray(noise(40, 60)).quantize(16)
    paths = write(tmp_path, [encode(photo, transparency=bytes(range(0, 256, 16)))])
    assert check_against_evaluation(paths, describe()) < 0.01


def test_preprocess_cmyk_jpeg(tmp_path):
    """Adobe's files hold inverted inks, others do not."""
    inks = [Image.fromarray(noise(21, 34, seed)[..., 0]) for seed in range(4)]  # black too
    adobe = encode(Image.merge("CMYK", inks), "JPEG", quality=95)
    start = adobe.index(b"\xff\xee")
    plain = adobe[:start] + adobe[start + 2 + int.from_bytes(adobe[start + 2 : start + 4]) :]
    paths = write(tmp_path, [adobe, plain])
    assert check_against_evaluation(paths, describe()) == 0
    first, second = to_levels(vgg_jax.preprocess(paths, describe()))
    assert np.abs(first - second).mean() > 50


@pytest.mark.parametrize("exif", [True, False])
def test_preprocess_exif_orientation(tmp_path, exif):
    files = [*ORIENTED, *broken_exif()]
    paths = write(tmp_path, files)
    metadata = describe(exif=exif)
    expected = [evaluation_crop(encoded, exif=exif) for encoded in files]
    levels = to_levels(vgg_jax.preprocess(paths, metadata))
    assert np.abs(levels - np.array(expected)).max() <= 1
    assert len({level.tobytes() for level in levels[: len(ORIENTED)]}) == (8 if exif else 1)
    images = [Image.open(io.BytesIO(encoded)) for encoded in ORIENTED]
    for variant in (images, [image.convert("RGB") for image in images]):
        np.testing.assert_array_equal(
            to_levels(vgg_jax.preprocess(variant, metadata)), levels[: len(ORIENTED)]
        )
    if exif:
        upright = [ImageOps.exif_transpose(image) for image in images]
        np.testing.assert_array_equal(
            to_levels(vgg_jax.preprocess(upright, metadata)), levels[: len(ORIENTED)]
        )


@pytest.mark.parametrize("name", TURNED)
def test_preprocess_finds_exif_in_each_container(tmp_path, name):
    paths = write(tmp_path, [TURNED[name]])
    assert check_against_evaluation(paths, describe()) < 0.01
    expected = vgg_jax.preprocess([ImageOps.exif_transpose(open_image(paths[0]))], describe())
    for image in (paths[0], open_image(paths[0])):
        np.testing.assert_array_equal(vgg_jax.preprocess([image], describe()), expected)
    stored = vgg_jax.preprocess(paths, describe(exif=False))
    assert np.abs(to_levels(stored) - evaluation_crop(TURNED[name], exif=False)).max() <= 1
    assert np.any(stored != expected)


def test_preprocess_arrays():
    """The hardest case: no pixel is like its neighbours."""
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 256, (*sides, 3), np.uint8) for sides in SIDES]
    for scale in (32, 45, 60):
        levels = to_levels(vgg_jax.preprocess(arrays, describe(scale=scale)))
        for array, level in zip(arrays, levels, strict=True):
            encoded = encode(array)
            expected = evaluation_crop(encoded, scale=scale)
            crop = resize_and_crop(tf.constant(encoded), scale, 32, 0.5, 0.5).numpy()
            assert np.abs(level - expected).max() <= 1, (array.shape, scale)
            assert np.abs(level - crop).max() <= 1, (array.shape, scale)


def test_preprocess_equals_eval_batches(tmp_path):
    """The validation of a training run."""
    for i, sides in enumerate(((50, 71), (71, 50), (20, 30), (32, 32))):
        folder = tmp_path / "train" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(*sides, i)).save(folder / f"{i}.png")
    source = open_split(str(tmp_path), "train")
    config = TrainConfig(image_size=32, scale=(36, 44))
    [batch] = eval_batches(source, config, 4)
    paths = [source.file_name(int(index)) for index in batch["index"]]
    levels = to_levels(vgg_jax.preprocess(paths, describe()))
    assert np.abs(levels - batch["image"]).max() <= 1


def test_preprocess_extreme_sides_take_little_memory():
    """At the scale, a line of 5,000 pixels would have 328,000,000 of them."""
    arrays = [np.full((*sides, 3), 77, np.uint8) for sides in ((1, 5000), (5000, 1))]
    levels = to_levels(vgg_jax.preprocess(arrays, describe(224, 256)))
    assert np.all(levels == 77)


def test_preprocess_one_list_and_batch(tmp_path):
    pixels = noise(50, 60)
    [path] = write(tmp_path, [encode(pixels)])
    [expected] = vgg_jax.preprocess([path], describe())
    assert expected.dtype == np.float32 and expected.shape == (32, 32, 3)
    one = (path, str(path), pixels, Image.fromarray(pixels), jnp.asarray(pixels), pixels[None])
    for image in one:
        np.testing.assert_array_equal(vgg_jax.preprocess(image, describe())[0], expected)
    batch = np.stack([pixels, pixels[::-1]])
    mixed = [str(path), Image.fromarray(pixels[::-1])]
    np.testing.assert_array_equal(
        vgg_jax.preprocess(batch, describe()), vgg_jax.preprocess(mixed, describe())
    )
    assert vgg_jax.preprocess([], describe()).shape == (0, 32, 32, 3)


def test_preprocess_rejects_bad_input(tmp_path):
    pixels = noise(50, 60)
    for metadata in (None, [pixels]):
        with pytest.raises(InputError, match=r"the metadata are a .*: expected the dict that"):
            vgg_jax.preprocess([pixels], metadata)
    for images, message in (
        (pixels / 255, r"image 0 is float64 \(50, 60, 3\): expected uint8 RGB"),
        (pixels[..., 0], r"image 0 is uint8 \(50, 60\): expected"),
        (pixels[..., :1], r"image 0 is uint8 \(50, 60, 1\): expected"),
        ([pixels, np.dstack([pixels, pixels])], r"image 1 is uint8 \(50, 60, 6\): expected"),
        ([pixels[None]], r"image 0 is uint8 \(1, 50, 60, 3\): expected"),
        (pixels[:0], r"image 0 is uint8 \(0, 60, 3\): expected"),
        (7, "images is a int: expected the path"),
        ([pixels.tolist()], "image 0 is a list: expected the path"),
        (Image.fromarray(np.float32(pixels[..., 0])), r"cannot decode image 0: .*32 bits"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            vgg_jax.preprocess(images, describe())
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"no mean_rgb, .*exif: expected .* vgg_jax\.load returns"):
        vgg_jax.preprocess(pixels, describe()["preprocessing"])
    grey = {"preprocessing": describe()["preprocessing"] | {"mean_rgb": (117.0,)}}
    with pytest.raises(InputError, match="mean_rgb has 1 values: expected 3"):
        vgg_jax.preprocess(pixels, grey)
    with pytest.raises(InputError, match=r"scale is 31: expected at least .* 32"):
        vgg_jax.preprocess(pixels, describe(scale=31))
    with pytest.raises(InputError, match=r"scale is None: expected the length of the shorter"):
        vgg_jax.preprocess(pixels, describe(scale=None))


BAD = {
    **{name: content for name, content in CORRUPT.items() if name != "bomb.png"},
    "empty.jpg": b"",
    "text.jpg": b"no image",
    "head.jpg": encode_with_exif(6)[:30],
}


@pytest.mark.parametrize("name", BAD)
def test_preprocess_names_corrupt_file(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(BAD[name])
    with pytest.raises(DataError, match=f"cannot decode '.*{name}': .") as caught:
        vgg_jax.preprocess(path, describe())
    assert "\n" not in str(caught.value)


def test_preprocess_names_unreadable_file(tmp_path):
    (tmp_path / "bomb.png").write_bytes(CORRUPT["bomb.png"])
    for path, message in (
        (tmp_path / "missing.jpg", "cannot read .*missing.jpg': No such file"),
        (tmp_path, "cannot read .*: Is a directory"),
        ("a\0b", "cannot read 'a.*b': embedded null"),
        (tmp_path / "bomb.png", "bomb.png': it has more than 178,956,970 pixels"),
    ):
        with pytest.raises(DataError, match=message):
            vgg_jax.preprocess(path, describe())
    with pytest.raises(DataError, match="cannot decode image 0: "):
        vgg_jax.preprocess(Image.open(io.BytesIO(CORRUPT["cut.png"])), describe())


def variants(photo):
    """A photo in other modes, in another format, and turned on its side or head."""
    for mode, format in (("L", "JPEG"), ("CMYK", "JPEG"), ("RGB", "PNG"), ("RGB", "WEBP")):
        yield encode(photo.convert(mode), format)
    for orientation in (3, 6):
        exif = Image.Exif()
        exif[0x112] = orientation
        yield encode(photo, "JPEG", exif=exif)


@pytest.mark.slow
def test_preprocess_real_photos(shared_data, tmp_path):
    patterns = ("imagenet-sample/*/*", "ants-bees/val/*/*")
    paths = [path for pattern in patterns for path in sorted(shared_data.glob(pattern))[::25]]
    sides = np.array([open_image(path).size for path in paths])
    landscape, portrait = paths[np.argmax(sides @ [1, -1])], paths[np.argmin(sides @ [1, -1])]
    for number, path in enumerate((landscape, portrait)):
        folder = tmp_path / str(number)
        folder.mkdir()
        paths += write(folder, list(variants(open_image(path))))
    for size, scale in ((224, 256), (384, 512)):  # some photos are smaller
        assert check_against_evaluation(paths, describe(size, scale)) < 1e-3
    levels = to_levels(vgg_jax.preprocess(paths, describe(224, 256)))
    for path, level in zip(paths, levels, strict=True):
        crop = resize_and_crop(tf.constant(path.read_bytes()), 256, 224, 0.5, 0.5).numpy()
        assert np.abs(level - crop).max() <= 1, path


def test_load_resized_equals_evaluation(tmp_path):
    scales = (20, 50, 99)
    for path in write(tmp_path, [encode(noise(50, 71)), encode_with_exif(6)]):
        images = load_resized(path, scales, True)
        for scale, image in zip(scales, images, strict=True):
            pixels = decode(tf.constant(path.read_bytes()))
            expected = resize_shorter_side(pixels, scale).numpy()
            assert image.shape == expected.shape and image.dtype == np.uint8
            assert np.abs(image.astype(int) - expected).max() <= 1


def test_preprocess_crops_as_torchvision():
    """A shift by one pixel of noise would be dozens of levels; Pillow's own rounding is one."""
    rng = np.random.default_rng(0)
    differs = 0
    for height, width in [(33, 50), (50, 33), (37, 37), *rng.integers(8, 90, (40, 2))]:
        pixels = noise(height, width)
        expected = torchvision_crop(pixels, 41, 32)
        [level] = to_levels(vgg_jax.preprocess(pixels, describe(32, 41, rounding="torchvision")))
        assert np.abs(level - expected).max() <= 1, (height, width)
        [nearest] = to_levels(vgg_jax.preprocess(pixels, describe(32, 41)))
        differs += np.abs(nearest - expected).max() > 1
    assert differs > 20


def test_preprocess_rejects_unknown_rounding():
    with pytest.raises(InputError, match="rounding is 'up': expected one of nearest, torchvision"):
        vgg_jax.preprocess(noise(40, 40), describe(rounding="up"))
