"""Batches of a source as numpy arrays.

If an image breaks the stream, the error names its file.
"""

import functools
import itertools
import logging
import re
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import tensorflow as tf

from vgg_jax.data.splits import CORES, PARALLEL_EXAMPLES, DataSource, map_with_fallback
from vgg_jax.errors import DataError
from vgg_jax.runtime.progress import ProgressBar

logger = logging.getLogger(__name__)

PREFETCH = 2  # batches that are ready before they are needed
# Fraction of a source's images that `skip_bad` may leave out. One image is always allowed. If more
# are bad, something else is wrong.
MAX_BAD_FRACTION = 0.01
# A replaced image leaves the names of a data set as they are, so a run can resume.
TRAINING_HINT = "; a run resumes once it is replaced, or start another with --skip-bad or --exclude"


class BatchIterator:
    """An iterable of batches, which are dicts of numpy arrays.

    Each pass starts anew, and builds no new TensorFlow graph. Iterating raises DataError with the
    name of the first file that cannot be decoded.

    Args:
        source: The source of the examples, for messages.
        examples: Maps k to the encoded examples from batch k on. It must be deterministic. Without
            a `batch_size`, its elements are whole batches.
        prepare: Makes an example of a batch from an encoded example. It must be deterministic.
            Without a `batch_size`, it makes a whole batch.
        batch_size: Number of examples in a batch.
        skip_bad: Mask an example that cannot be prepared, and log a warning. All its arrays are
            zero, except for its index. If more than `MAX_BAD_FRACTION` of the examples are bad,
            iterating raises DataError.
        hint: Continuation of the message about an image that cannot be decoded.
    """

    def __init__(
        self,
        source: DataSource,
        examples: Callable[[int], tf.data.Dataset],
        prepare: Callable[[dict], dict],
        batch_size: int | None,
        skip_bad: bool = False,
        hint: str = "",
    ) -> None:
        # `prepare` branches on Python values only, so AutoGraph is off: it would delay the first
        # batch.
        prepare = tf.autograph.experimental.do_not_convert(prepare)
        # Whole batches in parallel would need more memory, and would not be faster.
        num_parallel = PARALLEL_EXAMPLES if batch_size else PREFETCH
        if skip_bad and batch_size:  # without a batch size, the images are decoded already
            spec = examples(0).map(prepare).element_spec
            blank = functools.partial(_blank, spec)
            prepared = map_with_fallback(examples(0), prepare, blank, num_parallel)
        else:
            prepared = examples(0).map(prepare, num_parallel_calls=num_parallel, deterministic=True)
        batches = prepared.batch(batch_size) if batch_size else prepared
        self._dataset = batches.prefetch(PREFETCH).with_options(_options())
        self._source, self._examples, self._batch_size = source, examples, batch_size
        self._skip_bad, self._bad, self._hint = skip_bad, set[int](), hint
        # A graph, so that errors have the types that they have in the stream.
        self._prepare = tf.function(prepare)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        stream = [self._dataset.as_numpy_iterator()]
        # Release the iterator before the interpreter shuts down. Its threads call Python to decode
        # by Pillow, and would wait forever for an interpreter that waits for them.
        release = weakref.finalize(self, stream.clear)
        try:
            # A KeyboardInterrupt is raised in the main thread, wherever that is. Within a call of
            # TensorFlow it corrupted the heap in some runs ("malloc(): invalid next size"). So
            # another thread makes the calls.
            with ThreadPoolExecutor(1, "batches") as reader:
                for number in itertools.count():
                    try:
                        batch = reader.submit(next, stream[0], None).result()
                    except tf.errors.OpError as error:
                        raise DataError(self._explain(number, error)) from error
                    if batch is None:
                        return
                    if self._skip_bad:
                        self._count_bad(batch)
                    yield batch
        finally:
            release()

    def _count_bad(self, batch: dict[str, np.ndarray]) -> None:
        """Logs a warning for each new bad example, and raises DataError if there are too many."""
        for index in batch["index"][(batch["index"] >= 0) & ~batch["mask"]].tolist():
            if index not in self._bad:
                self._bad.add(index)
                name = self._source.file_name(index)
                logger.warning(f"{name!r} cannot be read or decoded, and is left out")
        size = self._source.size
        if len(self._bad) > min(max(1, MAX_BAD_FRACTION * size), size - 1):
            raise DataError(
                f"{len(self._bad)} of the {size} images of {self._source.name} cannot be read or "
                f"decoded: expected at most one in {1 / MAX_BAD_FRACTION:.0f}; find them by "
                "`vgg-jax verify-data` and leave them out by --exclude, or restore them"
            )

    def _explain(self, number: int, error: tf.errors.OpError) -> str:
        """Names the first example of a batch that cannot be prepared.

        TensorFlow's errors contain neither its path nor its position.
        """
        name = self._source.name
        if self._batch_size is None:  # the images are decoded already
            return f"cannot make a batch of {name}: {error_summary(error)}"
        try:
            for example in self._examples(number).take(self._batch_size):
                try:
                    self._prepare(example)
                except tf.errors.OpError as cause:
                    file = self._source.file_name(int(example["index"]))
                    return (
                        f"cannot decode {file!r}: {error_summary(cause)}; "
                        f"expected an intact image: replace or remove it{self._hint}"
                    )
        except tf.errors.OpError as cause:
            error = cause
        return f"cannot read {name}: {error_summary(error)}; expected the files found at the start"


def with_progress(
    batches: Iterable[dict[str, np.ndarray]], name: str, total: int, quiet: bool = False
) -> Iterator[dict[str, np.ndarray]]:
    """Shows the progress of a pass over batches.

    Args:
        batches: The batches, with the key "index".
        name: What the pass does, such as "reading digits into memory".
        total: Number of examples.
        quiet: Show nothing.

    Yields:
        The same batches.
    """
    with ProgressBar(name, total, quiet=quiet) as progress:
        for batch in batches:
            yield batch
            progress.update(int((batch["index"] >= 0).sum()))  # not the padding


def _options() -> tf.data.Options:
    options = tf.data.Options()
    options.threading.private_threadpool_size = CORES
    # Each image has one core. To divide an image between cores costs more than it gains.
    options.threading.max_intra_op_parallelism = 1
    options.deterministic = True
    # All its parameters are set, and it would only take time (docs/performance.md#autotuning).
    options.autotune.enabled = False
    return options


def _blank(spec: dict[str, tf.TensorSpec], example: dict) -> dict:
    """Makes the example that replaces one that cannot be prepared."""
    zeros = {name: tf.zeros(tensor.shape, tensor.dtype) for name, tensor in spec.items()}
    return zeros | {"index": example["index"]}


def error_summary(error: tf.errors.OpError | OSError | ValueError) -> str:
    """Summarises an error of reading, decoding or resizing an image.

    Args:
        error: The error.

    Returns:
        The message of an assertion, or the first line of TensorFlow's message without the names of
        its graph.
    """
    if not isinstance(error, tf.errors.OpError):
        return str(error)
    assertion = re.search(r"assertion failed: \[(.*?)\]", error.message)
    if assertion:
        return assertion[1]
    # "Graph execution error", "Detected at node" and lines of our code may precede the cause.
    message = re.sub(
        r"^(Graph execution error|Detected at |\s+File ).*\n", "", error.message, flags=re.MULTILINE
    )
    line = re.sub(r"\{\{.*?\}\}|\[Op:.*|\[\[.*", "", message).strip().split("\n")[0]
    return re.sub(r"^ValueError: ", "", line).rstrip(". ")
