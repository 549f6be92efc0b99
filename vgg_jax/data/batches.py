"""Batches of a source as numpy arrays. An image that breaks the stream is found and named."""

import functools
import itertools
import re
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import tensorflow as tf

from vgg_jax.data.decode import decode
from vgg_jax.data.splits import CORES, IN_FLIGHT, DataSource, map_with_fallback
from vgg_jax.data.transforms import resize_shorter_side
from vgg_jax.errors import DataError
from vgg_jax.paths import to_path

PREFETCH = 2  # batches that are ready before they are asked for
MAX_BAD_FRACTION = 0.01  # of the images of a source that `skip_bad` leaves out, and one in any case; more say that something else is wrong


class BatchIterator:
    """An iterable of dicts of numpy arrays; each pass starts anew and builds no new TensorFlow graph.

    `examples(k)` gives the encoded examples from batch k on, and `prepare` makes one example of a batch from one of those; without a
    `batch_size` both are about whole batches. Both must be deterministic. Iterating raises DataError with the name of the first file
    that cannot be decoded. With `skip_bad` such an example keeps its place and its index, all else of it is zero, its mask too: it is
    warned of, and more than `MAX_BAD_FRACTION` of them raise DataError.
    """

    def __init__(
        self,
        source: DataSource,
        examples: Callable[[int], tf.data.Dataset],
        prepare: Callable[[dict], dict],
        batch_size: int | None,
        skip_bad: bool = False,
    ) -> None:
        options = tf.data.Options()
        options.threading.private_threadpool_size = CORES
        options.threading.max_intra_op_parallelism = (
            1  # a core an image: splitting one image between cores only costs
        )
        options.deterministic = True
        options.autotune.enabled = (
            False  # all its numbers are given; looking at the clock for it takes 5 % of the time
        )
        # All conditions are on Python values; looking for others delays the first batch.
        prepare = tf.autograph.experimental.do_not_convert(prepare)
        at_once = (
            IN_FLIGHT if batch_size else PREFETCH
        )  # whole batches: more would take memory for nothing
        prepared = examples(0).map(prepare, num_parallel_calls=at_once, deterministic=True)
        if skip_bad and batch_size:  # what lies in memory was decoded before
            prepared = map_with_fallback(
                examples(0), prepare, functools.partial(_blank, prepared.element_spec), at_once
            )
        batches = prepared if batch_size is None else prepared.batch(batch_size)
        self._dataset = batches.prefetch(PREFETCH).with_options(options)
        self._source, self._examples, self._batch_size = source, examples, batch_size
        self._skip_bad, self._bad = skip_bad, set[int]()
        self._prepare = tf.function(
            prepare
        )  # errors of Python functions have the same type as in the stream

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
                        raise DataError(self._explain(done, error)) from error
                    if batch is None:
                        return
                    if self._skip_bad:
                        self._count_bad(batch)
                    yield batch
        finally:
            release()

    def _count_bad(self, batch: dict[str, np.ndarray]) -> None:
        for index in batch["index"][(batch["index"] >= 0) & ~batch["mask"]].tolist():
            if index not in self._bad:
                self._bad.add(index)
                name = self._source.file_name(index)
                print(
                    f"warning: {name!r} cannot be read or decoded, and is left out",
                    file=sys.stderr,
                    flush=True,
                )
        if len(self._bad) > min(
            max(1, MAX_BAD_FRACTION * self._source.size), self._source.size - 1
        ):
            raise DataError(
                f"{len(self._bad)} of the {self._source.size} images of {self._source.name} cannot be read or decoded: expected at most "
                f"one in {1 / MAX_BAD_FRACTION:.0f}; find them by `vgg-jax verify-data` and leave them out by --exclude, or restore them"
            )

    def _explain(self, batch: int, error: tf.errors.OpError) -> str:
        """Names the first example of a batch that cannot be prepared: TensorFlow's errors say neither path nor position."""
        if self._batch_size is None:  # what lies in memory was decoded before
            return f"cannot make a batch of {self._source.name}: {error_summary(error)}"
        try:
            for example in self._examples(batch).take(self._batch_size):
                try:
                    self._prepare(example)
                except tf.errors.OpError as cause:
                    name = self._source.file_name(int(example["index"]))
                    return (
                        f"cannot decode {name!r}: {error_summary(cause)}; expected a whole image, so replace it (a run that began goes on), "
                        "or begin another with --skip-bad or --exclude"
                    )
        except tf.errors.OpError as cause:
            error = cause
        return f"cannot read {self._source.name}: {error_summary(error)}; expected the files that were there at the start"


def _blank(spec: dict[str, tf.TensorSpec], example: dict) -> dict:
    """What stands for an example that cannot be prepared."""
    return {name: tf.zeros(each.shape, each.dtype) for name, each in spec.items()} | {
        "index": example["index"]
    }


def load_resized(path: str, scales: Sequence[int], exif: bool) -> list[np.ndarray]:
    """An image file at each test scale, uint8 (H, W, 3). Raises DataError for one that cannot be read or decoded."""
    try:
        image = decode(tf.constant(to_path(path).read_bytes()), exif)
        return [resize_shorter_side(image, scale).numpy() for scale in scales]
    except OSError as error:
        raise DataError(f"cannot read {path!r}: {error.strerror or error}") from error
    except (tf.errors.OpError, ValueError) as error:
        cause = error_summary(error)
        raise DataError(f"cannot decode {path!r}: {cause}") from error


def error_summary(error: tf.errors.OpError | OSError | ValueError) -> str:
    """The first line of TensorFlow's message without the names of its graph, or what `resize_shorter_side` asserts."""
    if not isinstance(error, tf.errors.OpError):
        return str(error)
    asserted = re.search(r"assertion failed: \[(.*?)\]", error.message)
    if asserted:
        return asserted[1]
    # "Graph execution error", "Detected at node" and the lines of our source may come before what is wrong.
    message = re.sub(
        r"^(Graph execution error|Detected at |\s+File ).*\n", "", error.message, flags=re.MULTILINE
    )
    line = re.sub(r"\{\{.*?\}\}|\[Op:.*|\[\[.*", "", message).strip().split("\n")[0]
    return re.sub(r"^ValueError: ", "", line).rstrip(". ")
