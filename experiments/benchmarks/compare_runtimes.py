"""Compares inference in vgg_jax, ONNX Runtime (an exported .onnx file) and PyTorch.

    python -m experiments.benchmarks.compare_runtimes PHOTOS --nets A D --images 50 --batch 10

The images are centre crops of photos at S = 256; the nets have equal random weights. The three
runtimes process each batch in turn, so that all see the same state of the machine.

Needs torch, onnx and onnxruntime. Prints one JSON line a net. "differences" has the largest
difference from the logits of vgg_jax, relative to their largest value. "images_per_second" is the
median over the first half of the batches, three times.

Takes about a minute a net on two cores. For D, results/compare_runtimes.json has 10.1 images/s in
vgg_jax, 7.2 in ONNX Runtime and 5.5 in PyTorch.
"""

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import onnxruntime
import torch

from experiments.script import HelpFormatter, run
from tests.helpers.torch_vgg import randomize, to_jax, torch_vgg
from vgg_jax import CONFIGS, IMAGENET, VGG, compiler_options
from vgg_jax.configs.evaluation import EvalProtocol
from vgg_jax.data import open_split, rescaled_images
from vgg_jax.evaluation.dense import iter_windows
from vgg_jax.export import ExportSpec, write
from vgg_jax.inference import pack_kernels
from vgg_jax.preprocessing import subtract_mean
from vgg_jax.weights import Weights
from vgg_jax.weights.imagenet import CLASSES
from vgg_jax.weights.layouts import Preprocessing

REPEATS = 3


def centre_crops(folder: str, count: int) -> np.ndarray:
    """uint8 (count, 224, 224, 3)."""
    crops = []
    for example in rescaled_images(open_split(folder, "train"), (256,), True):
        (window,) = iter_windows(len(crops), [example["scaled"][0][0]], 224, EvalProtocol("center"))
        crops.append(window.pixels)
        if len(crops) == count:
            break
    return np.stack(crops)


Runtime = Callable[[np.ndarray], np.ndarray]  # uint8 images (N, 224, 224, 3) -> logits (N, 1000)


def load_runtimes(net: str, folder: Path) -> dict[str, Runtime]:
    """The same net in each runtime, by the runtime's name."""
    torch_net = randomize(torch_vgg(net, (4096, 4096), 1000), seed=0).eval()
    params, batch_stats = to_jax(torch_net, 7)
    model = VGG(CONFIGS[net])
    mean = np.array(IMAGENET.mean_rgb, np.float32)

    weights = Weights(
        net=net,
        layout="vgg_jax",
        model=model,
        params=params,
        batch_stats=batch_stats,
        top=True,
        preprocessing=Preprocessing(IMAGENET.mean_rgb),
        classes=CLASSES,
    )
    write(folder / f"{net}.onnx", ExportSpec(weights))
    options = onnxruntime.SessionOptions()
    # Its idle threads would slow down the other runtimes.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(
        folder / f"{net}.onnx", options, providers=["CPUExecutionProvider"]
    )

    variables = pack_kernels({"params": params, "batch_stats": batch_stats})
    forward = jax.jit(
        lambda variables, images: model.apply(variables, subtract_mean(images, IMAGENET.mean_rgb)),
        compiler_options=compiler_options(optimize_runtime=True),
    )
    torch_net = torch_net.to(memory_format=torch.channels_last)

    def run_torch(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return torch_net(torch.from_numpy(images - mean).permute(0, 3, 1, 2)).numpy()

    return {
        "vgg_jax": lambda images: np.asarray(forward(variables, images)),
        "onnxruntime": lambda images: session.run(None, {"images": images})[0],
        "torch": run_torch,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
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
            runtimes = load_runtimes(net, Path(folder))
            result = {
                "net": net,
                "images": len(crops),
                "batch": args.batch,
                **compare(runtimes, batches),
                **versions,
            }
            print(json.dumps(result), flush=True)


def compare(runtimes: dict[str, Runtime], batches: list[np.ndarray]) -> dict:
    """Median speed of each runtime, and its largest difference from vgg_jax."""
    logits = {
        name: np.concatenate([runtime(batch) for batch in batches])
        for name, runtime in runtimes.items()
    }
    speeds: dict[str, list[float]] = {name: [] for name in runtimes}
    first_half = batches[: math.ceil(len(batches) / 2)]
    for batch in first_half * REPEATS:
        for name, runtime in runtimes.items():
            start = time.perf_counter()
            runtime(batch)
            speeds[name].append(len(batch) / (time.perf_counter() - start))
    own = logits.pop("vgg_jax")
    return {
        "images_per_second": {
            name: round(statistics.median(values), 2) for name, values in speeds.items()
        },
        "differences": {
            name: float(np.abs(values - own).max() / np.abs(own).max())
            for name, values in logits.items()
        },
    }


if __name__ == "__main__":
    run(main)
