"""Exports a net as a TensorFlow SavedModel, which TF Serving loads and LiteRT converts.

It has TensorFlow's own operations only.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from vgg_jax.configs.models import Layer
from vgg_jax.data import tf  # configured to use no GPU
from vgg_jax.export.spec import SAVEDMODEL_METADATA, ExportSpec
from vgg_jax.layers import BatchNorm


def write(path: Path, spec: ExportSpec) -> None:
    """Writes a SavedModel folder.

    It has one signature, `serving_default`: {"images": …} -> {output: …}. The metadata are in
    assets.extra.

    Args:
        path: The folder; it must not exist.
        spec: The net, with its inputs and outputs.
    """
    module = Module(spec)
    model = spec.weights.model
    size = model.image_size if spec.output == "logits" else None
    images = tf.TensorSpec(
        (None, size, size, model.in_channels), tf.uint8 if spec.uint8 else tf.float32, name="images"
    )
    tf.saved_model.save(module, str(path), signatures=module.answer.get_concrete_function(images))
    (path / SAVEDMODEL_METADATA).parent.mkdir()
    (path / SAVEDMODEL_METADATA).write_text(json.dumps(spec.metadata()))


class Module(tf.Module):
    """The layers of a net, applied one by one."""

    def __init__(self, spec: ExportSpec) -> None:
        super().__init__("vgg")
        self._mean = tf.constant(spec.mean_rgb, tf.float32)
        self._table = spec.table
        self._output, self._uint8 = spec.output, spec.uint8
        self._image_shape = (spec.weights.model.image_size,) * 2 + (spec.weights.model.in_channels,)
        self._pool = spec.weights.model.pool
        # TensorFlow's attribute names must not have a slash.
        self._weights = {
            f"{layer}_{param}": tf.Variable(
                _to_tensor(np.asarray(array), spec.bfloat16),
                trainable=False,
                name=f"{layer}/{param}",
            )
            for layers in spec.weights.variables.values()
            for layer, params in layers.items()
            for param, array in params.items()
        }

    @tf.function
    def answer(self, images: Any) -> Any:
        """Computes the output for images (N, H, W, C), as {output name: tensor}."""
        x = self._check_size(images)
        x = tf.cast(x, tf.float32) - self._mean if self._uint8 else x
        for layer in self._table:
            x = self._apply(layer, x)
        if self._output == "score_map":
            return {"score_map": x}
        x = tf.reduce_mean(x, (1, 2))
        return {"logits": x} if self._output == "logits" else {"posteriors": tf.nn.softmax(x)}

    def _check_size(self, images: Any) -> Any:
        """Returns the images, and fails for a size that the net cannot read.

        TensorFlow and LiteRT do not compare images with the signature, LiteRT drops `tf.Assert`,
        and a convolution of too small images may read any memory. So other operations fail.
        """
        if self._output == "logits":  # the sides of what is joined must be equal
            example = tf.zeros((1, *self._image_shape), images.dtype)
            return tf.concat([images, example], 0, name="has_size_of_net")[:-1]
        sides = tf.maximum(tf.shape(images), (0, *self._image_shape))
        return tf.reshape(images, sides, name="is_at_least_size_of_net")

    def _apply(self, layer: Layer, x: Any) -> Any:
        def param(name: str) -> Any:
            return tf.cast(self._weights[f"{layer.name}_{name}"], tf.float32)

        if layer.type == "conv":
            return tf.nn.conv2d(x, param("kernel"), 1, "SAME") + param("bias")
        if layer.type == "bn":
            mean, var, bias, scale = (param(name) for name in ("mean", "var", "bias", "scale"))
            return tf.nn.batch_normalization(x, mean, var, bias, scale, BatchNorm.epsilon)
        if layer.type == "relu":
            return tf.nn.relu(x)
        if layer.type == "lrn":
            return tf.nn.local_response_normalization(
                x, depth_radius=2, bias=2.0, alpha=1e-4, beta=0.75
            )
        if layer.type == "pool":
            pool = tf.nn.avg_pool2d if self._pool == "avg" else tf.nn.max_pool2d
            return pool(x, 2, 2, "VALID")
        kernel_size = layer.kernel_size
        kernel = tf.reshape(param("kernel"), (kernel_size, kernel_size, x.shape[3], layer.features))
        return tf.nn.conv2d(x, kernel, 1, "VALID") + param("bias")


def _to_tensor(array: np.ndarray, bfloat16: bool) -> Any:
    tensor = tf.constant(array, tf.float32)
    return tf.cast(tensor, tf.bfloat16) if bfloat16 else tensor
