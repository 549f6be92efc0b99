"""The net as a TensorFlow SavedModel of TensorFlow's own operations, which TF Serving loads and LiteRT converts."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from vgg_jax.data import tf  # which sees no GPU
from vgg_jax.export import ExportSpec
from vgg_jax.export.spec import SAVEDMODEL_METADATA
from vgg_jax.layers import BatchNorm


def write(path: Path, artefact: ExportSpec) -> None:
    """A SavedModel folder with one signature, `serving_default`: {"images": …} -> {output: …}; metadata in assets.extra."""
    module = Module(artefact)
    size = None if artefact.output != "logits" else artefact.weights.model.image_size
    images = tf.TensorSpec(
        (None, size, size, 3), tf.uint8 if artefact.uint8 else tf.float32, name="images"
    )
    tf.saved_model.save(module, str(path), signatures=module.answer.get_concrete_function(images))
    (path / SAVEDMODEL_METADATA).parent.mkdir()
    (path / SAVEDMODEL_METADATA).write_text(json.dumps(artefact.metadata()))


class Module(tf.Module):
    """The layers, applied one by one."""

    def __init__(self, artefact: ExportSpec) -> None:
        super().__init__("vgg")
        self._mean = tf.constant(artefact.mean_rgb, tf.float32)
        self._table = artefact.table
        self._output, self._uint8 = artefact.output, artefact.uint8
        # The names of TensorFlow's attributes may have no slash.
        self._weights = {
            f"{layer}_{leaf}": tf.Variable(
                _tensor(np.asarray(array), artefact.bfloat16),
                trainable=False,
                name=f"{layer}/{leaf}",
            )
            for layers in artefact.weights.variables.values()
            for layer, leaves in layers.items()
            for leaf, array in leaves.items()
        }

    @tf.function
    def answer(self, images: Any) -> Any:
        x = tf.cast(images, tf.float32) - self._mean if self._uint8 else images
        for name, kind, width, kernel in self._table:
            if kind == "conv":
                x = tf.nn.conv2d(x, self._weight(name, "kernel"), 1, "SAME") + self._weight(
                    name, "bias"
                )
            elif kind == "bn":
                mean, var, bias, scale = (
                    self._weight(name, leaf) for leaf in ("mean", "var", "bias", "scale")
                )
                x = tf.nn.batch_normalization(x, mean, var, bias, scale, BatchNorm.epsilon)
            elif kind == "relu":
                x = tf.nn.relu(x)
            elif kind == "lrn":
                x = tf.nn.local_response_normalization(
                    x, depth_radius=2, bias=2.0, alpha=1e-4, beta=0.75
                )
            elif kind == "pool":
                x = tf.nn.max_pool2d(x, 2, 2, "VALID")
            else:
                window = tf.reshape(
                    self._weight(name, "kernel"), (kernel, kernel, x.shape[3], width)
                )
                x = tf.nn.conv2d(x, window, 1, "VALID") + self._weight(name, "bias")
        if self._output == "score_map":
            return {"score_map": x}
        x = tf.reduce_mean(x, (1, 2))
        return {"logits": x} if self._output == "logits" else {"posteriors": tf.nn.softmax(x)}

    def _weight(self, layer: str, leaf: str) -> Any:
        return tf.cast(self._weights[f"{layer}_{leaf}"], tf.float32)


def _tensor(array: np.ndarray, bfloat16: bool) -> Any:
    return (
        tf.cast(tf.constant(array, tf.float32), tf.bfloat16)
        if bfloat16
        else tf.constant(array, tf.float32)
    )
