"""Classifies a photo with an exported .stablehlo file, without vgg_jax.

    python -m experiments.examples.serve_stablehlo net.stablehlo photo.jpg

Takes seconds.
"""

import json
import sys
import zipfile

import numpy as np
from jax import export
from PIL import Image
from safetensors.numpy import load

with zipfile.ZipFile(sys.argv[1]) as file:
    metadata = json.loads(file.read("metadata.json"))
    weights = load(file.read("weights.safetensors"))
    program = export.deserialize(bytearray(file.read("program")))
image = Image.open(sys.argv[2]).convert("RGB").resize([metadata["image_size"]] * 2)
logits = program.call(weights, np.asarray(image)[None])
print(metadata["classes"][logits[0].argmax()])
