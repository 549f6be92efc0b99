"""From image files to batches of numpy arrays.

TensorFlow is imported here, also for `vgg_jax.export`; it never sees a GPU, and computes each of its operations on one core.
"""

import contextlib
import os

from vgg_jax.errors import InputError

# TensorFlow reads these while it is imported. oneDNN's allocator often gives memory that is in no cache: in half of all runs the input took
# 1.35 times as long as in the others, whose time is that without it.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

try:
    import tensorflow as tf
except ImportError as error:
    raise InputError(
        f"the data pipeline needs TensorFlow, which cannot be imported ({error}): pip install 'vgg-jax[train]'"
    ) from error

with contextlib.suppress(
    RuntimeError
):  # a notebook that used TensorFlow before has decided already
    tf.config.set_visible_devices([], "GPU")
    # A core an image, and no second pool of threads that look for work while the first one has it: photos are 1.3 times as fast.
    tf.config.threading.set_intra_op_parallelism_threads(1)

from vgg_jax.data.batches import BatchIterator, load_resized
from vgg_jax.data.cache import cache_in_memory
from vgg_jax.data.decode import decode
from vgg_jax.data.pipeline import eval_batches, rescaled_images, train_batches
from vgg_jax.data.sources import VALIDATION, open_split, open_train_val, split_names
from vgg_jax.data.splits import DataSource, steps_per_epoch
from vgg_jax.data.statistics import ColourMeasurements, measure_colours
from vgg_jax.data.transforms import resize_and_crop, resize_shorter_side
from vgg_jax.data.verify import read_exclude_list, verify_images, write_exclude_list

__all__ = [
    "VALIDATION",
    "BatchIterator",
    "ColourMeasurements",
    "DataSource",
    "steps_per_epoch",
    "cache_in_memory",
    "resize_and_crop",
    "decode",
    "eval_batches",
    "measure_colours",
    "open_split",
    "open_train_val",
    "read_exclude_list",
    "load_resized",
    "resize_shorter_side",
    "rescaled_images",
    "split_names",
    "tf",
    "train_batches",
    "verify_images",
    "write_exclude_list",
]
