"""Times the training input: images a second, read, decoded, cropped, flipped and batched as uint8.

    python -m experiments.benchmarks.bench_input PHOTOS [--tfrecord] [--cache] \\
        --scale 256 512 --image-size 224 --batch 64 --images 6000
    python -m experiments.benchmarks.bench_input cifar10 --data-dir DIR --cache \\
        --scale 32 40 --image-size 32 --batch 128 --images 200000
    python -m experiments.benchmarks.bench_input PHOTOS … --peer "python PEER.py"

Half a minute on two cores: 1,071 to 1,217 photos a second from a folder, torchvision 871 to 964
(results/input.json).

Prints one JSON line. "images_per_second" counts from the request of the first batch to the last
batch, epoch after epoch. "stages" has the same for shorter streams. "read" reads the files only.
"decode" also decodes the whole images, while training decodes only a part of each. Both are absent
if the pixels are in memory.

With --tfrecord, the photos are first written to TFRecord files in a temporary folder, as they are.

With --peer, each pair of runs is this script's and then the peer's on the same photos. The peer's
command gets the folder, --workers, --repeat (passes over the folder) and --runs. It prints a JSON
line with "images_per_second", and may crop as it likes.
"""

import argparse
import json
import os
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from experiments.script import HelpFormatter, check_at_least_one, json_result, run
from vgg_jax import IMAGENET, TrainConfig
from vgg_jax.data import (
    BatchIterator,
    DataSource,
    cache_in_memory,
    decode,
    open_split,
    tf,
    train_batches,
)
from vgg_jax.runtime.memory import use_huge_pages


def measure(args: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        if args.tfrecord:
            source = open_split(write_tfrecord(args.data, folder), "train", data_dir=folder)
        else:
            source = open_split(args.data, "train", data_dir=args.data_dir)
        config = TrainConfig(
            epochs=-(-args.images // source.size),
            cache=args.cache,
            image_size=args.image_size,
            scale=tuple(args.scale),
            batch_size=args.batch,
        )
        if args.cache:
            source = cache_in_memory(source, config)
        stages = {}
        if source.pixels is None:  # pixels in memory are neither read nor decoded
            for name, prepare in (("read", measure_bytes), ("decode", measure_sides)):
                batches = batches_of(source, prepare, args.batch)
                stages[name], _ = images_per_second(batches, min(args.images, source.size))
        total, first = images_per_second(train_batches(source, config, IMAGENET), args.images)
    return {
        "images_per_second": round(total, 1),
        "first_batch_seconds": round(first, 3),
        "stages": stages | {"all": round(total, 1)},
    }


def images_per_second(batches: BatchIterator, images: int) -> tuple[float, float]:
    """Images a second, and the seconds to the first batch, which they include."""
    started, first, count = time.perf_counter(), 0.0, 0
    for batch in batches:
        first = first or time.perf_counter() - started
        # Black images, which fill up the last batch of an epoch, do not count.
        count += int(np.sum(batch["index"] >= 0))
        if count >= images:
            break
    return round(count / (time.perf_counter() - started), 1), first


def batches_of(
    source: DataSource, prepare: Callable[[dict], dict], batch_size: int
) -> BatchIterator:
    return BatchIterator(
        source, lambda number: source.examples(None, number * batch_size), prepare, batch_size
    )


def measure_bytes(example: dict) -> dict:
    return {"index": example["index"], "bytes": tf.strings.length(example["encoded"])}


def measure_sides(example: dict) -> dict:
    return {"index": example["index"], "sides": tf.shape(decode(example["encoded"]))}


def write_tfrecord(photos: str, folder: str) -> str:
    """Writes <photos>/<class>/* as a TensorFlow data set under a folder, and returns its name."""
    import tensorflow_datasets as tfds

    files = sorted(Path(photos).glob("*/*"))

    class Photos(tfds.core.GeneratorBasedBuilder):
        code_path = None
        VERSION = tfds.core.Version("1.0.0")

        def _info(self) -> tfds.core.DatasetInfo:
            names = sorted({file.parent.name for file in files})
            features = {
                "image": tfds.features.Image(),
                "label": tfds.features.ClassLabel(names=names),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager: object) -> dict:
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for file in files:
                yield str(file), {"image": str(file), "label": file.parent.name}

    Photos(data_dir=folder).download_and_prepare()
    return "photos"


def compare_with_peer(args: argparse.Namespace, settings: dict[str, Any]) -> dict[str, Any]:
    """Runs this script and the peer's command in turn."""
    num_photos = len(list(Path(args.data).glob("*/*")))
    command = [sys.executable, "-m", "experiments.benchmarks.bench_input", args.data, "--scale"]
    command += map(str, args.scale)
    command += [
        f"--{name.replace('_', '-')}={settings[name]}" for name in ("image_size", "batch", "images")
    ]
    command += [f"--{name}" for name in ("tfrecord", "cache") if settings[name]]
    repeat = -(-args.images // num_photos)
    peer = [*shlex.split(args.peer), args.data, "--workers", str(os.cpu_count())]
    peer += ["--repeat", str(repeat), "--runs", "1"]
    pairs = [
        (json_result(command, "images_per_second"), json_result(peer, "images_per_second"))
        for _ in range(args.pairs)
    ]
    ratios = [own / other for own, other in pairs]
    return {
        "peer": args.peer,
        "images_per_second": pairs,
        "ratios": ratios,
        "median_ratio": statistics.median(ratios),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--data-dir")
    parser.add_argument("--tfrecord", action="store_true")
    parser.add_argument("--cache", action="store_true")
    parser.add_argument("--scale", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--images", type=int, default=6000)
    parser.add_argument("--peer", help="a command to run in turn with this script")
    parser.add_argument("--pairs", type=int, default=3)
    args = parser.parse_args()
    check_at_least_one(args, "image_size", "batch", "images", "pairs")
    settings = {name: value for name, value in vars(args).items() if name not in ("peer", "pairs")}
    if args.peer is None:
        use_huge_pages()  # as `vgg-jax train` does
        results = {"tensorflow": tf.__version__} | measure(args)
    elif any(Path(args.data).glob("*/*")):
        results = compare_with_peer(args, settings)
    else:
        parser.error(
            f"no photos {args.data}/<class>/*: expected a folder that the peer can read, too"
        )
    print(json.dumps(settings | results))


if __name__ == "__main__":
    run(main)
