"""Evaluation of a folder of photos, end to end: files read, decoded, rescaled, evaluated with their mirror images.

    python -m experiments.benchmarks.bench_evaluate PHOTOS --net A --scale 256 --images 500 [--cache DIR]
    python -m experiments.benchmarks.bench_evaluate … --peer "python PEER.py"     # runs that command with the same flags after each run of ours
    python -m experiments.benchmarks.bench_evaluate … --protocol multi-crop --scale 256 384 512 --peer "python -m experiments.benchmarks.torch_crops"

Prints one JSON line: images a second from the first file to the last posterior, compilation included, and how many programs were
compiled. With --cache compiled programs are kept in DIR, and a second run finds them there. Weights are random: they do not matter here.
On two cores 200 photos: 4.3 a second with nothing compiled, then 4.7 and 4.9, PyTorch 1.8 (results/evaluate_A_256.json).
"""

import argparse
import dataclasses
import importlib
import json
import logging
import shlex
import statistics
import sys
import time

import jax
import numpy as np

from experiments.script import json_result, run
from vgg_jax import CONFIGS, VGG, compiler_options
from vgg_jax.configs.evaluation import MAX_PIXELS_PER_BATCH, PROTOCOLS, EvalProtocol
from vgg_jax.data import open_split, rescaled_images
from vgg_jax.distributed.sharding import make_mesh
from vgg_jax.evaluation.dense import iter_posteriors
from vgg_jax.runtime.memory import configure_malloc


class Compilations(logging.Handler):
    count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += record.getMessage().startswith(
            ("Compiling jit(trunk_activations)", "Compiling jit(logits_at_positions)")
        )


def measured(args: argparse.Namespace) -> dict:
    if args.cache:
        jax.config.update("jax_compilation_cache_dir", args.cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    model = VGG(CONFIGS[args.net])
    init = jax.jit(model.lazy_init, compiler_options=compiler_options())
    variables = jax.block_until_ready(
        init(jax.random.key(0), np.zeros((1, 224, 224, 3), np.float32))
    )
    compilations = Compilations()
    logging.getLogger("jax").addHandler(compilations)
    logging.getLogger("jax").propagate = False  # hundreds of lines
    importlib.import_module(
        "tensorflow"
    )  # the peers import their libraries before the clock starts, too

    started = time.perf_counter()
    source = open_split(args.folder, "train")
    source = dataclasses.replace(source, size=min(source.size, args.images))
    jax.config.update("jax_log_compiles", True)
    examples = rescaled_images(
        dataclasses.replace(source, examples=first(source)), tuple(args.scale), True
    )
    images = ([image[0] for image in example["scaled"]] for example in examples)
    mesh = make_mesh(1, jax.devices()[:1])
    found = dict(
        iter_posteriors(
            model,
            variables,
            images,
            mesh=mesh,
            protocol=EvalProtocol(args.protocol),
            pixels=args.pixels,
        )
    )
    seconds = time.perf_counter() - started
    assert len(found) == source.size
    return {
        "images_per_second": source.size / seconds,
        "seconds": seconds,
        "programs": compilations.count,
    }


def first(source):
    return lambda seed, start=0: source.examples(seed, start).take(source.size)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder")
    parser.add_argument("--net", default="A", choices=CONFIGS)
    parser.add_argument("--scale", type=int, nargs="+", default=[256])
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--protocol", default="dense", choices=PROTOCOLS)
    parser.add_argument("--pixels", type=int, default=MAX_PIXELS_PER_BATCH)
    parser.add_argument("--cache")
    parser.add_argument("--peer", help="a command to run in turn with ours")
    parser.add_argument("--pairs", type=int, default=1)
    args = parser.parse_args()
    what = {name: value for name, value in vars(args).items() if name not in ("peer", "pairs")}
    if args.peer is None:
        configure_malloc()  # as `vgg-jax evaluate` does
        print(json.dumps(what | {"jax": jax.__version__} | measured(args)))
        return
    shared = [
        args.folder,
        "--net",
        args.net,
        "--scale",
        *map(str, args.scale),
        "--images",
        str(args.images),
    ]
    ours = [
        sys.executable,
        "-m",
        "experiments.benchmarks.bench_evaluate",
        *shared,
        "--protocol",
        args.protocol,
        "--pixels",
        str(args.pixels),
    ]
    ours += ["--cache", args.cache] if args.cache else []
    peer = [*shlex.split(args.peer), *shared]
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
