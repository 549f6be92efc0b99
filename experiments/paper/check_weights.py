"""Full-size nets of torchvision, all eight, in and out again; and every configuration layer by layer beside PyTorch.

    python -m experiments.paper.check_weights PHOTOS

Random weights: each net's state_dict is saved, read here, asked about photos, written in torchvision's layout, and loaded by torchvision
with strict=True. Needs torch and torchvision; prints one JSON line a net. Half a minute each on two cores.
"""

import argparse
import json
import tempfile
from pathlib import Path

import jax
import numpy as np
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file

from experiments.script import run
from vgg_jax import CONFIGS, IMAGENET, VGG, compiler_options
from vgg_jax.errors import InputError
from vgg_jax.weights import Weights, read, save
from vgg_jax.weights.compare_torch import compare_with_torch
from vgg_jax.weights.imagenet import CLASSES
from vgg_jax.weights.layouts import TORCHVISION, Preprocessing

NETS = [f"vgg{depth}{suffix}" for suffix in ("", "_bn") for depth in (11, 13, 16, 19)]


def photos(folder: str, count: int) -> np.ndarray:
    files = sorted(Path(folder).glob("*/*"))[:count]
    if not files:
        raise InputError(f"no photos {folder}/<class>/*: expected a folder of images by class")
    return np.stack(
        [
            np.asarray(Image.open(file).convert("RGB").resize((224, 224)), np.float32)
            for file in files
        ]
    )


def goes_in_and_out(name: str, images: np.ndarray, folder: Path) -> dict:
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, name)(weights=None).eval()
    for module in theirs.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    torch.save(theirs.state_dict(), folder / "net.pth")
    weights = read(folder / "net.pth")
    forward = jax.jit(weights.model.apply, compiler_options=compiler_options())
    ours = np.asarray(
        forward(weights.variables, images - np.float32(weights.preprocessing.mean_rgb))
    )
    with torch.inference_mode():
        normalized = (images - np.float32(TORCHVISION.mean_rgb)) / np.float32(TORCHVISION.std_rgb)
        expected = theirs(torch.from_numpy(normalized.transpose(0, 3, 1, 2).copy())).numpy()

    save(folder / "back.safetensors", weights, "torchvision")
    back = getattr(torchvision.models, name)(weights=None)
    back.load_state_dict(load_file(folder / "back.safetensors"), strict=True)
    counters = "num_batches_tracked"  # of training, not in our files
    equal = all(
        torch.equal(back.state_dict()[key], value)
        for key, value in theirs.state_dict().items()
        if counters not in key
    )
    return {
        "net": name,
        "recognised": weights.net,
        "logits": float(np.abs(ours - expected).max() / np.abs(expected).max()),
        "largest_of_layers": max(compare_with_torch(weights).values()),
        "back_bit_equal": equal,
    }


def layer_by_layer(net: str) -> dict:
    """For the configurations that torchvision does not have."""
    model = VGG(CONFIGS[net], initializer="he")
    init = jax.jit(
        lambda key: model.init(key, np.zeros((1, 224, 224, 3), np.float32)),
        compiler_options=compiler_options(),
    )
    params = jax.tree.map(np.asarray, init(jax.random.key(0))["params"])
    weights = Weights(
        net, "vgg_jax", model, params, {}, True, Preprocessing(IMAGENET.mean_rgb), CLASSES
    )
    return {"net": net, "largest_of_layers": max(compare_with_torch(weights).values())}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder")
    images = photos(parser.parse_args().folder, 4)
    for name in NETS:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(goes_in_and_out(name, images, Path(folder))), flush=True)
    for net in ("A-LRN", "C"):
        print(json.dumps(layer_by_layer(net)), flush=True)


if __name__ == "__main__":
    run(main)
