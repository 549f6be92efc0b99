"""Classifies a photo with an exported SavedModel, without vgg_jax.

    python -m experiments.examples.serve_savedmodel net.savedmodel photo.jpg

Takes seconds.
"""

import json
import sys
from pathlib import Path

import numpy as np
import tensorflow as tf
from PIL import Image

signature = tf.saved_model.load(sys.argv[1]).signatures["serving_default"]
metadata = json.loads(Path(sys.argv[1], "assets.extra/vgg_jax.json").read_text())
image = Image.open(sys.argv[2]).convert("RGB").resize([metadata["image_size"]] * 2)
output = signature(images=tf.constant(np.asarray(image)[None]))[metadata["output"]].numpy()
print(metadata["classes"][output[0].argmax()])
