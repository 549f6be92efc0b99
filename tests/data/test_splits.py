import numpy as np
import pytest
import tensorflow as tf

from tests.helpers.tiny_data import encode, indices, noise
from vgg_jax.data import open_train_val
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


def test_train_val_split_is_frozen():
    """A resumed run must not validate on its training images, whatever the version of numpy.

    The list was printed once.
    """
    assert indices(open_train_val("digits", seed=0)[1])[:5] == [10, 17, 26, 32, 36]


def test_train_val_split_of_few_images(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.png").write_bytes(encode(noise(4, 4)))
    sources = open_train_val(str(tmp_path), validation_fraction=0.0)
    assert [source.size for source in sources] == [1, 0]
    with pytest.raises(InputError, match="no image is left to train on"):
        open_train_val(str(tmp_path))
    (tmp_path / "a" / "2.png").write_bytes(encode(noise(4, 4)))
    sources = open_train_val(str(tmp_path), validation_fraction=0.01)
    assert [source.size for source in sources] == [1, 1]
