import io

import numpy as np
import pytest
from PIL import Image

from tests.helpers.tiny_data import encode, noise
from vgg_jax.configs.colours import ColourStatistics
from vgg_jax.data import measure_colours, open_split, open_train_val
from vgg_jax.data import statistics as statistics_module
from vgg_jax.errors import InputError


def check(measured, images):
    """Against numpy on all pixels at once."""
    pixels = np.concatenate([image.reshape(-1, 3) for image in images]).astype(np.float64)
    covariance = np.cov(pixels.T, bias=True)
    assert measured.count == len(images)
    np.testing.assert_allclose(measured.pixel_mean, pixels.mean(0), rtol=1e-12)
    np.testing.assert_allclose(measured.pixel_std, pixels.std(0), rtol=1e-9)
    np.testing.assert_allclose(
        measured.image_mean, np.mean([image.mean((0, 1)) for image in images], 0), rtol=1e-12
    )
    np.testing.assert_allclose(
        measured.image_std, np.mean([image.std((0, 1)) for image in images], 0), rtol=1e-6
    )
    vectors, values = measured.eigenvectors, measured.eigenvalues
    assert np.all(np.diff(values) <= 0) and np.all(vectors[np.abs(vectors).argmax(0), range(3)] > 0)
    np.testing.assert_allclose(
        vectors @ np.diag(values) @ vectors.T, covariance, rtol=1e-8, atol=1e-8
    )
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(3), atol=1e-12)


@pytest.fixture
def photos(tmp_path):
    images = [noise(5 + 3 * i, 40 - 2 * i, seed=i) // (1 + i % 3) for i in range(11)]
    (tmp_path / "a").mkdir()
    for i, image in enumerate(images):
        (tmp_path / "a" / f"{i:02}.png").write_bytes(encode(image))
    return tmp_path, images


@pytest.mark.parametrize("batch", [4, 64])
def test_colours_of_images_of_different_sizes(photos, monkeypatch, batch):
    monkeypatch.setattr(statistics_module, "BATCH", batch)
    folder, images = photos
    measured = measure_colours(open_split(str(folder), "train"), progress=False)
    check(measured, images)
    assert np.all(measured.image_std < measured.pixel_std)


def test_only_the_part_that_trains_is_measured(photos):
    folder, images = photos
    train, _ = open_train_val(str(folder), validation_fraction=0.3)
    check(
        measure_colours(train),
        [images[example["index"]] for example in train.examples(None, 0).as_numpy_iterator()],
    )


def test_turning_a_photo_changes_no_colour(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    encoded = encode(noise(21, 34), "JPEG", exif=exif.tobytes())
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.jpg").write_bytes(encoded)
    check(
        measure_colours(open_split(str(tmp_path), "train")),
        [np.asarray(Image.open(io.BytesIO(encoded)))],
    )


def test_grey_images_have_one_component(tmp_path):
    grey = np.repeat(np.arange(0, 200, dtype=np.uint8).reshape(10, 20, 1), 3, -1)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.png").write_bytes(encode(grey))
    measured = measure_colours(open_split(str(tmp_path), "train"))
    np.testing.assert_allclose(measured.eigenvalues, [3 * grey[..., 0].var(), 0, 0], atol=1e-9)
    np.testing.assert_allclose(measured.eigenvectors[:, 0], np.full(3, 3**-0.5))


def test_statistics_are_plain_hashable_numbers(photos):
    measured = measure_colours(open_split(str(photos[0]), "train"))
    statistics = measured.statistics
    assert isinstance(statistics, ColourStatistics) and isinstance(hash(statistics), int)
    assert {
        type(value)
        for value in (
            *statistics.mean_rgb,
            *statistics.eigenvalues,
            *sum(statistics.eigenvectors, ()),
        )
    } == {float}
    np.testing.assert_array_equal(statistics.eigenvectors, measured.eigenvectors)


def test_errors_name_the_data(photos):
    folder, _ = photos
    with pytest.raises(InputError, match="has no images"):
        measure_colours(open_train_val(str(folder), validation_fraction=0.0)[1])
    (folder / "a" / "07.png").write_bytes(encode(noise(9, 9))[:60])
    with pytest.raises(InputError, match=r"cannot decode .*07\.png"):
        measure_colours(open_split(str(folder), "train"))


def test_real_photos(shared_data, tmp_path):
    files = sorted((shared_data / "ants-bees" / "val" / "ants").iterdir())[:10]
    (tmp_path / "ants").mkdir()
    for file in files:
        (tmp_path / "ants" / file.name).symlink_to(file.resolve())
    check(
        measure_colours(open_split(str(tmp_path), "train")),
        [np.asarray(Image.open(file).convert("RGB")) for file in files],
    )
