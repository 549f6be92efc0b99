"""What grows with the number of images, classes and images a step: seconds and resident memory, each measured in a process of its own.

    python -m experiments.benchmarks.check_growth images 1000 10000 100000 1000000     # links to one picture, in a temporary folder
    python -m experiments.benchmarks.check_growth classes 10 1000 20000                # a step of net A at 32 pixels
    python -m experiments.benchmarks.check_growth batch 8 32 128                       # likewise

Prints one JSON line for each value. Of images: seconds to list and look at them, to the first batch of the second half of an epoch, where a
resumed run begins, and from there to the tenth. Memory is the process's peak.
Three minutes on two cores: a million files are listed in 28 s and 0.3 GB (results/growth.json).
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from experiments.script import run

BATCH = 128
LINKS = 10_000  # to one file; a file system has a limit


def grown_images(count: int) -> dict:
    from PIL import Image

    from vgg_jax import IMAGENET, TrainConfig
    from vgg_jax.data import open_split, train_batches

    with tempfile.TemporaryDirectory() as folder:
        picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8))
        for start in range(0, count, LINKS):
            links = Path(folder) / f"class{start // LINKS}"
            links.mkdir()
            picture.save(links / "0.png")
            for i in range(1, min(LINKS, count - start)):
                os.link(links / "0.png", links / f"{i}.png")
        before = peak()
        started = time.perf_counter()
        source = open_split(folder, "train")
        opened = time.perf_counter() - started
        config = TrainConfig(image_size=32, scale=(32, 40), batch_size=BATCH)
        batches = iter(
            train_batches(source, config, IMAGENET, first_batch=source.size // BATCH // 2)
        )
        started = time.perf_counter()
        next(batches)
        first = time.perf_counter() - started
        started = time.perf_counter()
        for _ in range(9):
            next(batches)
        nine = time.perf_counter() - started
        batches.close()
    return {
        "open_seconds": opened,
        "first_batch_seconds": first,
        "nine_batches_seconds": nine,
        "memory_before_mb": before,
    }


def grown_step(classes: int, batch: int) -> dict:
    import jax

    from vgg_jax import IMAGENET, TrainConfig
    from vgg_jax.distributed.sharding import make_mesh, shard_batch
    from vgg_jax.model import build_model
    from vgg_jax.training.optimizer import sgd
    from vgg_jax.training.step import init_state, jit_steps

    config = TrainConfig(
        net="A", fc=(512, 512), image_size=32, scale=(32,), batch_size=batch, learning_rate=1e-3
    )
    mesh = make_mesh(batch, jax.devices()[:1])
    model = build_model(config, classes)
    state = init_state(model, sgd(config), 0, mesh)
    step, _ = jit_steps(config, model, IMAGENET.mean_rgb, mesh)
    rng = np.random.default_rng(0)
    arrays = {
        "image": rng.integers(256, size=(batch, 32, 32, 3), dtype=np.uint8),
        "colour_shift": np.zeros((batch, 3), np.float32),
        "label": rng.integers(classes, size=batch).astype(np.int32),
        "mask": np.ones(batch, bool),
    }
    before, seconds = peak(), []
    for _ in range(4):
        started = time.perf_counter()
        state, _ = jax.block_until_ready(step(state, shard_batch(arrays, mesh)))
        seconds.append(time.perf_counter() - started)
    return {
        "first_step_seconds": seconds[0],
        "step_seconds": min(seconds[1:]),
        "memory_before_mb": before,
    }


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("images", "classes", "batch"))
    parser.add_argument("values", type=int, nargs="+")
    args = parser.parse_args()
    if len(args.values) > 1:
        for value in args.values:
            subprocess.run(
                [
                    sys.executable,
                    "-m",
                    "experiments.benchmarks.check_growth",
                    args.what,
                    str(value),
                ],
                check=True,
            )
        return
    [value] = args.values
    if args.what == "images":
        found = grown_images(value)
    else:
        found = grown_step(
            value if args.what == "classes" else 10, value if args.what == "batch" else BATCH
        )
    print(
        json.dumps(
            {args.what: value}
            | {name: round(number, 3) for name, number in found.items()}
            | {"memory_mb": round(peak())}
        )
    )


if __name__ == "__main__":
    run(main)
