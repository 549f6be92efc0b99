"""Changes valid files at random and reads them: each is read or refused in one sentence, in seconds, without much memory.

    python -m tools.fuzz --seconds 600 --seed 0

Prints a JSON line for each kind of file: how many inputs were tried, how many of them were read and how many refused; and of crashes (any
other exception, or a process that died), of hangs (over HANG seconds), of inputs that took over MEMORY bytes. Those are kept. A worker
process reads, so that one that dies is noticed.
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
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

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
    "flax.h5",
    "mat",
    "packed.mat",
    "caffemodel",
    "V1.caffemodel",
)
HANG = 10  # seconds
MEMORY = 1_000_000_000  # bytes that a worker may grow by; a valid file has thousands


def tensors(layout: str) -> dict[str, np.ndarray]:
    there = next(each for each in LAYOUTS if each.name == layout)
    rng = np.random.default_rng(0)
    return {
        row.foreign_name: rng.normal(size=row.shape).astype(np.float32)
        for row in tensor_table(there, SMALL, 3, False, 8)
    }


def weights_files() -> dict[str, bytes]:
    """A net of kilobytes in each format that `vgg_jax.weights.read` takes, by what its name ends in."""
    import h5py
    import torch
    from safetensors.numpy import save_file
    from scipy.io import savemat

    from tests.weights.test_weights import caffe_messages

    folder = Path(tempfile.mkdtemp())
    paths = {name: folder / f"valid.{name}" for name in WEIGHTS}
    save_file(
        tensors("torchvision"),
        paths["safetensors"],
        {"vgg_jax": json.dumps({"net": "small", "image_size": 8})},
    )
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
    for kind in ("mat", "packed.mat"):
        savemat(paths[kind], {"layers": cells}, do_compression=kind == "packed.mat")
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
                blob.num, blob.channels, blob.height, blob.width = (1,) * (
                    4 - array.ndim
                ) + array.shape
        paths[kind].write_bytes(net.SerializeToString())
    files = {kind: path.read_bytes() for kind, path in paths.items()}
    shutil.rmtree(folder)
    return files


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
    """What the program itself writes and reads again."""
    buffer = io.BytesIO()
    np.savez(
        buffer,
        posteriors=np.ones((3, 2), np.float32) / 2,
        labels=np.arange(3),
        files=np.array(["a", "b", "c"]),
        classes=["x", "y"],
    )
    run = {
        "config": {},
        "classes": ["a", "b"],
        "colours": {
            "mean_rgb": [1, 2, 3],
            "eigenvalues": [3, 2, 1],
            "eigenvectors": [[1, 0, 0]] * 3,
        },
    }
    run |= {"storage": "digits", "train_size": 3, "validation_size": 2}
    listed = (
        '{"file": "train/ants/1.jpg", "reason": "cut"}\n{"file": "caf\\u00e9", "reason": "empty"}\n'
    )
    return {
        "npz": buffer.getvalue(),
        "run.json": json.dumps(run).encode(),
        "jsonl": listed.encode(),
    }


def read_weights(path: Path) -> None:
    read(path)


def read_image(path: Path) -> None:
    from vgg_jax.data import load_resized

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
    """One to eight changes: a bit, a byte, a number of one to eight bytes, a piece that is cut, doubled, moved, or noise."""
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 1, 2, 3, 8])):
        at, length = rng.randrange(len(data) + 1), rng.choice([1, 2, 4, 8, 64, 1024])
        if rng.random() < 0.3:  # where names and sizes lie
            at = rng.randrange(min(len(data), 2000) + 1)
        match rng.randrange(8):
            case 0 if at < len(data):
                data[at] ^= 1 << rng.randrange(8)
            case 1 if at < len(data):
                data[at] = rng.randrange(256)
            case 2:
                size = rng.choice([1, 2, 4, 8])
                number = rng.choice(NUMBERS) % 256**size
                data[at : at + size] = number.to_bytes(size, rng.choice(["little", "big"]))
            case 3:
                del data[at : at + length]
            case 4:
                data[at:at] = data[at : at + length]
            case 5:
                other = rng.randrange(len(data) + 1)
                data[at : at + length] = data[other : other + length]
            case 6:
                data[at:at] = rng.randbytes(length)
            case 7:
                del data[at:]
    return bytes(data)


class HangError(BaseException):
    """Raised by an alarm. No Exception, since libraries turn those into errors of their own."""


def alarm(*_: object) -> None:
    raise HangError


def outcome(kind: str, path: Path) -> str:
    """ "read", "refused", or what else happened."""
    try:
        KINDS[kind][1](path)
    except InputError as error:
        said = str(error)
        return (
            "refused"
            if "\n" not in said and "Traceback" not in said
            else f"said in lines: {said[:300]}"
        )
    except HangError:
        return "hang"
    except Exception as error:
        return f"crash: {type(error).__name__}: {error}"[:300]
    return "read"


def file_name(kind: str) -> str:
    return kind if kind == "run.json" else f"file.{kind}"


def work(kind: str, folder: str, seed: int, seconds: float, pipe: Any) -> None:
    """Sends what came of each input. The input in hand lies in the folder."""
    rng, path = random.Random(seed), Path(folder, file_name(kind))
    CONFIGS["small"] = SMALL
    valid = KINDS[kind][0]()[kind]
    path.write_bytes(valid)
    assert outcome(kind, path) == "read"
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what libraries say of it
    signal.signal(signal.SIGALRM, alarm)
    pipe.send("ready")
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        path.write_bytes(mutated(valid, rng))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        signal.alarm(HANG)
        said = outcome(kind, path)
        signal.alarm(0)
        if (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 > MEMORY:
            said = "memory"
        if said not in ("read", "refused"):
            shutil.copy(
                path,
                f"{folder}/{said.split(':')[0].replace(' ', '-')}-{time.monotonic_ns()}.{kind}",
            )
        pipe.send(said)
    pipe.send(None)


def fuzz(kind: str, seed: int, seconds: float, folder: Path) -> Counter[str]:
    """For so long, in one process after the other, should one die."""
    found: Counter[str] = Counter()
    end = time.monotonic() + seconds
    spawn = multiprocessing.get_context("spawn")
    while (left := end - time.monotonic()) > 0:
        ours, theirs = spawn.Pipe()
        worker = spawn.Process(
            target=work, args=(kind, str(folder), seed, left, theirs), daemon=True
        )
        worker.start()
        theirs.close()
        try:
            said: str | None = "ready" if ours.poll(120) and ours.recv() == "ready" else None
            # An alarm does not reach a library that is in its own loop.
            while said is not None:
                if not ours.poll(2 * HANG):
                    found["hang"] += 1
                    shutil.copy(
                        folder / file_name(kind), folder / f"hang-{time.monotonic_ns()}.{kind}"
                    )
                    break
                said = ours.recv()
                if said is not None:
                    found[said] += 1
        except (EOFError, pickle.UnpicklingError):
            found["crash: the process died"] += 1
            shutil.copy(folder / file_name(kind), folder / f"died-{time.monotonic_ns()}.{kind}")
        worker.kill()
        worker.join()
        seed += 1
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=20, help="for each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--keep", type=Path, help="where inputs that did harm are kept")
    args = parser.parse_args()
    for kind in args.kinds:
        with tempfile.TemporaryDirectory() as temporary:
            folder = args.keep or Path(temporary)
            folder.mkdir(parents=True, exist_ok=True)
            found = fuzz(kind, args.seed, args.seconds, folder)
        fine = {name: found.pop(name, 0) for name in ("read", "refused")}
        print(
            json.dumps(
                {"kind": kind, "seed": args.seed, "tried": sum(fine.values()) + sum(found.values())}
                | fine
                | {"else": found}
            ),
            flush=True,
        )


if __name__ == "__main__":
    main()
