"""Weights of the classes, against scikit-learn, PyTorch and a loss by hand; unlikely settings."""

import dataclasses
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.utils.class_weight import compute_class_weight

from tests.training.test_step import CONFIG, MESH, MODEL, make_batch
from vgg_jax import IMAGENET, TrainConfig
from vgg_jax.distributed.sharding import shard_batch
from vgg_jax.input_data import class_counts
from vgg_jax.preprocessing import subtract_mean
from vgg_jax.training.loop import fit
from vgg_jax.training.optimizer import make_optimizer
from vgg_jax.training.setup import balanced_weights, unlikely_choices
from vgg_jax.training.step import init_state, jit_steps

LABELS = np.array([0, 0, 0, 0, 0, 1, 1, 3])
PLAIN_SGD = dataclasses.replace(CONFIG, momentum=0.0, weight_decay=0.0, learning_rate=1.0)


def test_balanced_weights_are_those_of_scikit_learn():
    weights = balanced_weights(np.bincount(LABELS, minlength=5))
    expected = compute_class_weight("balanced", classes=np.unique(LABELS), y=LABELS)
    np.testing.assert_allclose(np.array(weights)[[0, 1, 3]], expected)
    assert np.isfinite(weights).all() and np.mean(np.array(weights)[LABELS]) == 1


def step_by(weights, batch, **changes):
    """The change of the parameters by a step of SGD with rate 1, and the sums."""
    config = dataclasses.replace(PLAIN_SGD, **changes)
    train_step, _ = jit_steps(
        config, MODEL, IMAGENET.mean_rgb, MESH, donate=False, class_weights=weights
    )
    state = init_state(MODEL, make_optimizer(config), 0, MESH)
    new, sums = train_step(state, shard_batch(batch, MESH))
    return jax.tree.map(lambda a, b: np.asarray(a - b), state.params, new.params), sums


def losses_of(params, batch):
    images = subtract_mean(batch["image"], IMAGENET.mean_rgb, batch["colour_shift"])
    logits = MODEL.apply({"params": params}, images)
    return -jax.nn.log_softmax(logits)[jnp.arange(len(LABELS)), batch["label"]]


def assert_close(actual, expected):
    for name, layer in expected.items():
        largest = np.abs(layer["kernel"]).max()
        np.testing.assert_allclose(actual[name]["kernel"], layer["kernel"], atol=2e-5 * largest)


@pytest.mark.slow
@pytest.mark.parametrize("num_real", [8, 5])
def test_gradient_is_that_of_the_weighted_loss(num_real):
    """The mean is over the images in the mask. Masked ones have no part in it."""
    batch = make_batch(num_real) | {"label": LABELS.astype(np.int32)}
    weights = balanced_weights(np.bincount(LABELS, minlength=5))
    params = init_state(MODEL, make_optimizer(PLAIN_SGD), 0, MESH).params

    def loss_by_hand(params):
        losses = losses_of(params, batch)
        return sum(weights[LABELS[i]] * losses[i] for i in range(num_real)) / num_real

    expected = jax.tree.map(np.asarray, jax.jit(jax.grad(loss_by_hand))(params))
    gradient, sums = step_by(weights, batch)
    assert_close(gradient, expected)
    # The reported loss has no weights.
    assert float(sums.loss) == pytest.approx(float(losses_of(params, batch)[:num_real].sum()))
    assert_close(step_by(weights, batch, microbatch=2)[0], expected)
    unweighted, _ = step_by(None, batch)
    equal, _ = step_by((1.0,) * 5, batch)
    assert_close(equal, unweighted)
    change = np.abs(unweighted["fc8"]["kernel"] - expected["fc8"]["kernel"]).max()
    assert change > 0.1 * np.abs(expected["fc8"]["kernel"]).max()


def test_gradient_of_all_images_is_pytorchs():
    """PyTorch divides by the sum of the weights, which is the number of all images."""
    torch = pytest.importorskip("torch", reason="needs torch: pip install torch")
    batch = make_batch() | {"label": LABELS.astype(np.int32)}
    weights = balanced_weights(np.bincount(LABELS, minlength=5))
    params = init_state(MODEL, make_optimizer(PLAIN_SGD), 0, MESH).params
    images = subtract_mean(batch["image"], IMAGENET.mean_rgb, batch["colour_shift"])
    outputs = np.array(jax.jit(MODEL.apply)({"params": params}, images))
    logits = torch.tensor(outputs, requires_grad=True)
    torch.nn.CrossEntropyLoss(weight=torch.tensor(weights))(logits, torch.tensor(LABELS)).backward()
    gradient, _ = step_by(weights, batch)
    expected = logits.grad.sum(0).numpy()  # of the bias of fc8
    np.testing.assert_allclose(gradient["fc8"]["bias"], expected, atol=1e-5)
    assert np.abs(expected).max() > 0.01


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], [21, 5])
    return rng.integers(0, 256, (26, 20, 20), np.uint8), labels


@pytest.mark.slow
@pytest.mark.usefixtures("small_nets")
def test_fit_with_balanced_weights(arrays, tmp_path, caplog):
    """The first step's loss is the same, since it has no weights, and the parameters are not."""
    caplog.set_level(logging.WARNING, "vgg_jax")
    settings = {"net": "shallow", "fc": (8, 8), "image_size": 16, "scale": (16,)}
    settings |= {"batch_size": 64, "epochs": 1, "dropout_rate": 0.0}
    results = [
        fit(arrays, tmp_path / name, **settings | {"class_weights": name}).history[0]
        for name in ("none", "balanced")
    ]
    assert results[0]["train"]["loss"] == results[1]["train"]["loss"]
    assert results[0]["validation"]["loss"] != results[1]["validation"]["loss"]
    assert "23 training images fit into one batch of 64" in caplog.text


@pytest.mark.parametrize("data", ["digits", "numbers"])
def test_class_counts_of_files(data, prepared):
    from vgg_jax.data import open_train_val

    train, _ = open_train_val(data, data_dir=prepared["tfrecord"], validation_fraction=0.3)
    labels = [int(example["label"]) for example in train.examples(None)]
    np.testing.assert_array_equal(class_counts(train), np.bincount(labels))


@pytest.mark.parametrize(
    "changes, num_images, expected",
    [
        ({}, 257, []),
        ({}, 245, ["245 training images fit into one batch of 256: .* --batch-size 32"]),
        ({}, 5, ["--batch-size 1$"]),
        ({"image_size": 64}, 1000, []),
        ({"image_size": 64, "scale": (256,)}, 1000, ["a 16th of an image at S = 256: .* 73,"]),
        ({"scale": (512,)}, 1000, []),
        ({"scale": (256, 512)}, 1000, []),
    ],
)
def test_unlikely_choices(changes, num_images, expected):
    warnings = unlikely_choices(TrainConfig(**changes), num_images)
    assert len(warnings) == len(expected)
    for warning, pattern in zip(warnings, expected, strict=True):
        assert re.search(pattern, warning)
