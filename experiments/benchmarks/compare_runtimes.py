"""Inference by ONNX Runtime (an exported .onnx file), by PyTorch and by vgg_jax: how far apart their answers are, and how fast they come.

    python -m experiments.compare_runtimes PHOTOS --nets A D --images 50 --batch 10

Centre crops of photos at S = 256 through equal random weights. The three take each batch in turn, so that all see the same machine.
Needs torch, onnx and onnxruntime. Prints one JSON line a net: the largest difference of a logit from ours, relative to the largest
logit, of all images, and the median of images a second over the first half of the batches, three times. About a minute a net on two
cores; D: 10.1 images/s here, 7.2 in ONNX Runtime, 5.5 in PyTorch (results/compare_runtimes.json).
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import onnxruntime
import torch

from experiments.script import run
from tests.helpers.torch_vgg import randomize, to_jax, torch_vgg
from vgg_jax import CONFIGS, IMAGENET, VGG, compiler_options
from vgg_jax.configs.evaluation import EvalProtocol
from vgg_jax.data import open_split, rescaled_images
from vgg_jax.evaluation.dense import iter_windows
from vgg_jax.export import ExportSpec, write
from vgg_jax.inference import pack_kernels
from vgg_jax.preprocessing import preprocess
from vgg_jax.weights import Weights
from vgg_jax.weights.imagenet import CLASSES
from vgg_jax.weights.layouts import Preprocessing

REPEATS = 3


def centre_crops(folder: str, count: int) -> np.ndarray:
    """uint8 (count, 224, 224, 3)"""
    crops = []
    for example in rescaled_images(open_split(folder, "train"), (256,), True):
        (window,) = iter_windows(len(crops), [example["scaled"][0][0]], 224, EvalProtocol("center"))
        crops.append(window.pixels)
        if len(crops) == count:
            break
    return np.stack(crops)


def engines(net: str, folder: Path) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """Functions from uint8 images (N, 224, 224, 3) to logits (N, 1000), all of one net."""
    theirs = randomize(torch_vgg(net, (4096, 4096), 1000), seed=0).eval()
    params, batch_stats = to_jax(theirs, 7)
    model = VGG(CONFIGS[net])
    mean = np.array(IMAGENET.mean_rgb, np.float32)

    weights = Weights(
        net, "vgg_jax", model, params, batch_stats, True, Preprocessing(IMAGENET.mean_rgb), CLASSES
    )
    write(folder / f"{net}.onnx", ExportSpec(weights))
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry(
        "session.intra_op.allow_spinning", "0"
    )  # or its idle threads slow the others down
    session = onnxruntime.InferenceSession(
        folder / f"{net}.onnx", options, providers=["CPUExecutionProvider"]
    )

    variables = pack_kernels({"params": params, "batch_stats": batch_stats})
    forward = jax.jit(
        lambda variables, images: model.apply(variables, preprocess(images, IMAGENET.mean_rgb)),
        compiler_options=compiler_options(optimize_runtime=True),
    )
    fast = theirs.to(memory_format=torch.channels_last)

    def by_torch(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return fast(torch.from_numpy(images - mean).permute(0, 3, 1, 2)).numpy()

    return {
        "vgg_jax": lambda images: np.asarray(forward(variables, images)),
        "onnxruntime": lambda images: session.run(None, {"images": images})[0],
        "torch": by_torch,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder")
    parser.add_argument(
        "--nets", nargs="+", default=["A", "A-LRN", "B", "C", "D", "E"], choices=CONFIGS
    )
    parser.add_argument("--images", type=int, default=50)
    parser.add_argument("--batch", type=int, default=10)
    args = parser.parse_args()
    crops = centre_crops(args.folder, args.images)
    batches = [crops[i : i + args.batch] for i in range(0, len(crops), args.batch)]
    versions = {
        "jax": jax.__version__,
        "torch": torch.__version__,
        "onnxruntime": onnxruntime.__version__,
    }
    with tempfile.TemporaryDirectory() as folder:
        for net in args.nets:
            made = engines(net, Path(folder))
            answers = {
                name: np.concatenate([engine(batch) for batch in batches])
                for name, engine in made.items()
            }
            rates: dict[str, list[float]] = {name: [] for name in made}
            for batch in batches[: -(-len(batches) // 2)] * REPEATS:
                for name, engine in made.items():
                    started = time.perf_counter()
                    engine(batch)
                    rates[name].append(len(batch) / (time.perf_counter() - started))
            ours = answers["vgg_jax"]
            found = {
                "net": net,
                "images": len(crops),
                "batch": args.batch,
                "images_per_second": {
                    name: round(statistics.median(values), 2) for name, values in rates.items()
                },
                "differences": {
                    name: float(np.abs(answers[name] - ours).max() / np.abs(ours).max())
                    for name in list(made)[1:]
                },
                **versions,
            }
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    run(main)
