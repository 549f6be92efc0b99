"""Tiny nets to export, and the runtimes that run the files."""

import dataclasses
import zipfile

import jax
import numpy as np
import pytest

from tests.helpers.tiny import init, narrow
from vgg_jax import CONFIGS, IMAGENET, VGG, compiler_options
from vgg_jax.export import ExportSpec
from vgg_jax.weights import Weights
from vgg_jax.weights.layouts import Preprocessing

CLASSES = ("ants", "bees", "wasps")
FC = (12, 8)
# `read` recognises a .safetensors file by its convolutions, so they have the paper's sizes.
FULL_CONVS = dataclasses.replace(CONFIGS["A"], fc=FC)


def random_weights(net="D", batch_norm=False, size=32, config=None, channels=3):
    """A net with random weights; its activations have a useful size for 0-255 images."""
    model = VGG(
        config or narrow(net), len(CLASSES), batch_norm, image_size=size, in_channels=channels
    )
    rng = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda x: np.asarray(x + np.float32(rng.uniform(0, 0.1, x.shape))), dict(init(model))
    )
    variables["params"]["conv1_1"]["kernel"] = variables["params"]["conv1_1"]["kernel"] / 50
    return Weights(
        net=net,
        layout="vgg_jax",
        model=model,
        params=variables["params"],
        batch_stats=variables.get("batch_stats", {}),
        top=True,
        preprocessing=Preprocessing(
            IMAGENET.mean_rgb if channels == 3 else tuple(np.linspace(90, 120, channels)),
            (1.0,) * channels,
        ),
        classes=CLASSES,
    )


def random_images(*shape, channels=3):
    """uint8 (*shape, channels)."""
    return np.random.default_rng(3).integers(0, 256, (*shape, channels)).astype(np.uint8)


def own_output(spec, images):
    """The output that a file of this spec must have."""
    forward = jax.jit(spec, compiler_options=compiler_options())
    return np.asarray(forward(spec.weights.variables, images))


def undecided_weights(rounding="nearest", size=32):
    """A net whose posteriors are neither 0 nor 1, and change with a shift by one pixel."""
    weights = random_weights("A", size=size)
    logits = own_output(ExportSpec(weights), random_images(8, size, size))
    fc8, spread = weights.params["fc8"], logits.std(0).mean()
    fc8 = {"kernel": fc8["kernel"] / spread, "bias": (fc8["bias"] - logits.mean(0)) / spread}
    preprocessing = weights.preprocessing._replace(scale=round(size * 37 / 32), rounding=rounding)
    return dataclasses.replace(
        weights, params={**weights.params, "fc8": fc8}, preprocessing=preprocessing
    )


def require_onnx():
    pytest.importorskip("onnx", reason="needs onnx: pip install '.[onnx]'")
    return pytest.importorskip("onnxruntime", reason="needs onnxruntime: pip install '.[onnx]'")


def run_onnx(path, images):
    return require_onnx().InferenceSession(path).run(None, {"images": images})[0]


def run_stablehlo(path, images):
    from safetensors.numpy import load

    with zipfile.ZipFile(path) as file:
        program = jax.export.deserialize(bytearray(file.read("program")))
        assert program.platforms == ("cpu", "cuda", "tpu")
        return np.asarray(program.call(load(file.read("weights.safetensors")), images))


def run_savedmodel(path, images):
    import tensorflow as tf

    signature = tf.saved_model.load(str(path)).signatures["serving_default"]
    (output,) = signature(images=tf.constant(images)).values()
    return output.numpy()


RUNNERS = {"onnx": run_onnx, "stablehlo": run_stablehlo, "savedmodel": run_savedmodel}
