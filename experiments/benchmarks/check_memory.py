"""Compares the predicted and the measured memory of a training step on a CPU.

    python -m experiments.benchmarks.check_memory --net D --batch 8 [--microbatch 2]
    python -m experiments.benchmarks.check_memory … --peer "python torch_step.py"

It prints one JSON line, in bytes:

    predicted   what `vgg-jax summary --batch-size` predicts
    measured    the process's peak in two steps, minus what it held before the state was made
    compiler    what compiling the step left behind
    process     the process's peak as a whole
    peer_process   the same for the peer

Linux only. D with 8 photos takes half a minute on two cores: 2.68 GB were predicted, and 2.67 GB
measured (results/memory.json).
"""

import argparse
import ctypes
import json
import re
import resource
import shlex
import sys
from pathlib import Path

import jax
import numpy as np

from experiments.script import HelpFormatter, run, stdout_of
from vgg_jax import IMAGENET, TrainConfig
from vgg_jax.distributed.sharding import make_mesh, replicated, shard_batch
from vgg_jax.model import build_model
from vgg_jax.runtime.memory import use_huge_pages
from vgg_jax.training.memory_estimate import estimate_step_memory
from vgg_jax.training.optimizer import make_optimizer
from vgg_jax.training.step import init_state, jit_steps, state_shapes

CLASSES = 1000


def read_status(name: str) -> int:
    """Bytes of this process: VmRSS (resident now) or VmHWM (its peak)."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{name}:\s+(\d+) kB", status)[1]) * 1024


def measure_step(config: TrainConfig) -> tuple[int, int]:
    """Bytes that two steps take, and bytes that compiling the step left behind."""
    mesh, size = make_mesh(1, jax.devices()[:1]), config.image_size
    model = build_model(config, CLASSES)
    jax.block_until_ready(jax.numpy.ones(1) + 1)  # starts the backend, which is not counted
    before = read_status("VmRSS")
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(256, size=(config.batch_size, size, size, 3), dtype=np.uint8),
        "colour_shift": np.zeros((config.batch_size, 3), np.float32),
        "label": rng.integers(CLASSES, size=config.batch_size).astype(np.int32),
        "mask": np.ones(config.batch_size, bool),
    }
    step, _ = jit_steps(config, model, IMAGENET.mean_rgb, mesh)
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(mesh)),
        state_shapes(model, make_optimizer(config)),
    )
    compiled = step.lower(shapes, shard_batch(batch, mesh)).compile()
    ctypes.CDLL(None).malloc_trim(0)
    compiled_rss = read_status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, which was the compiler's peak
    state = init_state(model, make_optimizer(config), 0, mesh)
    for _ in range(2):
        state, _ = jax.block_until_ready(compiled(state, shard_batch(batch, mesh)))
    return read_status("VmHWM") - compiled_rss, compiled_rss - before


def measure_peak(command: list[str]) -> int:
    """Peak bytes of a command's process."""
    code = """
import resource, subprocess, sys
process = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
sys.exit(process.returncode)
"""
    return int(stdout_of([sys.executable, "-c", code, *command]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--net", default="D")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--microbatch", type=int)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--peer", help="a command like torch_step.py, run with the same flags")
    args = parser.parse_args()
    config = TrainConfig(
        net=args.net,
        image_size=args.image_size,
        scale=(args.image_size,),
        batch_size=args.batch,
        microbatch=args.microbatch,
        dtype=args.dtype,
        learning_rate=1e-3,
    )
    use_huge_pages()  # as `vgg-jax train` does
    measured, compiler = measure_step(config)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    predicted = estimate_step_memory(config, CLASSES)["total"]
    result = vars(args) | {
        "jax": jax.__version__,
        "predicted": predicted,
        "measured": measured,
        "ratio": predicted / measured,
        "compiler": compiler,
        "process": peak,
    }
    if args.peer:
        flags = (
            f"--net {args.net} --image-size {args.image_size} --batch {args.batch} "
            f"--hidden 4096 --classes {CLASSES} --dtype {args.dtype} --runs 2"
        )
        result["peer_process"] = measure_peak([*shlex.split(args.peer), *flags.split()])
    print(json.dumps(result))


if __name__ == "__main__":
    run(main)
