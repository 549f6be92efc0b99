"""Classifies a photo with an exported SavedModel, without vgg_jax.

    python -m experiments.examples.serve_savedmodel net.savedmodel photo.jpg

Takes seconds.
"""

import json
import sys
from pathlib import Path

import numpy as np
import tensorflow as tf
from PIL import Image, ImageOps

signature = tf.saved_model.load(sys.argv[1]).signatures["serving_default"]
metadata = json.loads(Path(sys.argv[1], "assets.extra/vgg_jax.json").read_text())
photo = ImageOps.exif_transpose(Image.open(sys.argv[2])).convert("RGB")
factor = metadata["scale"] / min(photo.size)  # the shorter side becomes the training scale
photo = photo.resize([round(length * factor) for length in photo.size], Image.Resampling.BILINEAR)
side = metadata["image_size"]
left, top = (photo.width - side) // 2, (photo.height - side) // 2
image = photo.crop((left, top, left + side, top + side))
output = signature(images=tf.constant(np.asarray(image)[None]))[metadata["output"]].numpy()
print(metadata["classes"][output[0].argmax()])
