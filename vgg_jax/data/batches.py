"""Batches of a source as numpy arrays. An image that breaks the stream is found and named."""

import itertools
import re
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import tensorflow as tf

from vgg_jax.data.splits import CORES, IN_FLIGHT, Source
from vgg_jax.data.transforms import decode, rescale
from vgg_jax.errors import InputError

AHEAD = 2  # batches that are ready before they are asked for


class Batches:
    """An iterable of dicts of numpy arrays; each pass starts anew and builds no new TensorFlow graph.

    `examples(k)` gives the encoded examples from batch k on, and `prepare` makes one example of a batch from one of those; without a
    `batch_size` both are about whole batches. Both must be deterministic. Iterating raises InputError with the name of the first file
    that cannot be decoded.
    """

    def __init__(
        self, source: Source, examples: Callable[[int], tf.data.Dataset], prepare: Callable[[dict], dict], batch_size: int | None
    ) -> None:
        options = tf.data.Options()
        options.threading.private_threadpool_size = CORES
        options.threading.max_intra_op_parallelism = 1  # a core an image: splitting one image between cores only costs
        options.deterministic = True
        options.autotune.enabled = False  # all its numbers are given; looking at the clock for it takes 5 % of the time
        # All conditions are on Python values; looking for others delays the first batch.
        prepare = tf.autograph.experimental.do_not_convert(prepare)
        at_once = IN_FLIGHT if batch_size else AHEAD  # whole batches: more would take memory for nothing
        prepared = examples(0).map(prepare, num_parallel_calls=at_once, deterministic=True)
        batches = prepared if batch_size is None else prepared.batch(batch_size)
        self._dataset = batches.prefetch(AHEAD).with_options(options)
        self._source, self._examples, self._batch_size = source, examples, batch_size
        self._prepare = tf.function(prepare)  # errors of Python functions have the same type as in the stream

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        stream = [self._dataset.as_numpy_iterator()]
        # Let go of it before Python shuts down: after that its threads wait for ever for Python, to decode by Pillow, and its end for them.
        release = weakref.finalize(self, stream.clear)
        try:
            # Not in the caller's thread: a KeyboardInterrupt is raised in the main one, wherever that is, and raised within TensorFlow's
            # call it corrupted the heap ("malloc(): invalid next size") in some runs.
            with ThreadPoolExecutor(1, "batches") as reader:
                for done in itertools.count():
                    try:
                        batch = reader.submit(next, stream[0], None).result()
                    except tf.errors.OpError as error:
                        raise InputError(self._explain(done, error)) from error
                    if batch is None:
                        return
                    yield batch
        finally:
            release()

    def _explain(self, batch: int, error: tf.errors.OpError) -> str:
        """Names the first example of a batch that cannot be prepared: TensorFlow's errors say neither path nor position."""
        if self._batch_size is None:  # what lies in memory was decoded before
            return f"cannot make a batch of {self._source.name}: {_cause(error)}"
        try:
            for example in self._examples(batch).take(self._batch_size):
                try:
                    self._prepare(example)
                except tf.errors.OpError as cause:
                    name = self._source.file_name(int(example["index"]))
                    return (
                        f"cannot decode {name!r}: {_cause(cause)}; expected a whole image, so replace it (a run that began goes on), "
                        "or remove it and begin another"
                    )
        except tf.errors.OpError as cause:
            error = cause
        return f"cannot read {self._source.name}: {_cause(error)}; expected the files that were there at the start"


def read_scaled(path: str, scales: Sequence[int], exif: bool) -> list[np.ndarray]:
    """An image file at each test scale, uint8 (H, W, 3). Raises InputError for one that cannot be read or decoded."""
    try:
        with open(path, "rb") as file:
            image = decode(tf.constant(file.read()), exif)
        return [rescale(image, scale).numpy() for scale in scales]
    except OSError as error:
        raise InputError(f"cannot read {path!r}: {error.strerror}") from error
    except (tf.errors.OpError, ValueError) as error:
        cause = _cause(error) if isinstance(error, tf.errors.OpError) else str(error)
        raise InputError(f"cannot decode {path!r}: {cause}") from error


def _cause(error: tf.errors.OpError) -> str:
    """The first line of TensorFlow's message without the names of its graph, or what `rescale` asserts."""
    asserted = re.search(r"assertion failed: \[(.*?)\]", error.message)
    if asserted:
        return asserted[1]
    # "Graph execution error", "Detected at node" and the lines of our source may come before what is wrong.
    message = re.sub(r"^(Graph execution error|Detected at |\s+File ).*\n", "", error.message, flags=re.MULTILINE)
    line = re.sub(r"\{\{.*?\}\}|\[Op:.*|\[\[.*", "", message).strip().split("\n")[0]
    return re.sub(r"^ValueError: ", "", line).rstrip(". ")
