"""Asks an exported .onnx file without vgg_jax: `python -m experiments.examples.serve_onnx net.onnx photo.jpg`. Takes a second."""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image

net = onnxruntime.InferenceSession(sys.argv[1])
about = json.loads(net.get_modelmeta().custom_metadata_map["vgg_jax"])
image = Image.open(sys.argv[2]).convert("RGB").resize([about["image_size"]] * 2)
(answer,) = net.run(None, {"images": np.asarray(image)[None]})
print(about["classes"][answer[0].argmax()])
