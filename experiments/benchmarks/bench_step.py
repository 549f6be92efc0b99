"""Times one training step or one inference batch, and a peer's in turn with it.

    python -m experiments.benchmarks.bench_step --net A --image-size 32 --batch 128 --fc 512
    python -m experiments.benchmarks.bench_step --mode infer --dtype bfloat16
    python -m experiments.benchmarks.bench_step --peer "python PEER.py"
    python -m experiments.benchmarks.bench_step --net D --image-size 224 --batch 256 --fc 4096 \\
        --dtype bfloat16 --peak-teraflops 989    # on an H100

Half a minute for net A at the defaults on two cores of an AMD EPYC with jax 0.12: 0.29 to 0.33 s a
step, PyTorch 0.59 to 0.61 (results/steps_without_amx.json).

Prints one JSON line. "seconds" is the median of --runs warm steps. "teraflops" counts the
operations of the definition; Winograd needs fewer. "device_memory" is the peak on an accelerator.

With --peer, each pair of runs is this script's and then the peer's, each in its own process. The
line then has the pairs and their ratios: the peer's seconds divided by ours. The peer's command
gets --net, --image-size, --batch, --hidden, --dtype, --mode and --runs, and --batch-norm if that is
set. It prints a JSON line with "seconds".

Training uses huge pages and inference `configure_malloc`, as the command line does. The peer keeps
its defaults. On a GPU jax computes float32 products in TF32 by default; set
JAX_DEFAULT_MATMUL_PRECISION=float32 for full precision. The script needs no TensorFlow.
"""

import argparse
import dataclasses
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.script import HelpFormatter, check_at_least_one, json_result, run
from vgg_jax import CONFIGS, IMAGENET, VGG, TrainConfig, compile_inference
from vgg_jax.distributed.sharding import make_mesh, shard_batch
from vgg_jax.preprocessing import subtract_mean
from vgg_jax.runtime.memory import configure_malloc, use_huge_pages
from vgg_jax.summary import summarize
from vgg_jax.training.optimizer import make_optimizer
from vgg_jax.training.step import init_state, jit_steps

CLASSES = 10


def random_batch(batch_size: int, image_size: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "image": rng.integers(256, size=(batch_size, image_size, image_size, 3), dtype=np.uint8),
        "colour_shift": np.zeros((batch_size, 3), np.float32),
        "label": rng.integers(CLASSES, size=batch_size).astype(np.int32),
        "mask": np.ones(batch_size, bool),
    }


def elapsed(function: Callable[[], None]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def count_operations(args: argparse.Namespace, model: VGG) -> int:
    """Operations of one image. A multiply-add is two; each of the two gradients costs as many."""
    layers = summarize(model.config, CLASSES, image_size=args.image_size)
    return sum(layer.macs for layer in layers) * (6 if args.mode == "train" else 2)


def time_steps(args: argparse.Namespace) -> dict[str, float | None]:
    """Times the first call, which compiles, and then `args.runs` warm steps."""
    config = TrainConfig(
        net=args.net,
        fc=(args.fc, args.fc),
        dtype=args.dtype,
        image_size=args.image_size,
        scale=(args.image_size,),
        batch_size=args.batch,
        microbatch=args.microbatch,
        learning_rate=1e-2,
        batch_norm=args.batch_norm,
    )
    model = VGG(
        dataclasses.replace(CONFIGS[args.net], fc=config.fc),
        CLASSES,
        batch_norm=args.batch_norm,
        dtype=jnp.dtype(args.dtype),
        image_size=args.image_size,
    )
    mesh = make_mesh(args.batch)
    state = init_state(model, make_optimizer(config), 0, mesh)
    batch = shard_batch(random_batch(args.batch, args.image_size), mesh)
    if args.mode == "train":
        train_step, _ = jit_steps(config, model, IMAGENET.mean_rgb, mesh)

        def run_step() -> None:
            nonlocal state
            state, _ = jax.block_until_ready(train_step(state, batch))
    else:
        images = subtract_mean(batch["image"], IMAGENET.mean_rgb)
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        infer = compile_inference(model, variables)

        def run_step() -> None:
            jax.block_until_ready(infer(images))

    first = elapsed(run_step)
    seconds = [elapsed(run_step) for _ in range(args.runs)]
    images_per_second = args.batch / statistics.median(seconds)
    teraflops = count_operations(args, model) * images_per_second / 1e12
    return {
        "seconds": statistics.median(seconds),
        "min": min(seconds),
        "max": max(seconds),
        "first_call_seconds": first,
        "images_per_second": images_per_second,
        "teraflops": teraflops,
        "share_of_peak": args.peak_teraflops and teraflops / args.peak_teraflops,
        "device_memory": (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use"),
    }


def compare_with_peer(args: argparse.Namespace, settings: dict[str, Any]) -> dict[str, Any]:
    """Runs this script and the peer in turn, each in its own process."""
    script = [sys.executable, "-m", "experiments.benchmarks.bench_step"]
    for name, value in settings.items():
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            script.append(flag)
        elif value is not None and value is not False:
            script.append(f"{flag}={value}")
    flags = (
        f"--net {args.net} --image-size {args.image_size} --batch {args.batch} --hidden {args.fc} "
        f"--dtype {args.dtype} --mode {args.mode} --runs {args.runs}"
    )
    peer = [*shlex.split(args.peer), *flags.split(), *["--batch-norm"] * args.batch_norm]
    pairs = [
        (json_result(script, "seconds"), json_result(peer, "seconds")) for _ in range(args.pairs)
    ]
    ratios = [peer_seconds / seconds for seconds, peer_seconds in pairs]
    return {
        "peer": args.peer,
        "pairs": pairs,
        "ratios": ratios,
        "median_ratio": statistics.median(ratios),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--net", default="A", choices=CONFIGS)
    parser.add_argument("--image-size", type=int, default=32, help="pixels of a side")
    parser.add_argument("--batch", type=int, default=128, help="images of a step")
    parser.add_argument("--microbatch", type=int, help="images at a time, in training")
    parser.add_argument("--fc", type=int, default=512, help="features of fc6 and of fc7")
    parser.add_argument("--batch-norm", action="store_true", help="after each convolution")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--mode", default="train", choices=["train", "infer"])
    parser.add_argument("--runs", type=int, default=5, help="warm steps that are timed")
    parser.add_argument(
        "--peak-teraflops",
        type=float,
        help="the device's peak, to print the share of it (an H100 in bfloat16: 989)",
    )
    parser.add_argument("--peer", help="a command to run in turn with this script")
    parser.add_argument("--pairs", type=int, default=3, help="pairs of runs with --peer")
    args = parser.parse_args()
    check_at_least_one(args, "image_size", "batch", "fc", "runs", "pairs")
    settings = {name: value for name, value in vars(args).items() if name not in ("peer", "pairs")}
    if args.peer is not None:
        print(json.dumps(settings | compare_with_peer(args, settings)))
        return
    # As `vgg-jax train` and `vgg-jax predict` do.
    if args.mode == "train":
        use_huge_pages()
    else:
        configure_malloc()
    device = {"jax": jax.__version__, "device": jax.devices()[0].device_kind}
    print(json.dumps(settings | device | time_steps(args)))


if __name__ == "__main__":
    run(main)
