"""Changes valid files at random and reads them.

    python -m tools.fuzz --seconds 600 --seed 0

Each file must be read, or refused in one sentence, in seconds and without much memory.

Prints a JSON line for each kind of file: the inputs that were tried, read and refused. "else"
counts crashes (another exception, or the end of the process), hangs (over HANG seconds) and inputs
that took over MEMORY bytes; --keep keeps these inputs. A worker process does the reading, so
its end is noticed.
"""

import argparse
import io
import json
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from experiments.script import HelpFormatter
from tests.helpers.weights_files import add_caffe_blob, caffe_messages
from vgg_jax import CONFIGS, Conv, InputError, VGGConfig
from vgg_jax.weights import read
from vgg_jax.weights.layouts import LAYOUTS, tensor_table

SMALL = VGGConfig(((Conv(4),), (Conv(6),)), fc=(5, 4))
WEIGHTS = (
    "safetensors",
    "pth",
    "old.pth",
    "h5",
    "3.h5",
    "keras",
    "flax.h5",
    "mat",
    "packed.mat",
    "caffemodel",
    "V1.caffemodel",
)
HANG = 10  # seconds
MEMORY = 1_000_000_000  # bytes that a worker may grow by; valid files have thousands


def random_tensors(layout: str) -> dict[str, np.ndarray]:
    """Tensors of the net SMALL, by their names in a layout."""
    rng = np.random.default_rng(0)
    return {
        tensor.foreign_name: rng.normal(size=tensor.foreign_shape).astype(np.float32)
        for tensor in tensor_table(LAYOUTS[layout], SMALL, 3, False, 8)
    }


def weights_files() -> dict[str, bytes]:
    """A net of kilobytes in each format that `vgg_jax.weights.read` reads, by file suffix."""
    with tempfile.TemporaryDirectory() as folder:
        paths = {kind: Path(folder, f"valid.{kind}") for kind in WEIGHTS}
        write_torchvision(paths["safetensors"], paths["pth"], paths["old.pth"])
        write_hdf5(paths["h5"], paths["3.h5"], paths["flax.h5"])
        write_keras(paths["keras"], paths["3.h5"])
        write_matconvnet(paths["mat"], compressed=False)
        write_matconvnet(paths["packed.mat"], compressed=True)
        write_caffe(paths["caffemodel"], v1=False)
        write_caffe(paths["V1.caffemodel"], v1=True)
        return {kind: path.read_bytes() for kind, path in paths.items()}


def write_torchvision(safetensors: Path, zipped: Path, legacy: Path) -> None:
    import torch
    from safetensors.numpy import save_file

    tensors = random_tensors("torchvision")
    save_file(tensors, safetensors, {"vgg_jax": json.dumps({"net": "small", "image_size": 8})})
    state = {name: torch.from_numpy(array) for name, array in tensors.items()}
    torch.save(state, zipped)
    torch.save(state, legacy, _use_new_zipfile_serialization=False)


def write_hdf5(keras: Path, keras3: Path, flaxmodels: Path) -> None:
    import h5py

    with h5py.File(keras, "w") as file:
        for name, array in random_tensors("keras").items():
            layer, _, index = name.partition("/")
            file[f"{layer}/{layer}_{('W', 'b')[int(index)]}_1:0"] = array
    for path, layout in ((keras3, "keras 3"), (flaxmodels, "flaxmodels")):
        with h5py.File(path, "w") as file:
            for name, array in random_tensors(layout).items():
                file[name] = array


def write_keras(path: Path, weights: Path) -> None:
    """A classifier of KerasHub, whose description tells the preprocessing."""
    converter = {"class_name": "VGGImageConverter", "config": {"scale": [0.017] * 3}}
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("config.json", json.dumps({"config": {"image_converter": converter}}))
        file.write(weights, "model.weights.h5")


def write_matconvnet(path: Path, compressed: bool) -> None:
    from scipy.io import savemat

    layers: dict[str, dict] = {}
    for name, array in random_tensors("matconvnet").items():
        layer, _, param = name.partition("/")
        layers.setdefault(layer, {"name": layer, "type": "conv"})[param] = array
    cells = np.empty((1, len(layers)), object)
    cells[0] = list(layers.values())
    savemat(path, {"layers": cells}, do_compression=compressed)


def write_caffe(path: Path, v1: bool) -> None:
    net, layers = caffe_messages()(), {}
    for name, array in random_tensors("caffe").items():
        layer, _, _ = name.partition("/")
        if layer not in layers:
            layers[layer] = (net.layers if v1 else net.layer).add(name=layer)
        add_caffe_blob(layers[layer], array, v1)
    path.write_bytes(net.SerializeToString())


def image_files() -> dict[str, bytes]:
    from PIL import Image

    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (24, 20, 3), np.uint8))
    exif = Image.Exif()
    exif[0x112] = 6
    files = {}
    for name, options in {
        "jpg": {"exif": exif},
        "png": {},
        "gif": {},
        "webp": {},
        "bmp": {},
    }.items():
        buffer = io.BytesIO()
        image.save(buffer, {"jpg": "JPEG"}.get(name, name.upper()), **options)
        files[name] = buffer.getvalue()
    return files


def other_files() -> dict[str, bytes]:
    """Files that the program writes and reads again."""
    buffer = io.BytesIO()
    np.savez(
        buffer,
        posteriors=np.ones((3, 2), np.float32) / 2,
        labels=np.arange(3),
        files=np.array(["a", "b", "c"]),
        classes=["x", "y"],
    )
    metadata = {
        "config": {},
        "classes": ["a", "b"],
        "colours": {
            "mean_rgb": [1, 2, 3],
            "eigenvalues": [3, 2, 1],
            "eigenvectors": [[1, 0, 0]] * 3,
        },
        "storage": "digits",
        "train_size": 3,
        "validation_size": 2,
    }
    exclude_list = (
        '{"file": "train/ants/1.jpg", "reason": "cut"}\n{"file": "caf\\u00e9", "reason": "empty"}\n'
    )
    return {
        "npz": buffer.getvalue(),
        "run.json": json.dumps(metadata).encode(),
        "jsonl": exclude_list.encode(),
    }


def read_weights(path: Path) -> None:
    # The names of Keras 3 do not tell the preprocessing.
    read(path, preprocessing="caffe" if path.name.endswith(".3.h5") else None)


def read_image(path: Path) -> None:
    from vgg_jax.preprocessing import load_resized

    load_resized(str(path), (32,), True)


def read_posteriors(path: Path) -> None:
    from vgg_jax.evaluation.evaluate import load_evaluation

    load_evaluation(path)


def read_run(path: Path) -> None:
    from vgg_jax.runs.metadata import load_run

    load_run(path.parent)


def read_list(path: Path) -> None:
    from vgg_jax.data import read_exclude_list

    read_exclude_list(str(path))


KINDS: dict[str, tuple[Callable[[], dict[str, bytes]], Callable[[Path], None]]] = {
    **dict.fromkeys(WEIGHTS, (weights_files, read_weights)),
    **dict.fromkeys(("jpg", "png", "gif", "webp", "bmp"), (image_files, read_image)),
    "npz": (other_files, read_posteriors),
    "run.json": (other_files, read_run),
    "jsonl": (other_files, read_list),
}
NUMBERS = [
    0,
    1,
    2**7,
    2**8 - 1,
    2**15,
    2**16 - 1,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**40,
    2**63 - 1,
    2**64 - 1,
]


def mutated(content: bytes, rng: random.Random) -> bytes:
    """Makes one to eight changes.

    Each changes a bit, a byte or a number of one to eight bytes, or cuts, doubles, copies or
    inserts a piece.
    """
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 1, 2, 3, 8])):
        start, length = rng.randrange(len(data) + 1), rng.choice([1, 2, 4, 8, 64, 1024])
        if rng.random() < 0.3:  # the part with names and sizes
            start = rng.randrange(min(len(data), 2000) + 1)
        match rng.randrange(8):
            case 0 if start < len(data):
                data[start] ^= 1 << rng.randrange(8)
            case 1 if start < len(data):
                data[start] = rng.randrange(256)
            case 2:
                size = rng.choice([1, 2, 4, 8])
                number = rng.choice(NUMBERS) % 256**size
                data[start : start + size] = number.to_bytes(size, rng.choice(["little", "big"]))
            case 3:
                del data[start : start + length]
            case 4:
                data[start:start] = data[start : start + length]
            case 5:
                other = rng.randrange(len(data) + 1)
                data[start : start + length] = data[other : other + length]
            case 6:
                data[start:start] = rng.randbytes(length)
            case 7:
                del data[start:]
    return bytes(data)


class HangError(BaseException):
    """Raised by an alarm. It is no Exception, because libraries catch those."""


def alarm(*_: object) -> None:
    raise HangError


def outcome(kind: str, path: Path) -> str:
    """Reads a file. Returns "read", "refused", or a description of another outcome."""
    try:
        KINDS[kind][1](path)
    except InputError as error:
        message = str(error)
        if "\n" in message or "Traceback" in message:
            return f"several lines: {message[:300]}"
        return "refused"
    except HangError:
        return "hang"
    except Exception as error:
        return f"crash: {type(error).__name__}: {error}"[:300]
    return "read"


def file_name(kind: str) -> str:
    return kind if kind == "run.json" else f"file.{kind}"


def work(kind: str, folder: str, seed: int, seconds: float, pipe: Any) -> None:
    """Reads changed files and sends the outcomes; the current file is in the folder."""
    rng, path = random.Random(seed), Path(folder, file_name(kind))
    CONFIGS["small"] = SMALL
    valid = KINDS[kind][0]()[kind]
    path.write_bytes(valid)
    if (valid_outcome := outcome(kind, path)) != "read":
        raise RuntimeError(f"the valid {kind} file: {valid_outcome}")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # hide the messages of libraries
    signal.signal(signal.SIGALRM, alarm)
    pipe.send("ready")
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        path.write_bytes(mutated(valid, rng))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        signal.alarm(HANG)
        result = outcome(kind, path)
        signal.alarm(0)
        if (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 > MEMORY:
            result = "memory"
        if result not in ("read", "refused"):
            keep(path, result.split(":")[0].replace(" ", "-"), kind)
        pipe.send(result)
    pipe.send(None)


def keep(path: Path, prefix: str, kind: str) -> None:
    shutil.copy(path, path.with_name(f"{prefix}-{time.monotonic_ns()}.{kind}"))


def fuzz(kind: str, seed: int, seconds: float, folder: Path) -> Counter[str]:
    """Counts the outcomes of one kind of file, in a new process whenever one dies."""
    outcomes: Counter[str] = Counter()
    path = folder / file_name(kind)
    end = time.monotonic() + seconds
    spawn = multiprocessing.get_context("spawn")
    while (remaining := end - time.monotonic()) > 0:
        receiver, sender = spawn.Pipe()
        worker = spawn.Process(
            target=work, args=(kind, str(folder), seed, remaining, sender), daemon=True
        )
        worker.start()
        sender.close()
        try:
            is_ready = receiver.poll(120) and receiver.recv() == "ready"
            result: str | None = "ready" if is_ready else None
            while result is not None:
                # The worker's alarm does not interrupt a loop inside a library.
                if not receiver.poll(2 * HANG):
                    outcomes["hang"] += 1
                    keep(path, "hang", kind)
                    break
                result = receiver.recv()
                if result is not None:
                    outcomes[result] += 1
        except (EOFError, pickle.UnpicklingError):
            outcomes["crash: the process died"] += 1
            keep(path, "died", kind)
        worker.kill()
        worker.join()
        seed += 1
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--seconds", type=float, default=20, help="for each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--keep", type=Path, help="folder to keep harmful inputs in")
    args = parser.parse_args()
    for kind in args.kinds:
        with tempfile.TemporaryDirectory() as temporary:
            folder = args.keep or Path(temporary)
            folder.mkdir(parents=True, exist_ok=True)
            outcomes = fuzz(kind, args.seed, args.seconds, folder)
        counts = {
            "kind": kind,
            "seed": args.seed,
            "tried": outcomes.total(),
            "read": outcomes.pop("read", 0),
            "refused": outcomes.pop("refused", 0),
            "else": outcomes,
        }
        print(json.dumps(counts), flush=True)


if __name__ == "__main__":
    main()
