"""Logits, gradients and training equal PyTorch's, from the same random weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vgg_jax import CONFIGS, VGG, compiler_options
from vgg_jax.configs.train import TrainConfig
from vgg_jax.distributed.sharding import make_mesh, replicated, shard_batch
from vgg_jax.training.optimizer import sgd
from vgg_jax.training.step import TrainState, jit_steps

torch = pytest.importorskip("torch", reason="needs torch: pip install torch")
from tests.helpers.tiny import TINY  # noqa: E402
from tests.helpers.torch_vgg import STAGES, randomize, to_jax, torch_vgg  # noqa: E402

FC, CLASSES = (48, 32), 10


def assert_close(ours, theirs, tolerance=1e-4):
    """The largest difference, relative to the largest value, of each array of a tree."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    differences = jax.tree.map(
        lambda a, b: float(np.abs(a - b).max() / np.abs(b).max()), ours, theirs
    )
    worst = {
        jax.tree_util.keystr(path): value
        for path, value in jax.tree_util.tree_leaves_with_path(differences)
    }
    assert max(worst.values()) < tolerance, {
        name: value for name, value in worst.items() if value >= tolerance
    }


QUICK = (("A-LRN", False), ("C", False))  # of batch normalisation the twenty steps below


def images_and_labels(n, size, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, size, size, 3)).astype(np.float32), rng.integers(CLASSES, size=n)


def test_every_config_is_compared():
    assert STAGES.keys() == CONFIGS.keys()


@pytest.mark.parametrize(
    ("net", "batch_norm"),
    [
        pytest.param(
            net,
            normed,
            id=f"{net}-{'batch_norm' if normed else 'plain'}",
            marks=[] if (net, normed) in QUICK else pytest.mark.slow,
        )
        for net in CONFIGS
        for normed in (False, True)
    ],
)
def test_logits_and_gradients_equal_pytorchs(net, batch_norm):
    """In double precision: in single precision a ReLU or a maximum decided the other way by rounding moves a gradient by 1 %, between
    PyTorch and XLA's own convolution too. Not jitted: what the nets have in common is then compiled once for all of them."""
    size = 32
    images, labels = images_and_labels(3, size)
    theirs = randomize(torch_vgg(net, FC, CLASSES, batch_norm, size), seed=1).double()
    params, batch_stats = to_jax(theirs, size // 32)
    inputs = torch.from_numpy(images.transpose(0, 3, 1, 2)).double().requires_grad_()
    their_logits = theirs(inputs)
    torch.nn.functional.cross_entropy(
        their_logits, torch.from_numpy(labels), reduction="sum"
    ).backward()
    expected, _ = to_jax(theirs, size // 32, gradients=True)
    _, expected_stats = to_jax(theirs, size // 32)
    their_inference = theirs.eval()(inputs).detach().numpy()
    config = dataclasses.replace(CONFIGS[net], fc=FC)

    with jax.enable_x64(True):
        double = {"dtype": jnp.float64, "param_dtype": jnp.float64}
        model = VGG(config, CLASSES, batch_norm, dropout_rate=0.0, image_size=size, **double)

        def loss(params, images):
            variables = {"params": params, "batch_stats": batch_stats}
            logits, updated = model.apply(variables, images, train=True, mutable=["batch_stats"])
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).sum(), (
                logits,
                updated,
            )

        gradient = jax.grad(loss, argnums=(0, 1), has_aux=True)
        (by_params, by_images), (logits, updated) = gradient(
            params, jnp.asarray(images, jnp.float64)
        )
        assert logits.dtype == by_images.dtype == jnp.float64
        if batch_norm:  # which takes the bias before it out again: its gradient is 0, and what is there is rounding
            for name in [name for name in expected if name.startswith("conv")]:
                assert (
                    np.abs(by_params[name].pop("bias")).max()
                    < 1e-9 * np.abs(by_params[name]["kernel"]).max()
                )
                del expected[name]["bias"]
            assert_close(updated["batch_stats"], expected_stats, 1e-9)
        assert_close(logits, their_logits.detach().numpy(), 1e-9)
        assert_close(by_images, inputs.grad.numpy().transpose(0, 2, 3, 1), 1e-9)
        assert_close(by_params, expected, 1e-9)

    single = jax.tree.map(np.float32, {"params": params, "batch_stats": expected_stats})
    ours = VGG(config, CLASSES, batch_norm, image_size=size).apply(single, images)
    assert ours.dtype == jnp.float32
    assert_close(ours, their_inference)


@pytest.mark.slow
def test_logits_of_the_whole_net_d():
    images, _ = images_and_labels(1, 224)
    theirs = randomize(torch_vgg("D", (4096, 4096), 1000), seed=2)
    params, _ = to_jax(theirs, 7)
    ours = jax.jit(VGG(CONFIGS["D"]).apply, compiler_options=compiler_options())(
        {"params": params}, images
    )
    with torch.inference_mode():
        assert_close(ours, theirs(torch.from_numpy(images.transpose(0, 3, 1, 2))).numpy())


def tiny_torch(batch_norm):
    """TINY in PyTorch, by the same table with narrower layers."""
    STAGES["tiny"] = [[8], [16], [24, 24], [32, 32], [40, 40]]
    try:
        return randomize(torch_vgg("tiny", (24, 16), CLASSES, batch_norm, 32), seed=3)
    finally:
        del STAGES["tiny"]


@pytest.mark.parametrize(
    ("batch_norm", "decay_biases", "devices", "microbatch"),
    [(True, False, 2, None), pytest.param(False, True, 1, 4, marks=pytest.mark.slow)],
)
def test_twenty_steps_follow_pytorch(batch_norm, decay_biases, devices, microbatch):
    """Loss by loss, in double precision: SGD, weight decay, batch normalisation and its running statistics, padding left out; on one device
    or two, whole or by micro-batches."""
    n, rate, mean_rgb = 16, float(np.float32(1e-3)), (128.0, 129.0, 130.0)
    config = TrainConfig(
        image_size=32,
        scale=(32,),
        batch_size=n,
        learning_rate=rate,
        decay_biases=decay_biases,
        microbatch=microbatch,
        batch_norm=batch_norm,
    )
    theirs = tiny_torch(batch_norm).double()
    params, batch_stats = to_jax(theirs, 1)
    kernels, others = (
        [p for p in theirs.parameters() if (p.ndim > 1) == is_kernel] for is_kernel in (True, False)
    )
    groups = [
        {"params": kernels},
        {"params": others, "weight_decay": 5e-4 if decay_biases else 0.0},
    ]
    optimizer = torch.optim.SGD(groups, lr=rate, momentum=0.9, weight_decay=5e-4)

    with jax.enable_x64(True):
        model = VGG(
            TINY,
            CLASSES,
            batch_norm,
            dropout_rate=0.0,
            image_size=32,
            dtype=jnp.float64,
            param_dtype=jnp.float64,
        )
        mesh = make_mesh(n, jax.devices()[:devices])
        step, _ = jit_steps(config, model, mean_rgb, mesh)
        state = TrainState(
            jnp.int32(0), params, batch_stats, sgd(config).init(params), jax.random.key(0)
        )
        state = jax.device_put(state, replicated(mesh))
        for i in range(20):
            rng = np.random.default_rng(i)
            images, labels = (
                rng.integers(125, 134, size=(n, 32, 32, 3), dtype=np.uint8),
                rng.integers(CLASSES, size=n),
            )
            shift = rng.normal(size=(n, 3)).astype(np.float32)
            mask = np.arange(n) < (n if i % 3 else 11)  # now and then a padded batch
            batch = {
                "image": images,
                "colour_shift": shift,
                "label": labels.astype(np.int32),
                "mask": mask,
            }
            state, sums = step(state, shard_batch(batch, mesh))

            inputs = (images - np.array(mean_rgb, np.float32) + shift[:, None, None])[mask].astype(
                np.float64
            )
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(
                theirs(torch.from_numpy(inputs.transpose(0, 3, 1, 2))),
                torch.from_numpy(labels[mask]),
            )
            loss.backward()
            optimizer.step()
            assert sums.count == mask.sum()
            assert float(sums.loss) / mask.sum() == pytest.approx(loss.item(), rel=1e-6)

        expected, expected_stats = to_jax(theirs, 1)
        assert_close(state.params, expected, 1e-6)
        if batch_norm:
            assert_close(state.batch_stats, expected_stats, 1e-6)
