"""Images, image files and a TensorFlow data set, made on the spot."""

import io
import struct

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from PIL import Image, ImageOps

from vgg_jax.configs.train import TrainConfig
from vgg_jax.data.splits import HostShard

NUMBERS = 23  # images of the prepared data set, in 4 files; no multiple of a batch size used here
SEED = tf.constant([3, 4], tf.int64)
TINY_TRAIN = TrainConfig(image_size=32, scale=(32, 40), batch_size=4, epochs=3, seed=5)


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A smooth random uint8 image (H, W, 3).

    Compression and resizing change it little. Flipping and turning change it a lot.
    """
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8))
    return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))


def encode(pixels: np.ndarray | Image.Image, format: str = "PNG", **options) -> bytes:
    """The content of an image file. Options are those of Pillow's `save`."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def encode_animation(height: int, width: int, format: str) -> bytes:
    """A GIF or WebP file of three frames."""
    first, *others = (Image.fromarray(noise(height, width, seed)) for seed in range(3))
    return encode(first, format, save_all=True, append_images=others, lossless=True)


def encode_with_exif(orientation: int, byte_order: str = "<", jfif: bool = True) -> bytes:
    """A JPEG whose EXIF directory, written by hand, has an orientation after a text."""
    directory = struct.pack(
        f"{byte_order}HHHIIHHIHHI", 2, 0x010F, 2, 9, 38, 0x0112, 3, 1, orientation, 0, 0
    )
    magic = {"<": b"II*\0", ">": b"MM\0*"}[byte_order] + struct.pack(f"{byte_order}I", 8)
    exif = b"Exif\0\0" + magic + directory + b"a camera\0"
    encoded = encode(noise(21, 34), "JPEG", quality=95, exif=exif)
    assert encoded[2:4] == b"\xff\xe0" and b"JFIF" in encoded[:20]
    return encoded if jfif else encoded[:2] + encoded[20:]


def decode_by_pillow(encoded: bytes, exif: bool = True) -> np.ndarray:
    """RGB pixels by Pillow, uint8 (H, W, 3), upright if `exif`."""
    with Image.open(io.BytesIO(encoded)) as image:
        return np.asarray((ImageOps.exif_transpose(image) if exif else image).convert("RGB"))


def colour(index: int) -> np.ndarray:
    """An image of one colour, uint8 (3, 2, 3), which identifies the index."""
    return np.full((3, 2, 3), index * 10, np.uint8)


class Numbers(tfds.core.GeneratorBasedBuilder):
    """NUMBERS images of different colours with the labels 0, 1, 2, 0, …"""

    # To find it, TFDS 4.9.10 imports importlib_resources, which it does not require.
    code_path = None
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


with tfds.core.registered.skip_registration():  # TFDS has one of this name

    class Cifar10(Numbers):
        """The images of `Numbers` under the name of a published data set."""

        VERSION = tfds.core.Version("3.0.2")


def list_examples(source, seed=None, start=0):
    """The examples of one epoch of a source."""
    return list(source.examples(seed, start).as_numpy_iterator())


def indices(source, seed=None, start=0):
    """The indices of `list_examples`."""
    return [int(example["index"]) for example in list_examples(source, seed, start)]


def by_example(batches):
    """The arrays of each example, by (epoch, index), without masked ones.

    An epoch is counted by the repetitions of an index.
    """
    epochs, examples = {}, {}
    for batch in batches:
        for i in np.flatnonzero(batch["mask"]):
            index = int(batch["index"][i])
            epochs[index] = epochs.get(index, -1) + 1
            examples[epochs[index], index] = {
                key: batch[key][i] for key in ("image", "colour_shift", "label")
            }
    return examples


def check_order(source):
    """Checks the order with and without seeds, from several starts, and of shards of batches."""
    ordered, shuffled = indices(source), indices(source, SEED)
    assert ordered == sorted(shuffled) != shuffled
    assert indices(source, SEED + 1) not in (ordered, shuffled)
    assert indices(source, None, 5) == ordered[5:]
    for start in (1, source.size - 1, source.size):
        assert indices(source, SEED, start) == shuffled[start:]
    batches = [shuffled[start : start + 4] for start in range(4, source.size, 4)]
    for rows in ([0, 3], [1], [2]):  # of batches of four, from the second one on
        examples = source.examples(SEED, 4, HostShard(4, np.array(rows)))
        shard = [int(example["index"]) for example in examples.as_numpy_iterator()]
        assert shard == [batch[row] for batch in batches for row in rows if row < len(batch)]


def check_divided(train, validation, size):
    """Checks that two sources have each of `size` examples once."""
    assert len(indices(train)) == train.size and len(indices(validation)) == validation.size
    assert sorted(indices(train) + indices(validation)) == list(range(size))
