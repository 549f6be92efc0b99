"""A user's program: draws a net, computes logits, and saves the net."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

import vgg_jax
from vgg_jax.weights import Weights, save
from vgg_jax.weights.layouts import Preprocessing

CLASSES = tuple("abcdefghij")

config = dataclasses.replace(vgg_jax.CONFIGS["A"], fc=(8, 8))
model = vgg_jax.VGG(config, num_classes=len(CLASSES), image_size=32)
images = jnp.zeros((2, 32, 32, 3))
variables = jax.jit(model.init)(jax.random.key(0), images)
logits: Any = model.apply(variables, images)
print(logits.shape)
preprocessing = Preprocessing(vgg_jax.IMAGENET.mean_rgb)
weights = Weights("A", "vgg_jax", model, variables["params"], {}, True, preprocessing, CLASSES)
save("net.safetensors", weights)
