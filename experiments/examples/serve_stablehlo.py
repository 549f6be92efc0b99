"""Classifies photos with an exported .stablehlo file, without vgg_jax.

    python -m experiments.examples.serve_stablehlo net.stablehlo photo.jpg

Takes seconds. It prints what `vgg-jax predict --json` prints (`photo.read_views`).
"""

import json
import sys
import zipfile

from jax import export
from safetensors.numpy import load

from experiments.examples.photo import print_answers

with zipfile.ZipFile(sys.argv[1]) as file:
    metadata = json.loads(file.read("metadata.json"))
    weights = load(file.read("weights.safetensors"))
    program = export.deserialize(bytearray(file.read("program")))
print_answers(sys.argv[2:], lambda view: program.call(weights, view), metadata)
