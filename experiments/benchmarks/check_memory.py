"""The memory of a training step on a CPU: what `vgg-jax summary --batch-size` predicts, what a run takes, and what PyTorch takes.

    python -m experiments.benchmarks.check_memory --net D --batch 8 [--microbatch 2] [--peer "python torch_step.py"]

Prints one JSON line: bytes predicted, bytes that the process's peak is above what it held when the step was compiled and the state not yet
made, their ratio, bytes that the compiler left, and with --peer the peak of each process as a whole. Linux only.
Half a minute for D with 8 photos on two cores, predicted 2.68 GB, measured 2.67 (results/memory.json).
"""

import argparse
import ctypes
import functools
import json
import re
import resource
import shlex
import sys
from pathlib import Path

import jax
import numpy as np

from experiments.script import run, stdout_of
from vgg_jax import IMAGENET, TrainConfig
from vgg_jax.distributed.sharding import make_mesh, replicated, shard_batch
from vgg_jax.model import build_model
from vgg_jax.runtime.memory import use_huge_pages
from vgg_jax.training.memory_estimate import estimate_step_memory
from vgg_jax.training.optimizer import sgd
from vgg_jax.training.step import _init_state, init_state, jit_steps

CLASSES = 1000


def process(name: str) -> int:
    """Bytes of this process: VmRSS, what it holds, or VmHWM, the most it has held."""
    return int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def measured(config: TrainConfig) -> tuple[int, int]:
    """Bytes of two steps, and of what compiling them left."""
    mesh, model, size = (
        make_mesh(1, jax.devices()[:1]),
        build_model(config, CLASSES),
        config.image_size,
    )
    jax.block_until_ready(jax.numpy.ones(1) + 1)  # the backend and its threads are not the step's
    before = process("VmRSS")
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(256, size=(config.batch_size, size, size, 3), dtype=np.uint8),
        "colour_shift": np.zeros((config.batch_size, 3), np.float32),
        "label": rng.integers(CLASSES, size=config.batch_size).astype(np.int32),
        "mask": np.ones(config.batch_size, bool),
    }
    step, _ = jit_steps(config, model, IMAGENET.mean_rgb, mesh)
    shapes = jax.eval_shape(functools.partial(_init_state, model, sgd(config)), jax.random.key(0))
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated(mesh)), shapes
    )
    compiled = step.lower(shapes, shard_batch(batch, mesh)).compile()
    ctypes.CDLL(None).malloc_trim(0)
    left = process("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is the compiler's
    state = init_state(model, sgd(config), 0, mesh)
    for _ in range(2):
        state, _ = jax.block_until_ready(compiled(state, shard_batch(batch, mesh)))
    return process("VmHWM") - left, left - before


def peak_of(command: list[str]) -> int:
    """Bytes, the most that a command's process has held."""
    code = "import resource, subprocess, sys; done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL); "
    code += "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024); sys.exit(done.returncode)"
    return int(stdout_of([sys.executable, "-c", code, *command]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
    took, compiler = measured(config)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    predicted = estimate_step_memory(config, CLASSES)["total"]
    found = vars(args) | {
        "jax": jax.__version__,
        "predicted": predicted,
        "measured": took,
        "ratio": predicted / took,
        "compiler": compiler,
        "process": peak,
    }
    if args.peer:
        flags = f"--net {args.net} --image-size {args.image_size} --batch {args.batch} --hidden 4096 --classes {CLASSES} --dtype {args.dtype}"
        found["peer_process"] = peak_of([*shlex.split(args.peer), *flags.split(), "--runs", "2"])
    print(json.dumps(found))


if __name__ == "__main__":
    run(main)
