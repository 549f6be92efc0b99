"""Classifies photos with an exported SavedModel, without vgg_jax.

    python -m experiments.examples.serve_savedmodel net.savedmodel photo.jpg

Takes seconds. It prints what `vgg-jax predict --json` prints (`photo.read_views`).
"""

import json
import sys
from pathlib import Path

import tensorflow as tf

from experiments.examples.photo import print_answer, read_views

run = tf.saved_model.load(sys.argv[1]).signatures["serving_default"]
metadata = json.loads(Path(sys.argv[1], "assets.extra/vgg_jax.json").read_text())
for photo in sys.argv[2:]:
    outputs = [run(images=tf.constant(view)) for view in read_views(photo, metadata)]
    print_answer(photo, [output[metadata["output"]].numpy() for output in outputs], metadata)
