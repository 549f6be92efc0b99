"""Damaged files of each format that `vgg_jax.weights.read` takes: it must answer or refuse, never crash, hang or fill the memory.

    python -m experiments.fuzz_loaders --count 1000 [--seed 0] > experiments/results/fuzz_loaders.json

Each file is a small valid one with some bytes changed, cut out, doubled or set to extreme numbers, most of them where its names and sizes
lie. They are read in child processes with a limit on memory (256 MB above the start: a library's own needs, since the nets have
kilobytes) and on time (10 s a file). Needs torch, h5py and scipy. Prints one JSON document; about four minutes for a thousand files of
each format on two cores.
"""

import argparse
import json
import multiprocessing
import os
import random
import resource
import signal
import tempfile
from collections import Counter
from pathlib import Path

import h5py
import numpy as np
import torch
from safetensors.numpy import save_file
from scipy.io import savemat

from tests.test_weights import caffe_messages
from vgg_jax import CONFIGS, Conv, InputError, VGGConfig
from vgg_jax.weights import read
from vgg_jax.weights.layouts import LAYOUTS, rows

SMALL = VGGConfig(((Conv(4),), (Conv(6),)), fc=(5, 4))
AT_ONCE = 50  # files a child reads
EXTREME = (b"\x00" * 8, b"\xff" * 8, b"\xff" * 7 + b"\x7f", b"\x80" * 8, (2**31 - 1).to_bytes(8, "little"), (2**40).to_bytes(8, "little"))


def tensors(layout: str) -> dict[str, np.ndarray]:
    there = next(each for each in LAYOUTS if each.name == layout)
    rng = np.random.default_rng(0)
    return {row.theirs: rng.normal(size=row.shape).astype(np.float32) for row in rows(there, SMALL, 3, False, 8)}


def write_valid(folder: Path) -> dict[str, Path]:
    """A file of each format that `read` takes, by what its name ends in."""
    kinds = ("safetensors", "pth", "old.pth", "h5", "3.h5", "flax.h5", "mat", "caffemodel", "V1.caffemodel")
    paths = {name: folder / f"valid.{name}" for name in kinds}
    save_file(tensors("torchvision"), paths["safetensors"], {"vgg_jax": json.dumps({"net": "small", "image_size": 8})})
    state = {name: torch.from_numpy(array) for name, array in tensors("torchvision").items()}
    torch.save(state, paths["pth"])
    torch.save(state, paths["old.pth"], _use_new_zipfile_serialization=False)
    with h5py.File(paths["h5"], "w") as file:
        for name, array in tensors("keras").items():
            layer, _, number = name.partition("/")
            file[f"{layer}/{layer}_{('W', 'b')[int(number)]}_1:0"] = array
    for kind, layout in (("3.h5", "keras 3"), ("flax.h5", "flaxmodels")):
        with h5py.File(paths[kind], "w") as file:
            for name, array in tensors(layout).items():
                file[name] = array
    held: dict[str, dict] = {}
    for name, array in tensors("matconvnet").items():
        layer, _, leaf = name.partition("/")
        held.setdefault(layer, {"name": layer, "type": "conv"})[leaf] = array
    cells = np.empty((1, len(held)), object)
    cells[0] = list(held.values())
    savemat(paths["mat"], {"layers": cells}, do_compression=True)
    for kind in ("caffemodel", "V1.caffemodel"):
        net, layers = caffe_messages()(), {}
        for name, array in tensors("caffe").items():
            layer, _, _ = name.partition("/")
            if layer not in layers:
                layers[layer] = (net.layer if kind == "caffemodel" else net.layers).add(name=layer)
            blob = layers[layer].blobs.add(data=array.ravel())
            if kind == "caffemodel":
                blob.shape.dim.extend(array.shape)
            else:
                blob.num, blob.channels, blob.height, blob.width = (1,) * (4 - array.ndim) + array.shape
        paths[kind].write_bytes(net.SerializeToString())
    return paths


def mutated(content: bytes, draw: random.Random) -> bytes:
    """A copy with one to four changes."""
    data = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(min(len(data), 2000)) if draw.random() < 0.6 else draw.randrange(len(data))
        kind = draw.randrange(5)
        if kind == 0:
            data[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            data[at : at + 8] = draw.choice(EXTREME)
        elif kind == 2:
            del data[at : at + draw.choice((1, 8, 100, len(data)))]
        elif kind == 3:
            data[at:at] = data[at : at + draw.choice((1, 8, 300))]
        else:
            data[at : at + 4] = draw.randbytes(4)
        if not data:
            return b""
    return bytes(data)


def read_all(paths: list[Path], results: multiprocessing.Queue) -> None:
    """In a child process: what each file gave."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, used + 2**28))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    for path in paths:
        signal.alarm(10)  # ends the process: a hang is a crash
        try:
            read(path)
            found = "read"
        except InputError as error:
            found = "too large" if "larger than this machine's memory" in str(error) else "refused"
        except BaseException as error:
            found = f"raised {type(error).__name__}"
        signal.alarm(0)
        results.put((path.name, found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    CONFIGS["small"] = SMALL
    context = multiprocessing.get_context("fork")
    totals: dict[str, Counter] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for kind, valid in write_valid(folder).items():
            assert read(valid).net == "small"
            totals[kind], draw = Counter(), random.Random(args.seed)
            for start in range(0, args.count, AT_ONCE):
                paths = [folder / f"{number}.{kind}" for number in range(start, min(start + AT_ONCE, args.count))]
                for path in paths:
                    path.write_bytes(mutated(valid.read_bytes(), draw))
                while paths:  # a crash loses the rest of the child's files: another child goes on behind the one that crashed
                    results: multiprocessing.Queue = context.SimpleQueue()  # type: ignore[assignment]
                    child = context.Process(target=read_all, args=(paths, results))
                    child.start()
                    child.join()
                    done = 0
                    while not results.empty():
                        totals[kind][results.get()[1]] += 1
                        done += 1
                    if done < len(paths):
                        totals[kind][f"crashed with {child.exitcode}"] += 1
                        done += 1
                    paths = paths[done:]
                for path in folder.glob("[0-9]*"):
                    path.unlink()
    print(json.dumps({"files_of_each": args.count, "seed": args.seed, "results": totals}, indent=1))


if __name__ == "__main__":
    main()
