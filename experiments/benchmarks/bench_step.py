"""How long one step takes, beside a peer's script in turn with ours.

    python -m experiments.benchmarks.bench_step --net A --image-size 32 --batch 128 --fc 512 [--mode infer] [--dtype bfloat16]
    python -m experiments.benchmarks.bench_step … --peer "python PEER.py"     # runs that command with the same flags after each run of ours
    python -m experiments.benchmarks.bench_step --net D --image-size 224 --batch 256 --fc 4096 --dtype bfloat16 --peak-teraflops 989    # on an H100

It needs no TensorFlow. On a GPU float32 products are TF32's, jax's default (JAX_DEFAULT_MATMUL_PRECISION=float32 for all digits).
Net A at its defaults, 2 cores of a Xeon, jax 0.12: 0.33 to 0.37 s a step, PyTorch 0.65 to 0.70 (results/steps.json). Ours trains in huge
pages and infers with keep_memory, as the command line does; the peer has its defaults.

Prints one JSON line: the seconds of a step, warm (the median of --runs), the definition's operations a second (Winograd makes do with
fewer), on an accelerator the most memory that was taken, and with --peer the ratios, peer's seconds over ours, pair by pair. The peer's
command must take --net, --image-size, --batch, --hidden, --dtype, --mode and print a JSON line with "seconds".
"""

import argparse
import dataclasses
import json
import shlex
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from experiments.script import figure, run
from vgg_jax import CONFIGS, IMAGENET, VGG, TrainConfig, compile_inference
from vgg_jax.distributed.sharding import make_mesh, shard_batch
from vgg_jax.preprocessing import preprocess
from vgg_jax.runtime.memory import configure_malloc, use_huge_pages
from vgg_jax.summary import summarize
from vgg_jax.training.optimizer import sgd
from vgg_jax.training.step import init_state, jit_steps

CLASSES = 10


def seconds_of_steps(args: argparse.Namespace) -> dict[str, float | None]:
    config = TrainConfig(
        net=args.net,
        fc=(args.fc, args.fc),
        dtype=args.dtype,
        image_size=args.image_size,
        scale=(args.image_size,),
        batch_size=args.batch,
        microbatch=args.microbatch,
        learning_rate=1e-2,
    )
    model = VGG(
        dataclasses.replace(CONFIGS[args.net], fc=config.fc),
        CLASSES,
        dtype=jnp.dtype(args.dtype),
        image_size=args.image_size,
    )
    mesh = make_mesh(args.batch)
    state = init_state(model, sgd(config), 0, mesh)
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(
            256, size=(args.batch, args.image_size, args.image_size, 3), dtype=np.uint8
        ),
        "colour_shift": np.zeros((args.batch, 3), np.float32),
        "label": rng.integers(CLASSES, size=args.batch).astype(np.int32),
        "mask": np.ones(args.batch, bool),
    }
    on_device = shard_batch(batch, mesh)
    if args.mode == "train":
        step, _ = jit_steps(config, model, IMAGENET.mean_rgb, mesh)

        def once() -> None:
            nonlocal state
            state, _ = jax.block_until_ready(step(state, on_device))
    else:
        images = preprocess(on_device["image"], IMAGENET.mean_rgb)
        infer = compile_inference(model, {"params": state.params})

        def once() -> None:
            jax.block_until_ready(infer(images))

    first = timed(once)
    seconds = [timed(once) for _ in range(args.runs)]
    rate = args.batch / statistics.median(seconds)
    # A multiply-add is two operations; both gradients of a layer take as many as its output.
    macs = sum(row.macs for row in summarize(model.config, CLASSES, image_size=args.image_size))
    teraflops = macs * (6 if args.mode == "train" else 2) * rate / 1e12
    return {
        "seconds": statistics.median(seconds),
        "min": min(seconds),
        "max": max(seconds),
        "first_call_seconds": first,
        "images_per_second": rate,
        "teraflops": teraflops,
        "share_of_peak": args.peak_teraflops and teraflops / args.peak_teraflops,
        "device_memory": (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use"),
    }


def timed(once) -> float:
    start = time.perf_counter()
    once()
    return time.perf_counter() - start


def seconds_of_peer(args: argparse.Namespace) -> float:
    flags = f"--net {args.net} --image-size {args.image_size} --batch {args.batch} --hidden {args.fc} --dtype {args.dtype} --mode {args.mode}"
    command = [*shlex.split(args.peer), *flags.split(), "--runs", str(args.runs)]
    return figure(command, "seconds")


def seconds_of_ours(argv: list[str]) -> float:
    """In a process of its own, as the peer's is."""
    return figure([sys.executable, "-m", "experiments.benchmarks.bench_step", *argv], "seconds")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--net", default="A", choices=CONFIGS)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--microbatch", type=int, help="examples at a time, in training")
    parser.add_argument("--fc", type=int, default=512)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--mode", default="train", choices=["train", "infer"])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument(
        "--peak-teraflops",
        type=float,
        help="of the device, for the share of it (989 of an H100 in bfloat16)",
    )
    parser.add_argument("--peer", help="a command to run in turn with ours")
    parser.add_argument("--pairs", type=int, default=3)
    args = parser.parse_args()
    what = {name: value for name, value in vars(args).items() if name not in ("peer", "pairs")}
    if args.peer is None:
        (
            use_huge_pages if args.mode == "train" else configure_malloc
        )()  # as `vgg-jax train` and `vgg-jax predict` do
        print(
            json.dumps(
                what
                | {"jax": jax.__version__, "device": jax.devices()[0].device_kind}
                | seconds_of_steps(args)
            )
        )
        return
    argv = [
        f"--{name.replace('_', '-')}={value}" for name, value in what.items() if value is not None
    ]
    pairs = [(seconds_of_ours(argv), seconds_of_peer(args)) for _ in range(args.pairs)]
    ratios = [peer / ours for ours, peer in pairs]
    print(
        json.dumps(
            what
            | {
                "peer": args.peer,
                "pairs": pairs,
                "ratios": ratios,
                "median_ratio": statistics.median(ratios),
            }
        )
    )


if __name__ == "__main__":
    run(main)
