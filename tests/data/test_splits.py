import numpy as np
import pytest
import tensorflow as tf

from tests.helpers.tiny_data import encode, indices, list_examples, noise
from vgg_jax.data import open_train_val, sources
from vgg_jax.data.splits import epoch_seeds, permute_indices
from vgg_jax.errors import InputError


def epoch_order(epoch, size):
    seed, _ = epoch_seeds(0, tf.constant(epoch, tf.int64))
    return permute_indices(tf.range(size, dtype=tf.int64), seed, size).numpy()


def test_permute_indices_is_as_random_as_numpy():
    """Unlike tf.random.experimental.index_shuffle, whose orders repeat and correlate."""
    size, epochs = 45000, 20
    orders = np.stack([epoch_order(epoch, size) for epoch in range(epochs)])
    assert all(len(set(order)) == size for order in orders)
    bound = 5 / np.sqrt(size)
    assert np.abs(np.corrcoef(orders) - np.eye(epochs)).max() < bound
    assert max(abs(np.corrcoef(order[:-1], order[1:])[0, 1]) for order in orders) < bound
    # Two classes in sorted folders: the images of the first one in batches of 32.
    is_first_class = orders[:, : size // 32 * 32] < size // 2
    in_batch = is_first_class.reshape(-1, 32).sum(1)
    assert abs(in_batch.var() / (32 / 4) - 1) < 0.05


def test_permute_indices_of_short_sequences():
    seven = {tuple(epoch_order(epoch, 7)) for epoch in range(300)}
    assert len(seven) > 280  # of 5,040 orders, drawn 300 times: 291 expected
    one = permute_indices(tf.constant([0], tf.int64), tf.constant([1, 2], tf.int64), 1)
    assert one.numpy().tolist() == [0]


def test_division_of_version_1_is_frozen():
    """A resumed run must not validate on its training images, whatever the version of numpy.

    The list was printed once.
    """
    validation = open_train_val("digits", seed=0, version=1)[1]
    assert indices(validation)[:5] == [10, 17, 26, 32, 36]


def write_images(root, counts):
    for name, count in counts.items():
        (root / name).mkdir()
        for i in range(count):
            (root / name / f"{i}.png").write_bytes(encode(noise(4, 4, i)))
    return str(root)


def labels_of(source):
    return [int(example["label"]) for example in list_examples(source)]


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["digits", "folder", "tfrecord", "array_record"])
def test_classes_are_held_out_alike(storage, tmp_path, request):
    data, folder = storage, None
    if storage == "folder":
        data = write_images(tmp_path, {"a": 10, "b": 20, "c": 7})
    elif storage != "digits":
        data, folder = "numbers", request.getfixturevalue("prepared")[storage]
    for seed in range(3):
        train, validation = open_train_val(
            data, data_dir=folder, seed=seed, validation_fraction=0.3
        )
        counts, held_out = (np.bincount(labels_of(source)) for source in (train, validation))
        assert np.all(np.abs(held_out - 0.3 * (counts + held_out)) < 1)


def test_images_left_out_are_not_divided(tmp_path):
    data = write_images(tmp_path, {"a": 10, "b": 10})
    exclude = [f"a/{i}.png" for i in range(8)]
    train, validation = open_train_val(data, exclude=exclude, validation_fraction=0.5)
    assert np.bincount(labels_of(train)).tolist() == [1, 5]
    assert np.bincount(labels_of(validation)).tolist() == [1, 5]


def test_classes_without_validation_images_are_reported(tmp_path, caplog):
    data = write_images(tmp_path, {"a": 10, "b": 1})
    train, validation = open_train_val(data)
    assert (set(labels_of(train)), labels_of(validation)) == ({0, 1}, [0])
    assert "1 of the 2 classes of" in caplog.text and "for example 'b', which has 1" in caplog.text
    caplog.clear()
    open_train_val(data, version=1)
    assert not caplog.text


def test_division_of_few_images(tmp_path):
    data = write_images(tmp_path, {"a": 1, "b": 1})
    sources = open_train_val(data, validation_fraction=0.0)
    assert [source.size for source in sources] == [2, 0]
    with pytest.raises(InputError, match=r"no image of .* can be held out"):
        open_train_val(data)
    (tmp_path / "a" / "2.png").write_bytes(encode(noise(4, 4)))
    sources = open_train_val(data, validation_fraction=0.01)
    assert [source.size for source in sources] == [2, 1]


def test_large_records_are_divided_at_random(prepared, monkeypatch, caplog):
    """Their labels are not read."""
    caplog.set_level("INFO")
    monkeypatch.setattr(sources, "MAX_BYTES_IN_MEMORY", 1)
    open_train_val("numbers", data_dir=prepared["tfrecord"])
    assert "without regard to their classes" in caplog.text
