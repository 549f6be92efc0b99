"""Classifies photos in torchvision, with weights of `vgg-jax export --layout torchvision`.

    python -m experiments.examples.serve_torchvision vgg16 net.safetensors photo.jpg

Takes a second. It prints what `vgg-jax predict --protocol center --json` prints.
"""

import json
import sys

import torch
import torchvision
from safetensors import safe_open

from experiments.examples.photo import print_answers

with safe_open(sys.argv[2], "pt") as file:
    metadata = json.loads(file.metadata()["vgg_jax"])
    weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
net = getattr(torchvision.models, sys.argv[1])(num_classes=len(metadata["classes"])).eval()
net.load_state_dict(weights, strict=True)
mean, std = torch.tensor(metadata["mean_rgb"]), torch.tensor(metadata["std_rgb"])


def run(view):
    image = (torch.tensor(view) - mean) / std
    with torch.no_grad():
        return net(image.permute(0, 3, 1, 2)).numpy()


print_answers(sys.argv[3:], run, metadata)
