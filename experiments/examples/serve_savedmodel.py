"""Asks an exported SavedModel without vgg_jax: `python -m experiments.examples.serve_savedmodel net.savedmodel photo.jpg`. Takes seconds."""

import json
import sys

import numpy as np
import tensorflow as tf
from PIL import Image

net = tf.saved_model.load(sys.argv[1]).signatures["serving_default"]
about = json.load(open(sys.argv[1] + "/assets.extra/vgg_jax.json"))  # noqa: SIM115
image = Image.open(sys.argv[2]).convert("RGB").resize([about["image_size"]] * 2)
answer = net(images=tf.constant(np.asarray(image)[None]))[about["output"]].numpy()
print(about["classes"][answer[0].argmax()])
