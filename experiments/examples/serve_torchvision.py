"""Classifies a photo in torchvision, with weights of `vgg-jax export --layout torchvision`.

    python -m experiments.examples.serve_torchvision vgg16 net.safetensors photo.jpg

Takes a second.
"""

import json
import sys

import torch
import torchvision
from PIL import Image, ImageOps
from safetensors import safe_open

arch, weights_path, image_path = sys.argv[1:]
with safe_open(weights_path, "pt") as file:
    metadata = json.loads(file.metadata()["vgg_jax"])
    weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
net = getattr(torchvision.models, arch)(num_classes=len(metadata["classes"])).eval()
net.load_state_dict(weights, strict=True)
photo = ImageOps.exif_transpose(Image.open(image_path)).convert("RGB")
factor = metadata["scale"] / min(photo.size)  # the shorter side becomes the training scale
photo = photo.resize([round(length * factor) for length in photo.size], Image.Resampling.BILINEAR)
side = metadata["image_size"]
left, top = (photo.width - side) // 2, (photo.height - side) // 2
image = photo.crop((left, top, left + side, top + side))
mean, std = (torch.tensor(metadata[name]).view(3, 1, 1) for name in ("mean_rgb", "std_rgb"))
pixels = torchvision.transforms.functional.pil_to_tensor(image)
print(metadata["classes"][net(((pixels - mean) / std)[None]).argmax()])
