"""Classifies a photo with an exported .stablehlo file, without vgg_jax.

    python -m experiments.examples.serve_stablehlo net.stablehlo photo.jpg

Takes seconds.
"""

import json
import sys
import zipfile

import numpy as np
from jax import export
from PIL import Image, ImageOps
from safetensors.numpy import load

with zipfile.ZipFile(sys.argv[1]) as file:
    metadata = json.loads(file.read("metadata.json"))
    weights = load(file.read("weights.safetensors"))
    program = export.deserialize(bytearray(file.read("program")))
photo = ImageOps.exif_transpose(Image.open(sys.argv[2])).convert("RGB")
factor = metadata["scale"] / min(photo.size)  # the shorter side becomes the training scale
photo = photo.resize([round(length * factor) for length in photo.size], Image.Resampling.BILINEAR)
side = metadata["image_size"]
left, top = (photo.width - side) // 2, (photo.height - side) // 2
image = photo.crop((left, top, left + side, top + side))
logits = program.call(weights, np.asarray(image)[None])
print(metadata["classes"][logits[0].argmax()])
