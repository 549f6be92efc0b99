"""Classifies photos with an exported SavedModel, without vgg_jax.

    python -m experiments.examples.serve_savedmodel net.savedmodel photo.jpg

Takes seconds. It prints what `vgg-jax predict --json` prints (`photo.read_views`).
"""

import json
import sys
from pathlib import Path

import tensorflow as tf

from experiments.examples.photo import print_answers

signature = tf.saved_model.load(sys.argv[1]).signatures["serving_default"]
metadata = json.loads(Path(sys.argv[1], "assets.extra/vgg_jax.json").read_text())


def run(view):
    return signature(images=tf.constant(view))[metadata["output"]].numpy()


print_answers(sys.argv[2:], run, metadata)
