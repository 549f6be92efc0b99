"""Label smoothing, against a formula in NumPy and PyTorch."""

import jax
import numpy as np
import pytest

from tests.training.test_class_weights import LABELS, PLAIN_SGD, step_by
from tests.training.test_step import MESH, MODEL, make_batch
from vgg_jax import IMAGENET
from vgg_jax.preprocessing import subtract_mean
from vgg_jax.training.optimizer import make_optimizer
from vgg_jax.training.setup import balanced_weights
from vgg_jax.training.step import init_state


def initial_logits(batch):
    params = init_state(MODEL, make_optimizer(PLAIN_SGD), 0, MESH).params
    images = subtract_mean(batch["image"], IMAGENET.mean_rgb, batch["colour_shift"])
    return np.array(jax.jit(MODEL.apply)({"params": params}, images))


@pytest.mark.slow
@pytest.mark.parametrize("is_weighted", [False, True])
@pytest.mark.parametrize("num_real", [8, 5])
def test_gradient_is_that_of_the_smoothed_loss(num_real, is_weighted):
    """Of fc8's bias: the sum of (posterior - target) over the images, by their weights."""
    batch = make_batch(num_real) | {"label": LABELS.astype(np.int32)}
    weights = balanced_weights(np.bincount(LABELS, minlength=5)) if is_weighted else None
    logits = np.float64(initial_logits(batch))[:num_real]
    labels = LABELS[:num_real]
    exponentials = np.exp(logits - logits.max(1, keepdims=True))
    posteriors = exponentials / exponentials.sum(1, keepdims=True)
    targets = np.full((num_real, 5), 0.3 / 5)
    targets[np.arange(num_real), labels] += 0.7
    factors = np.ones(5) if weights is None else np.array(weights)
    expected = (factors[labels, None] * (posteriors - targets)).sum(0) / num_real
    for microbatch in (None, 2):
        gradient, sums = step_by(weights, batch, label_smoothing=0.3, microbatch=microbatch)
        np.testing.assert_allclose(gradient["fc8"]["bias"], expected, atol=1e-5)
        # The reported loss has neither weights nor smoothing.
        loss = -np.log(posteriors[np.arange(num_real), labels]).sum()
        assert float(sums.loss) == pytest.approx(loss, rel=1e-5)
    plain, _ = step_by(weights, batch)
    assert np.abs(plain["fc8"]["bias"] - expected).max() > 0.01


def test_gradient_is_pytorchs():
    torch = pytest.importorskip("torch", reason="needs torch: pip install torch")
    batch = make_batch() | {"label": LABELS.astype(np.int32)}
    logits = torch.tensor(initial_logits(batch), requires_grad=True)
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(LABELS), label_smoothing=0.3)
    loss.backward()
    gradient, _ = step_by(None, batch, label_smoothing=0.3)
    expected = logits.grad.sum(0).numpy()  # of the bias of fc8
    np.testing.assert_allclose(gradient["fc8"]["bias"], expected, atol=1e-5)
    assert np.abs(expected).max() > 0.01
