"""Measures the time from the start of a process to its first result, beside PyTorch.

    python -m experiments.benchmarks.torch_first save vgg16.pth
    python -m experiments.benchmarks.first_answer vgg16.pth PHOTO.jpg --device "2 cores of …" \\
        --out experiments/results/first_answer.json

Rows: `vgg-jax predict` of a photo with net D, a program that compiles D for inference, and the
first training step of A with 32 pixels and of D with 224. Each of --rounds has three processes in
turn: ours with an empty compilation cache, ours again with the programs of the first, and
PyTorch's. PyTorch reads its own file, and ours is converted once before. --peer-python is the
Python that has torch. The ratio is PyTorch's seconds divided by ours. Prints a line for each row.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax

from experiments.paper.result_file import command_line
from experiments.script import HelpFormatter, check_at_least_one, run, stdout_of
from vgg_jax.errors import InputError
from vgg_jax.runs.files import atomic_write

# Ours, and PyTorch's. NET and FILE are the two weight files, PHOTO is the photo.
ROWS = {
    "predict a photo, D": ("vgg_jax predict NET PHOTO", "predict FILE PHOTO"),
    "compile_inference, D, one image": (
        "experiments.benchmarks.jax_first infer NET",
        "predict FILE PHOTO",
    ),
    **{
        f"training step, {net}, {size} px, batch {batch}": (
            f"experiments.benchmarks.jax_first {flags}",
            flags,
        )
        for net, size, batch in (("A", 32, 128), ("D", 224, 8))
        for flags in (f"step --net {net} --image-size {size} --batch {batch}",)
    },
}


def seconds_of(python: str, words: str, files: dict[str, str], **environment: str) -> float:
    """The seconds of a process from start to end."""
    command = [python, "-m", *(files.get(word, word) for word in words.split())]
    start = time.perf_counter()
    stdout_of(command, env=os.environ | environment)
    return time.perf_counter() - start


def measure(row: str, args: argparse.Namespace, files: dict[str, str]) -> dict[str, Any]:
    """Times a row in turn, `args.rounds` times."""
    ours, peer = ROWS[row]
    names = ("nothing compiled", "compiled before", "PyTorch")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory() as cache:
            for name in names[:2]:
                value = seconds_of(sys.executable, ours, files, JAX_COMPILATION_CACHE_DIR=cache)
                seconds[name].append(round(value, 2))
        words = f"experiments.benchmarks.torch_first {peer}"
        seconds["PyTorch"].append(round(seconds_of(args.peer_python, words, files), 2))
    ratios = {
        name: round(
            statistics.median(
                theirs / ours
                for ours, theirs in zip(seconds[name], seconds["PyTorch"], strict=True)
            ),
            4,
        )
        for name in names[:2]
    }
    return {"row": row, "seconds": seconds, "median_ratios": ratios}


def torch_version(python: str) -> str:
    """The version of torch that a Python has."""
    code = "from importlib.metadata import version; print(version('torch'))"
    try:
        return stdout_of([python, "-c", code], stderr=subprocess.DEVNULL).strip()
    except InputError as error:
        raise InputError(f"{python} has no torch: pass --peer-python, one that has it") from error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("file", help="weights of VGG16 in torchvision's layout")
    parser.add_argument("photo")
    parser.add_argument("--device", required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    for name in (args.file, args.photo):
        if not Path(name).is_file():
            raise InputError(f"no file {name!r}: expected a weight file and a photo")
    check_at_least_one(args, "rounds")
    peer = torch_version(args.peer_python)
    with tempfile.TemporaryDirectory() as folder:
        net = str(Path(folder) / "net.safetensors")
        # Our own format, as a user has it after `vgg-jax import`, which needs torch here.
        stdout_of([args.peer_python, "-m", "vgg_jax", "import", args.file, net])
        files = {"NET": net, "FILE": args.file, "PHOTO": args.photo}
        rows = []
        for row in ROWS:
            rows.append(measure(row, args, files))
            print(json.dumps(rows[-1]), flush=True)
    result = {
        "command": command_line("experiments.benchmarks.first_answer", args.file),
        "device": args.device,
        "versions": {"jax": jax.__version__, "torch": peer},
        "rows": rows,
    }
    atomic_write(Path(args.out), (json.dumps(result, indent=1) + "\n").encode())


if __name__ == "__main__":
    run(main)
