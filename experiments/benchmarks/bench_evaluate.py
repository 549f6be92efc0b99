"""Measures the evaluation of a folder of photos from the first file to the last posterior.

    python -m experiments.benchmarks.bench_evaluate PHOTOS --net A --scale 256 --images 500 \\
        [--cache DIR]
    python -m experiments.benchmarks.bench_evaluate … --peer "python PEER.py"
    python -m experiments.benchmarks.bench_evaluate … --protocol multi-crop --scale 256 384 512 \\
        --peer "python -m experiments.benchmarks.torch_crops"

The time includes reading, decoding, rescaling and compilation. Mirror images are evaluated too.
Weights are random, because they do not change the time. Prints one JSON line with the images per
second and the number of compiled programs. --cache keeps compiled programs in DIR for the next run.
--peer runs that command after each own run, with the same flags.

On two cores, 100 photos, with everything compiled before: 5.8 to 6.6 images per second, PyTorch 1.8
to 1.9 (experiments/results/evaluate_A_256.json).
"""

import argparse
import importlib
import json
import logging
import shlex
import statistics
import sys
import time
from typing import Any

import jax
import numpy as np

from experiments.script import HelpFormatter, check_at_least_one, json_result, run
from vgg_jax import CONFIGS, VGG, compiler_options
from vgg_jax.configs.evaluation import MAX_PIXELS_PER_BATCH, PROTOCOLS, EvalProtocol
from vgg_jax.data import open_split, pick, rescaled_images
from vgg_jax.distributed.sharding import make_mesh
from vgg_jax.evaluation.dense import iter_posteriors
from vgg_jax.runtime.memory import configure_malloc


class CompilationCounter(logging.Handler):
    """Counts the compilations of the two jitted stages in JAX's log."""

    count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += record.getMessage().startswith(
            ("Compiling jit(trunk_activations)", "Compiling jit(logits_at_positions)")
        )


def count_compilations() -> CompilationCounter:
    counter = CompilationCounter()
    logging.getLogger("jax").addHandler(counter)
    logging.getLogger("jax").propagate = False  # hundreds of lines
    jax.config.update("jax_log_compiles", True)
    return counter


def measure(args: argparse.Namespace) -> dict[str, Any]:
    if args.cache:
        jax.config.update("jax_compilation_cache_dir", args.cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    model = VGG(CONFIGS[args.net])
    init = jax.jit(model.lazy_init, compiler_options=compiler_options())
    image = np.zeros((1, 224, 224, 3), np.float32)
    variables = jax.block_until_ready(init(jax.random.key(0), image))
    # The peers import their libraries before their clocks start, too.
    importlib.import_module("tensorflow")
    compilations = count_compilations()

    started = time.perf_counter()
    source = open_split(args.folder, "train")
    source = pick(source, np.arange(min(args.images, source.size)))
    examples = rescaled_images(source, tuple(args.scale), True)
    posteriors = dict(
        iter_posteriors(
            model,
            variables,
            ([image[0] for image in example["scaled"]] for example in examples),
            mesh=make_mesh(1, jax.devices()[:1]),
            protocol=EvalProtocol(args.protocol),
            pixels=args.pixels,
        )
    )
    seconds = time.perf_counter() - started
    if len(posteriors) != source.size:
        raise RuntimeError(f"{len(posteriors)} of {source.size} images were evaluated")
    return {
        "images_per_second": source.size / seconds,
        "seconds": seconds,
        "programs": compilations.count,
    }


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Runs this script and the peer in turn, each in a process of its own."""
    scales = ["--scale", *map(str, args.scale)]
    shared = [args.folder, "--net", args.net, *scales, "--images", str(args.images)]
    own = [sys.executable, "-m", "experiments.benchmarks.bench_evaluate", *shared]
    own += ["--protocol", args.protocol, "--pixels", str(args.pixels)]
    own += ["--cache", args.cache] if args.cache else []
    peer = [*shlex.split(args.peer), *shared]
    pairs = [
        (json_result(own, "images_per_second"), json_result(peer, "images_per_second"))
        for _ in range(args.pairs)
    ]
    ratios = [own_rate / peer_rate for own_rate, peer_rate in pairs]
    return {
        "peer": args.peer,
        "images_per_second": pairs,
        "ratios": ratios,
        "median_ratio": statistics.median(ratios),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--net", default="A", choices=CONFIGS)
    parser.add_argument("--scale", type=int, nargs="+", default=[256])
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--protocol", default="dense", choices=PROTOCOLS)
    parser.add_argument("--pixels", type=int, default=MAX_PIXELS_PER_BATCH)
    parser.add_argument("--cache")
    parser.add_argument("--peer", help="a command to run in turn with this script")
    parser.add_argument("--pairs", type=int, default=1)
    args = parser.parse_args()
    check_at_least_one(args, "images", "pixels", "pairs")
    settings = {name: value for name, value in vars(args).items() if name not in ("peer", "pairs")}
    if args.peer is None:
        configure_malloc()  # as `vgg-jax evaluate` does
        result = {"jax": jax.__version__} | measure(args)
    else:
        result = compare(args)
    print(json.dumps(settings | result))


if __name__ == "__main__":
    run(main)
