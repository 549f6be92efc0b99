"""Classifies a photo with an exported .onnx file, without vgg_jax.

    python -m experiments.examples.serve_onnx net.onnx photo.jpg

Takes a second.
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

session = onnxruntime.InferenceSession(sys.argv[1])
metadata = json.loads(session.get_modelmeta().custom_metadata_map["vgg_jax"])
photo = ImageOps.exif_transpose(Image.open(sys.argv[2])).convert("RGB")
factor = metadata["scale"] / min(photo.size)  # the shorter side becomes the training scale
photo = photo.resize([round(length * factor) for length in photo.size], Image.Resampling.BILINEAR)
side = metadata["image_size"]
left, top = (photo.width - side) // 2, (photo.height - side) // 2
image = photo.crop((left, top, left + side, top + side))
(logits,) = session.run(None, {"images": np.asarray(image)[None]})
print(metadata["classes"][logits[0].argmax()])
