"""Pictures and a TensorFlow data set that are made on the spot."""

import io

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from PIL import Image

from vgg_jax.data.splits import HostShard

NUMBERS = 23  # images of the prepared data set, in 4 files; no multiple of a batch size used here


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A smooth uint8 picture of random colours: compression and resizing change it little, mirroring and turning a lot."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8))
    return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))


def encode(pixels: np.ndarray, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format, **options)
    return buffer.getvalue()


def colour(index: int) -> np.ndarray:
    """The picture of record `index`: 3 by 2 pixels of one colour, which tells the index."""
    return np.full((3, 2, 3), index * 10, np.uint8)


class Numbers(tfds.core.GeneratorBasedBuilder):
    """NUMBERS images of different colours with the labels 0, 1, 2, 0, …"""

    code_path = (
        None  # looking for it, TFDS 4.9.10 imports importlib_resources, which it does not require
    )
    VERSION = tfds.core.Version("1.2.3")

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
            "label": tfds.features.ClassLabel(names=["a", "b", "c"]),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for index in range(NUMBERS):
            yield index, {"image": colour(index), "label": index % 3}


SEED = tf.constant([3, 4], tf.int64)


def listed(source, seed=None, start=0):
    return list(source.examples(seed, start).as_numpy_iterator())


def indices(source, seed=None, start=0):
    return [int(example["index"]) for example in listed(source, seed, start)]


def check_order(source):
    """In order without a seed; with one shuffled, another with another seed, and the same from anywhere."""
    ordered, shuffled = indices(source), indices(source, SEED)
    assert ordered == sorted(shuffled) != shuffled
    assert indices(source, SEED + 1) not in (ordered, shuffled)
    assert indices(source, None, 5) == ordered[5:]
    for start in (1, source.size - 1, source.size):
        assert indices(source, SEED, start) == shuffled[start:]
    batches = [shuffled[at : at + 4] for at in range(4, source.size, 4)]
    for rows in ([0, 3], [1], [2]):  # of batches of four, from the second one on
        share = HostShard(4, np.array(rows))
        mine = [
            int(example["index"]) for example in source.examples(SEED, 4, share).as_numpy_iterator()
        ]
        assert mine == [batch[row] for batch in batches for row in rows if row < len(batch)]


def check_divided(train, validation, size):
    assert len(indices(train)) == train.size and len(indices(validation)) == validation.size
    assert sorted(indices(train) + indices(validation)) == list(range(size))
