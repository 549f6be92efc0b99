"""Classifies photos with an exported .onnx file, without vgg_jax.

    python -m experiments.examples.serve_onnx net.onnx photo.jpg

Takes a second. It prints what `vgg-jax predict --json` prints (`photo.read_views`).
"""

import json
import sys

import onnxruntime

from experiments.examples.photo import print_answers

session = onnxruntime.InferenceSession(sys.argv[1])
metadata = json.loads(session.get_modelmeta().custom_metadata_map["vgg_jax"])
print_answers(sys.argv[2:], lambda view: session.run(None, {"images": view})[0], metadata)
