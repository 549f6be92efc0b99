"""From image files to batches of numpy arrays. TensorFlow is imported here, also for `vgg_jax.export`, and never sees a GPU."""

import contextlib
import os

from vgg_jax.errors import InputError

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # TensorFlow reads it while it is imported

try:
    import tensorflow as tf
except ImportError as error:
    raise InputError(f"the data pipeline needs TensorFlow, which cannot be imported ({error}): pip install 'vgg-jax[train]'") from error

with contextlib.suppress(RuntimeError):  # a notebook that used TensorFlow before has decided already
    tf.config.set_visible_devices([], "GPU")

from vgg_jax.data.batches import Batches, read_scaled
from vgg_jax.data.pipeline import batches_per_epoch, eval_batches, rescaled_images, train_batches
from vgg_jax.data.sources import VALIDATION, open_split, open_splits
from vgg_jax.data.splits import Source
from vgg_jax.data.statistics import Measured, measure
from vgg_jax.data.transforms import crop_resized, decode, rescale

__all__ = [
    "VALIDATION",
    "Batches",
    "Measured",
    "Source",
    "batches_per_epoch",
    "crop_resized",
    "decode",
    "eval_batches",
    "measure",
    "open_split",
    "open_splits",
    "read_scaled",
    "rescale",
    "rescaled_images",
    "tf",
    "train_batches",
]
