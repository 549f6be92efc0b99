"""Measures what grows with the number of images, of classes, and of images a step.

    python -m experiments.benchmarks.check_growth images 1000 10000 100000 1000000
    python -m experiments.benchmarks.check_growth classes 10 1000 20000
    python -m experiments.benchmarks.check_growth batch 8 32 128

Three minutes on two cores: a million files are listed in 28 s and 0.3 GB (results/growth.json).

Prints one JSON line for each value, with seconds and the peak memory. Each value has a process of
its own. The images are links to one image in a temporary folder. They are listed and recognised.
Then the first batch is read that a run needs which resumes in the middle of an epoch, and nine
more. Classes and batches are measured by a step of net A at 32 pixels.
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

from experiments.script import HelpFormatter, run

BATCH = 128
MAX_LINKS = 10_000  # to one file, since file systems have a limit


def measure_images(count: int) -> dict[str, float]:
    from PIL import Image

    from vgg_jax import IMAGENET, TrainConfig
    from vgg_jax.data import open_split, train_batches

    with tempfile.TemporaryDirectory() as folder:
        image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8))
        for start in range(0, count, MAX_LINKS):
            class_folder = Path(folder) / f"class{start // MAX_LINKS}"
            class_folder.mkdir()
            image.save(class_folder / "0.png")
            for i in range(1, min(MAX_LINKS, count - start)):
                os.link(class_folder / "0.png", class_folder / f"{i}.png")
        before = peak_memory()
        started = time.perf_counter()
        source = open_split(folder, "train")
        open_seconds = time.perf_counter() - started
        config = TrainConfig(image_size=32, scale=(32, 40), batch_size=BATCH)
        middle = source.size // BATCH // 2
        batches = iter(train_batches(source, config, IMAGENET, first_batch=middle))
        started = time.perf_counter()
        next(batches)
        first_batch_seconds = time.perf_counter() - started
        started = time.perf_counter()
        for _ in range(9):
            next(batches)
        nine_batches_seconds = time.perf_counter() - started
        del batches  # ends the pipeline
    return {
        "open_seconds": open_seconds,
        "first_batch_seconds": first_batch_seconds,
        "nine_batches_seconds": nine_batches_seconds,
        "memory_before_mb": before,
    }


def measure_step(classes: int, batch: int) -> dict[str, float]:
    import jax

    from vgg_jax import IMAGENET, TrainConfig
    from vgg_jax.distributed.sharding import make_mesh, shard_batch
    from vgg_jax.model import build_model
    from vgg_jax.training.optimizer import make_optimizer
    from vgg_jax.training.step import init_state, jit_steps

    config = TrainConfig(
        net="A", fc=(512, 512), image_size=32, scale=(32,), batch_size=batch, learning_rate=1e-3
    )
    mesh = make_mesh(batch, jax.devices()[:1])
    model = build_model(config, classes)
    state = init_state(model, make_optimizer(config), 0, mesh)
    step, _ = jit_steps(config, model, IMAGENET.mean_rgb, mesh)
    rng = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {
        "image": rng.integers(256, size=(batch, 32, 32, 3), dtype=np.uint8),
        "colour_shift": np.zeros((batch, 3), np.float32),
        "label": rng.integers(classes, size=batch).astype(np.int32),
        "mask": np.ones(batch, bool),
    }
    before, seconds = peak_memory(), []
    for _ in range(4):
        started = time.perf_counter()
        state, _ = jax.block_until_ready(step(state, shard_batch(arrays, mesh)))
        seconds.append(time.perf_counter() - started)
    return {
        "first_step_seconds": seconds[0],
        "step_seconds": min(seconds[1:]),
        "memory_before_mb": before,
    }


def peak_memory() -> float:
    """Megabytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("quantity", choices=("images", "classes", "batch"))
    parser.add_argument("values", type=int, nargs="+")
    args = parser.parse_args()
    if len(args.values) > 1:
        module = "experiments.benchmarks.check_growth"
        for value in args.values:
            command = [sys.executable, "-m", module, args.quantity, str(value)]
            subprocess.run(command, check=True)
        return
    [value] = args.values
    if args.quantity == "images":
        results = measure_images(value)
    elif args.quantity == "classes":
        results = measure_step(classes=value, batch=BATCH)
    else:
        results = measure_step(classes=10, batch=value)
    rounded = {name: round(number, 3) for name, number in results.items()}
    print(json.dumps({args.quantity: value} | rounded | {"memory_mb": round(peak_memory())}))


if __name__ == "__main__":
    run(main)
