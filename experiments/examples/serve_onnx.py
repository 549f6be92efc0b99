"""Classifies a photo with an exported .onnx file, without vgg_jax.

    python -m experiments.examples.serve_onnx net.onnx photo.jpg

Takes a second.
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image

session = onnxruntime.InferenceSession(sys.argv[1])
metadata = json.loads(session.get_modelmeta().custom_metadata_map["vgg_jax"])
image = Image.open(sys.argv[2]).convert("RGB").resize([metadata["image_size"]] * 2)
(logits,) = session.run(None, {"images": np.asarray(image)[None]})
print(metadata["classes"][logits[0].argmax()])
