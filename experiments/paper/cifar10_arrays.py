"""Writes CIFAR-10 as an .npz file, which the experiments read without TensorFlow.

    pip install -e '.[train]'
    python -m experiments.paper.cifar10_arrays cifar10.npz --data-dir DIR

DIR is a prepared folder of TensorFlow Datasets, as for `vgg-jax train cifar10 --data-dir DIR`. The
file has x_train (50000, 32, 32, 3), y_train, x_test and y_test. Takes 15 seconds, and 184 MB.
"""

import argparse
import os

import numpy as np

from experiments.script import HelpFormatter, run
from vgg_jax.errors import InputError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("out")
    parser.add_argument("--data-dir")
    parser.add_argument("--download", action="store_true")
    args = parser.parse_args()
    if not args.out.endswith(".npz"):
        raise InputError(f"{args.out!r} is no .npz file: expected a name such as cifar10.npz")

    import tensorflow_datasets as tfds

    builder = tfds.builder("cifar10", data_dir=args.data_dir)
    if args.download:
        builder.download_and_prepare()
    try:
        splits = builder.as_dataset(batch_size=-1)
    except AssertionError as error:
        raise InputError(
            f"no cifar10 in {builder.data_dir}: pass --data-dir, or --download"
        ) from error
    arrays = {}
    for split in ("train", "test"):
        arrays[f"x_{split}"] = splits[split]["image"].numpy()
        arrays[f"y_{split}"] = splits[split]["label"].numpy()
    # Whole or not at all: a half-written file would look like data.
    partial = f"{args.out}.partial.npz"
    np.savez(partial, **arrays)
    os.replace(partial, args.out)


if __name__ == "__main__":
    run(main)
