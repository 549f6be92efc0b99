"""Asks an export with `--layout torchvision`: `python -m experiments.examples.serve_torchvision vgg16 net.safetensors photo.jpg`. Takes a second."""

import json
import sys

import torch
import torchvision
from PIL import Image
from safetensors import safe_open

with safe_open(sys.argv[2], "pt") as file:
    about, weights = (
        json.loads(file.metadata()["vgg_jax"]),
        {name: file.get_tensor(name) for name in file.keys()},
    )  # noqa: SIM118
net = getattr(torchvision.models, sys.argv[1])(num_classes=len(about["classes"])).eval()
net.load_state_dict(weights, strict=True)
image = Image.open(sys.argv[3]).convert("RGB").resize([about["image_size"]] * 2)
mean, std = (torch.tensor(about[name]).view(3, 1, 1) for name in ("mean_rgb", "std_rgb"))
pixels = torchvision.transforms.functional.pil_to_tensor(image)
print(about["classes"][net(((pixels - mean) / std)[None]).argmax()])
