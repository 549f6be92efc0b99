import numpy as np
import pytest
import tensorflow as tf

from tests.helpers.tiny_data import encode, indices, noise
from vgg_jax.data import open_train_val
from vgg_jax.data.splits import epoch_seeds, permute_indices
from vgg_jax.errors import InputError


def test_orders_are_as_good_as_numpys():
    """tf.random.experimental.index_shuffle is not: of its orders every 256th is the same, and they correlate with each other."""
    size, epochs = 45000, 20
    positions = tf.range(size, dtype=tf.int64)
    orders = np.stack(
        [
            permute_indices(
                positions, epoch_seeds(0, tf.constant(epoch, tf.int64))[0], size
            ).numpy()
            for epoch in range(epochs)
        ]
    )
    assert all(len(set(order)) == size for order in orders)
    assert np.abs(np.corrcoef(orders) - np.eye(epochs)).max() < 5 / np.sqrt(size)
    assert max(abs(np.corrcoef(order[:-1], order[1:])[0, 1]) for order in orders) < 5 / np.sqrt(
        size
    )
    in_batch = (
        (orders[:, : size // 32 * 32] < size // 2).reshape(-1, 32).sum(1)
    )  # of two classes in sorted folders
    assert abs(in_batch.var() / (32 / 4) - 1) < 0.05
    seven = {
        tuple(
            permute_indices(
                positions[:7], epoch_seeds(0, tf.constant(epoch, tf.int64))[0], 7
            ).numpy()
        )
        for epoch in range(300)
    }
    assert len(seven) > 280  # of 5,040, drawn 300 times: 291 expected
    assert permute_indices(positions[:1], tf.constant([1, 2], tf.int64), 1).numpy().tolist() == [0]


def test_the_division_is_frozen():
    """A resumed run must not validate on what it has trained on: this list was printed once and does not depend on numpy's version."""
    assert indices(open_train_val("digits", seed=0)[1])[:5] == FROZEN


FROZEN = [10, 17, 26, 32, 36]


def test_division_takes_at_least_one_image_and_leaves_one(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.png").write_bytes(encode(noise(4, 4)))
    assert [source.size for source in open_train_val(str(tmp_path), validation_fraction=0.0)] == [
        1,
        0,
    ]
    with pytest.raises(InputError, match="no image is left to train on"):
        open_train_val(str(tmp_path))
    (tmp_path / "a" / "2.png").write_bytes(encode(noise(4, 4)))
    assert [source.size for source in open_train_val(str(tmp_path), validation_fraction=0.01)] == [
        1,
        1,
    ]
