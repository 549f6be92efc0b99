"""From image files to batches of numpy arrays.

TensorFlow is imported and configured here, also for `vgg_jax.export`: no GPU, one core per
operation.
"""

import contextlib
import os
import sys
import types

from vgg_jax.errors import InputError, install_hint

# TensorFlow reads these while it is imported. The allocator of oneDNN slows down the input in
# some runs (docs/performance.md#onednns-allocator).
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

try:
    _NO_OPTIMIZERS = types.ModuleType("keras.src.optimizers")
    # TensorFlow imports Keras for its optimizers, which takes a second or two. With this empty
    # module, Keras is imported when it is used (docs/performance.md#first-answer).
    sys.modules.setdefault("keras.src.optimizers", _NO_OPTIMIZERS)
    import tensorflow as tf
except ImportError as error:
    raise InputError(
        f"the data pipeline needs TensorFlow, which cannot be imported ({error}): "
        f"{install_hint('train')}"
    ) from error
finally:
    if sys.modules.get("keras.src.optimizers") is _NO_OPTIMIZERS:
        del sys.modules["keras.src.optimizers"]

# TensorFlow refuses if it was used before, for example in a notebook.
with contextlib.suppress(RuntimeError):
    tf.config.set_visible_devices([], "GPU")
    # Each image has one core. A second pool of threads would take cores from the first
    # (docs/performance.md#threads-of-the-input).
    tf.config.threading.set_intra_op_parallelism_threads(1)

from vgg_jax.data.batches import BatchIterator
from vgg_jax.data.cache import cache_in_memory, first_examples
from vgg_jax.data.decode import decode
from vgg_jax.data.features import (
    CachedFeatures,
    cache_features,
    eval_feature_batches,
    train_feature_batches,
)
from vgg_jax.data.pipeline import eval_batches, rescaled_images, train_batches
from vgg_jax.data.sources import (
    VALIDATION,
    open_split,
    open_train_val,
    read_labels,
    split_names,
)
from vgg_jax.data.splits import DataSource, pick, steps_per_epoch
from vgg_jax.data.statistics import ColourMeasurements, measure_colours
from vgg_jax.data.transforms import resize_and_crop, resize_shorter_side
from vgg_jax.data.verify import (
    check_exclude_list_path,
    read_exclude_list,
    verify_images,
    write_exclude_list,
)

__all__ = [
    "VALIDATION",
    "BatchIterator",
    "CachedFeatures",
    "ColourMeasurements",
    "DataSource",
    "cache_features",
    "cache_in_memory",
    "check_exclude_list_path",
    "decode",
    "eval_batches",
    "eval_feature_batches",
    "first_examples",
    "measure_colours",
    "open_split",
    "open_train_val",
    "pick",
    "read_exclude_list",
    "read_labels",
    "rescaled_images",
    "resize_and_crop",
    "resize_shorter_side",
    "split_names",
    "steps_per_epoch",
    "tf",
    "train_batches",
    "train_feature_batches",
    "verify_images",
    "write_exclude_list",
]
