"""Asks an exported .stablehlo file without vgg_jax: `python -m experiments.examples.serve_stablehlo net.stablehlo photo.jpg`. Takes seconds."""

import json
import sys
import zipfile

import numpy as np
from jax import export
from PIL import Image
from safetensors.numpy import load

with zipfile.ZipFile(sys.argv[1]) as file:
    about, weights = json.loads(file.read("metadata.json")), load(file.read("weights.safetensors"))
    net = export.deserialize(bytearray(file.read("program")))
image = Image.open(sys.argv[2]).convert("RGB").resize([about["image_size"]] * 2)
answer = net.call(weights, np.asarray(image)[None])
print(about["classes"][answer[0].argmax()])
