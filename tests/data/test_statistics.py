import numpy as np
import pytest

from tests.helpers.tiny_data import decode_by_pillow, encode, encode_with_exif, indices, noise
from vgg_jax.configs.colours import ColourStatistics
from vgg_jax.data import measure_colours, open_split, open_train_val
from vgg_jax.data import statistics as statistics_module
from vgg_jax.errors import InputError


def check_measurements(measured, images):
    """Compares with numpy on all pixels at once."""
    pixels = np.concatenate([image.reshape(-1, 3) for image in images]).astype(np.float64)
    covariance = np.cov(pixels.T, bias=True)
    means = np.mean([image.mean((0, 1)) for image in images], 0)
    deviations = np.mean([image.std((0, 1)) for image in images], 0)
    assert measured.count == len(images)
    np.testing.assert_allclose(measured.pixel_mean, pixels.mean(0), rtol=1e-12)
    np.testing.assert_allclose(measured.pixel_std, pixels.std(0), rtol=1e-9)
    np.testing.assert_allclose(measured.image_mean, means, rtol=1e-12)
    np.testing.assert_allclose(measured.image_std, deviations, rtol=1e-6)
    vectors, values = measured.eigenvectors, measured.eigenvalues
    assert np.all(np.diff(values) <= 0) and np.all(vectors[np.abs(vectors).argmax(0), range(3)] > 0)
    product = vectors @ np.diag(values) @ vectors.T
    np.testing.assert_allclose(product, covariance, rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(3), atol=1e-12)


@pytest.fixture
def photos(tmp_path):
    """A folder, and its 11 images of different sizes."""
    images = [noise(5 + 3 * i, 40 - 2 * i, seed=i) // (1 + i % 3) for i in range(11)]
    for i, image in enumerate(images):
        path = tmp_path / ("a" if i < 8 else "b") / f"{i:02}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encode(image))
    return tmp_path, images


@pytest.mark.parametrize("batch_size", [4, 64])
def test_measure_colours_equals_numpy(photos, monkeypatch, batch_size):
    monkeypatch.setattr(statistics_module, "IMAGES_PER_BATCH", batch_size)
    folder, images = photos
    measured = measure_colours(open_split(str(folder), "train"), progress=False)
    check_measurements(measured, images)
    assert np.all(measured.image_std < measured.pixel_std)


def test_measure_colours_of_training_part(photos):
    folder, images = photos
    train, _ = open_train_val(str(folder), validation_fraction=0.3)
    check_measurements(measure_colours(train), [images[index] for index in indices(train)])


def test_measure_colours_ignores_exif(tmp_path):
    encoded = encode_with_exif(6)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.jpg").write_bytes(encoded)
    measured = measure_colours(open_split(str(tmp_path), "train"))
    check_measurements(measured, [decode_by_pillow(encoded, exif=False)])


def test_measure_colours_of_grey_image(tmp_path):
    grey = np.repeat(np.arange(0, 200, dtype=np.uint8).reshape(10, 20, 1), 3, -1)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.png").write_bytes(encode(grey))
    measured = measure_colours(open_split(str(tmp_path), "train"))
    np.testing.assert_allclose(measured.eigenvalues, [3 * grey[..., 0].var(), 0, 0], atol=1e-9)
    np.testing.assert_allclose(measured.eigenvectors[:, 0], np.full(3, 3**-0.5))


def test_colour_statistics_are_plain_floats(photos):
    measured = measure_colours(open_split(str(photos[0]), "train"))
    statistics = measured.statistics
    assert isinstance(statistics, ColourStatistics) and isinstance(hash(statistics), int)
    vectors = sum(statistics.eigenvectors, ())
    values = (*statistics.mean_rgb, *statistics.eigenvalues, *vectors)
    assert {type(value) for value in values} == {float}
    np.testing.assert_array_equal(statistics.eigenvectors, measured.eigenvectors)


def test_measure_colours_errors_name_the_data(photos):
    folder, _ = photos
    with pytest.raises(InputError, match="has no images"):
        measure_colours(open_train_val(str(folder), validation_fraction=0.0)[1])
    (folder / "a" / "07.png").write_bytes(encode(noise(9, 9))[:60])
    with pytest.raises(InputError, match=r"cannot decode .*07\.png"):
        measure_colours(open_split(str(folder), "train"))


def test_measure_colours_of_real_photos(shared_data, tmp_path):
    files = sorted((shared_data / "ants-bees" / "val" / "ants").iterdir())[:10]
    (tmp_path / "ants").mkdir()
    for file in files:
        (tmp_path / "ants" / file.name).symlink_to(file.resolve())
    measured = measure_colours(open_split(str(tmp_path), "train"))
    images = [decode_by_pillow(file.read_bytes(), exif=False) for file in files]
    check_measurements(measured, images)
