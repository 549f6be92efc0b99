"""Exchanges full-size nets with torchvision, and compares every layer with PyTorch.

    python -m experiments.paper.check_weights PHOTOS

All eight nets of torchvision get random weights. vgg_jax reads each state_dict, computes logits for
photos, and writes the net in torchvision's layout; torchvision loads that with strict=True. The
layers of every configuration are compared with PyTorch's.

Needs torch and torchvision. Prints one JSON line a net. Takes half a minute a net on two cores.
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

from experiments.script import HelpFormatter, run
from vgg_jax import CONFIGS, IMAGENET, VGG, compiler_options
from vgg_jax.errors import InputError
from vgg_jax.weights import Weights, read, save
from vgg_jax.weights.compare_torch import compare_with_torch
from vgg_jax.weights.imagenet import CLASSES
from vgg_jax.weights.layouts import TORCHVISION, Preprocessing

NETS = [f"vgg{depth}{suffix}" for suffix in ("", "_bn") for depth in (11, 13, 16, 19)]


def load_photos(folder: str, count: int) -> np.ndarray:
    """float32 (count, 224, 224, 3)."""
    files = sorted(Path(folder).glob("*/*"))[:count]
    if not files:
        raise InputError(f"no photos {folder}/<class>/*: expected a folder of images by class")
    resized = [Image.open(file).convert("RGB").resize((224, 224)) for file in files]
    return np.stack([np.asarray(image, np.float32) for image in resized])


def exchange(name: str, images: np.ndarray, folder: Path) -> dict:
    """Reads a net of torchvision, compares its logits, and has torchvision load it back."""
    torch.manual_seed(0)
    torch_net = getattr(torchvision.models, name)(weights=None).eval()
    for module in torch_net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    torch.save(torch_net.state_dict(), folder / "net.pth")
    weights = read(folder / "net.pth")
    forward = jax.jit(weights.model.apply, compiler_options=compiler_options())
    centred = images - np.float32(weights.preprocessing.mean_rgb)
    logits = np.asarray(forward(weights.variables, centred))
    with torch.inference_mode():
        normalized = (images - np.float32(TORCHVISION.mean_rgb)) / np.float32(TORCHVISION.std_rgb)
        expected = torch_net(torch.from_numpy(normalized.transpose(0, 3, 1, 2).copy())).numpy()

    save(folder / "back.safetensors", weights, "torchvision")
    back = getattr(torchvision.models, name)(weights=None)
    back.load_state_dict(load_file(folder / "back.safetensors"), strict=True)
    state = back.state_dict()
    equal = all(
        torch.equal(state[key], value)
        for key, value in torch_net.state_dict().items()
        if "num_batches_tracked" not in key  # counts training steps; not in our files
    )
    return {
        "net": name,
        "recognised": weights.net,
        "logits": float(np.abs(logits - expected).max() / np.abs(expected).max()),
        "largest_of_layers": max(compare_with_torch(weights).values()),
        "back_bit_equal": equal,
    }


def compare_layers(net: str) -> dict:
    """Compares the layers of a configuration that torchvision does not have."""
    model = VGG(CONFIGS[net], initializer="he")
    init = jax.jit(
        lambda key: model.init(key, np.zeros((1, 224, 224, 3), np.float32)),
        compiler_options=compiler_options(),
    )
    weights = Weights(
        net=net,
        layout="vgg_jax",
        model=model,
        params=jax.tree.map(np.asarray, init(jax.random.key(0))["params"]),
        batch_stats={},
        top=True,
        preprocessing=Preprocessing(IMAGENET.mean_rgb),
        classes=CLASSES,
    )
    return {"net": net, "largest_of_layers": max(compare_with_torch(weights).values())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("folder")
    images = load_photos(parser.parse_args().folder, 4)
    for name in NETS:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(exchange(name, images, Path(folder))), flush=True)
    for net in ("A-LRN", "C"):
        print(json.dumps(compare_layers(net)), flush=True)


if __name__ == "__main__":
    run(main)
