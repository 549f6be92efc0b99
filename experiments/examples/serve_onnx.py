"""Classifies photos with an exported .onnx file, without vgg_jax.

    python -m experiments.examples.serve_onnx net.onnx photo.jpg

Takes a second. It prints what `vgg-jax predict --json` prints (`photo.read_views`).
"""

import json
import sys

import onnxruntime

from experiments.examples.photo import print_answer, read_views

session = onnxruntime.InferenceSession(sys.argv[1])
metadata = json.loads(session.get_modelmeta().custom_metadata_map["vgg_jax"])
for photo in sys.argv[2:]:
    outputs = [session.run(None, {"images": view})[0] for view in read_views(photo, metadata)]
    print_answer(photo, outputs, metadata)
