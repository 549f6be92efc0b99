"""Images a second of the training input: read, decoded, a crop resampled, mirrored, in batches of uint8.

    python -m experiments.benchmarks.bench_input PHOTOS [--tfrecord] [--cache] --scale 256 512 --image-size 224 --batch 64 --images 6000
    python -m experiments.benchmarks.bench_input cifar10 --data-dir DIR --cache --scale 32 40 --image-size 32 --batch 128 --images 200000
    python -m experiments.benchmarks.bench_input PHOTOS … --peer "python PEER.py"     # runs that command on the same photos after each run of ours

With --tfrecord the photos are first written, as they are, to TFRecord files in a temporary folder. Prints one JSON line: the rate from the
first batch that was asked for to the last, epochs one after another, and the rates of the stream when it ends earlier: "read", the files
alone; "decode", with the whole images decoded, which training needs only a part of; both are left out where the pixels lie in memory.
The peer's command must take the folder, --workers, --repeat (passes over the folder) and --runs, and print a JSON line with
"images_per_second"; the crops it takes are its own affair.
Half a minute on two cores: 647 to 836 photos a second from a folder, torchvision 385 to 562 (results/input.json).
"""

import argparse
import json
import os
import shlex
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from experiments.script import json_result, run
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


def measured(args: argparse.Namespace) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        if args.tfrecord:
            source = open_split(as_tfrecord(args.data, folder), "train", data_dir=folder)
        else:
            source = open_split(args.data, "train", data_dir=args.data_dir)
        epochs = -(-args.images // source.size)
        shape = {
            "image_size": args.image_size,
            "scale": tuple(args.scale),
            "batch_size": args.batch,
        }
        config = TrainConfig(epochs=epochs, cache=args.cache, **shape)
        source = cache_in_memory(source, config) if args.cache else source
        # What lies in memory as pixels is neither read nor decoded any more.
        streams = (
            {"read": read_only(source, args.batch), "decode": decode_only(source, args.batch)}
            if source.pixels is None
            else {}
        )
        stages = {
            name: rate(batches, min(args.images, source.size))[0]
            for name, batches in streams.items()
        }
        total, first = rate(train_batches(source, config, IMAGENET), args.images)
    return {
        "images_per_second": round(total, 1),
        "first_batch_seconds": round(first, 3),
        "stages": stages | {"all": round(total, 1)},
    }


def rate(batches: BatchIterator, images: int) -> tuple[float, float]:
    """Images a second, and the seconds to the first batch, which count."""
    started, first, count = time.perf_counter(), 0.0, 0
    for batch in batches:
        first = first or time.perf_counter() - started
        count += int(
            np.sum(batch["index"] >= 0)
        )  # the last batch of an epoch is filled up with black ones
        if count >= images:
            break
    return round(count / (time.perf_counter() - started), 1), first


def read_only(source: DataSource, batch: int) -> BatchIterator:
    def prepare(example: dict) -> dict:
        return {"index": example["index"], "bytes": tf.strings.length(example["encoded"])}

    return BatchIterator(source, lambda at: source.examples(None, at * batch), prepare, batch)


def decode_only(source: DataSource, batch: int) -> BatchIterator:
    def prepare(example: dict) -> dict:
        return {"index": example["index"], "sides": tf.shape(decode(example["encoded"]))}

    return BatchIterator(source, lambda at: source.examples(None, at * batch), prepare, batch)


def as_tfrecord(photos: str, folder: str) -> str:
    """Writes <photos>/<class>/* as a TensorFlow data set under a folder; returns its name."""
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data")
    parser.add_argument("--data-dir")
    parser.add_argument("--tfrecord", action="store_true")
    parser.add_argument("--cache", action="store_true")
    parser.add_argument("--scale", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--images", type=int, default=6000)
    parser.add_argument("--peer", help="a command to run in turn with ours")
    parser.add_argument("--pairs", type=int, default=3)
    args = parser.parse_args()
    what = {name: value for name, value in vars(args).items() if name not in ("peer", "pairs")}
    if args.peer is None:
        use_huge_pages()  # as `vgg-jax train` does
        print(json.dumps(what | {"tensorflow": tf.__version__} | measured(args)))
        return
    ours = [
        sys.executable,
        "-m",
        "experiments.benchmarks.bench_input",
        args.data,
        "--scale",
        *map(str, args.scale),
    ]
    ours += [
        f"--{name.replace('_', '-')}={what[name]}" for name in ("image_size", "batch", "images")
    ]
    ours += [f"--{name}" for name in ("tfrecord", "cache") if what[name]]
    photos = len(list(Path(args.data).glob("*/*")))
    if not photos:
        parser.error(
            f"no photos {args.data}/<class>/*: expected a folder that the peer can read, too"
        )
    peer = [
        *shlex.split(args.peer),
        args.data,
        "--workers",
        str(os.cpu_count()),
        "--repeat",
        str(-(-args.images // photos)),
        "--runs",
        "1",
    ]
    pairs = [
        (json_result(ours, "images_per_second"), json_result(peer, "images_per_second"))
        for _ in range(args.pairs)
    ]
    ratios = [mine / peers for mine, peers in pairs]
    print(
        json.dumps(
            what
            | {
                "peer": args.peer,
                "images_per_second": pairs,
                "ratios": ratios,
                "median_ratio": statistics.median(ratios),
            }
        )
    )


if __name__ == "__main__":
    run(main)
