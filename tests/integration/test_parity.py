"""Logits, gradients and training equal PyTorch's, from the same random weights."""

import dataclasses
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vgg_jax import CONFIGS, VGG, compiler_options
from vgg_jax.configs.train import TrainConfig
from vgg_jax.distributed.sharding import make_mesh, replicated, shard_batch
from vgg_jax.training.optimizer import make_optimizer
from vgg_jax.training.step import TrainState, jit_steps

torch = pytest.importorskip("torch", reason="needs torch: pip install torch")
from tests.helpers.compare import assert_trees_close  # noqa: E402
from tests.helpers.tiny import TINY  # noqa: E402
from tests.helpers.torch_vgg import STAGES, randomize, to_jax, torch_vgg  # noqa: E402

FC, CLASSES = (48, 32), 10


def to_torch(images):
    """(N, H, W, C) -> (N, C, H, W)."""
    return torch.from_numpy(images.transpose(0, 3, 1, 2))


def images_and_labels(n, size, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, size, size, 3)).astype(np.float32), rng.integers(CLASSES, size=n)


def test_stages_cover_every_config():
    assert STAGES.keys() == CONFIGS.keys()


@pytest.mark.slow
@pytest.mark.parametrize("batch_norm", [False, True], ids=["plain", "batch_norm"])
@pytest.mark.parametrize("net", CONFIGS)
def test_logits_and_gradients_equal_pytorch(net, batch_norm):
    """In float64: in float32, rounding decides some ReLUs and maxima otherwise.

    That moves a gradient by 1 %, also between PyTorch and XLA's own convolution. The test does not
    jit, so that operations which nets share are compiled once for all nets.
    """
    size = 32
    images, labels = images_and_labels(3, size)
    reference = randomize(torch_vgg(net, FC, CLASSES, batch_norm, size), seed=1).double()
    params, batch_stats = to_jax(reference, size // 32)
    inputs = to_torch(images).double().requires_grad_()
    expected_logits = reference(inputs)
    torch.nn.functional.cross_entropy(
        expected_logits, torch.from_numpy(labels), reduction="sum"
    ).backward()
    expected, _ = to_jax(reference, size // 32, gradients=True)
    _, expected_stats = to_jax(reference, size // 32)
    expected_inference = reference.eval()(inputs).detach().numpy()
    config = dataclasses.replace(CONFIGS[net], fc=FC)

    with jax.enable_x64(True):
        double = {"dtype": jnp.float64, "param_dtype": jnp.float64}
        model = VGG(config, CLASSES, batch_norm, dropout_rate=0.0, image_size=size, **double)

        def loss(params, images):
            variables = {"params": params, "batch_stats": batch_stats}
            logits, updated = model.apply(variables, images, train=True, mutable=["batch_stats"])
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.sum(), (logits, updated)

        gradient = jax.grad(loss, argnums=(0, 1), has_aux=True)
        (grad_params, grad_images), (logits, updated) = gradient(
            params, jnp.asarray(images, jnp.float64)
        )
        assert logits.dtype == grad_images.dtype == jnp.float64
        if batch_norm:
            # Batch normalisation removes the bias before it: that gradient is 0 up to rounding.
            for name in [name for name in expected if name.startswith("conv")]:
                largest = np.abs(grad_params[name]["kernel"]).max()
                assert np.abs(grad_params[name].pop("bias")).max() < 1e-9 * largest
                del expected[name]["bias"]
            assert_trees_close(updated["batch_stats"], expected_stats, 1e-9)
        assert_trees_close(logits, expected_logits.detach().numpy(), 1e-9)
        assert_trees_close(grad_images, inputs.grad.numpy().transpose(0, 2, 3, 1), 1e-9)
        assert_trees_close(grad_params, expected, 1e-9)

    single = jax.tree.map(np.float32, {"params": params, "batch_stats": expected_stats})
    logits = VGG(config, CLASSES, batch_norm, image_size=size).apply(single, images)
    assert logits.dtype == jnp.float32
    assert_trees_close(logits, expected_inference)


@pytest.mark.slow
@pytest.mark.parametrize("batch_norm", [False, True])
def test_grad_cam_equals_pytorch(batch_norm):
    """`head` after `features`: logits, and the mean gradient of each channel, in float64."""
    size = 64
    images, classes = images_and_labels(2, size)
    reference = torch_vgg("A", FC, CLASSES, batch_norm, size)
    reference = randomize(reference, seed=1).double().eval()
    params, batch_stats = to_jax(reference, size // 32)
    last_pool = [name for name, _ in reference.named_children()].index("pool5")
    expected_maps = reference[:last_pool](to_torch(images).double()).detach().requires_grad_()
    expected_logits = reference[last_pool:](expected_maps)
    expected_logits[range(2), classes].sum().backward()

    with jax.enable_x64(True):
        double = {"dtype": jnp.float64, "param_dtype": jnp.float64}
        config = dataclasses.replace(CONFIGS["A"], fc=FC)
        model = VGG(config, CLASSES, batch_norm, image_size=size, **double)
        variables = {"params": params, "batch_stats": batch_stats}
        images = jnp.asarray(images, jnp.float64)
        maps = model.apply(variables, images, layers=("relu5_2",), method="features")["relu5_2"]

        def class_logits(maps):
            logits = model.apply(variables, maps, method="head")
            return logits[jnp.arange(2), classes].sum(), logits

        gradient, logits = jax.grad(class_logits, has_aux=True)(maps)
        assert_trees_close(logits, expected_logits.detach().numpy(), 1e-9)
        # The sum over a pooling's window does not depend on which of equal maxima has the gradient.
        weights = expected_maps.grad.mean((2, 3)).numpy()
        assert_trees_close(gradient.mean((1, 2)), weights, 1e-9)


@pytest.mark.slow
def test_logits_of_full_net_d():
    images, _ = images_and_labels(1, 224)
    reference = randomize(torch_vgg("D", (4096, 4096), 1000), seed=2)
    params, _ = to_jax(reference, 7)
    apply = jax.jit(VGG(CONFIGS["D"]).apply, compiler_options=compiler_options())
    logits = apply({"params": params}, images)
    with torch.inference_mode():
        assert_trees_close(logits, reference(to_torch(images)).numpy())


def tiny_torch_vgg(batch_norm):
    """TINY in PyTorch, by the same table with fewer channels."""
    with mock.patch.dict(STAGES, tiny=[[8], [16], [24, 24], [32, 32], [40, 40]]):
        return randomize(torch_vgg("tiny", (24, 16), CLASSES, batch_norm, 32), seed=3)


def training_batch(seed, n, num_real):
    """Random examples, of which the last ones are padding."""
    rng = np.random.default_rng(seed)
    return {
        "image": rng.integers(125, 134, size=(n, 32, 32, 3), dtype=np.uint8),
        "label": rng.integers(CLASSES, size=n).astype(np.int32),
        "colour_shift": rng.normal(size=(n, 3)).astype(np.float32),
        "mask": np.arange(n) < num_real,
    }


def torch_sgd(model, lr, decay_biases):
    parameters = list(model.parameters())
    kernels = [p for p in parameters if p.ndim > 1]
    others = [p for p in parameters if p.ndim <= 1]
    groups = [
        {"params": kernels},
        {"params": others, "weight_decay": 5e-4 if decay_biases else 0.0},
    ]
    return torch.optim.SGD(groups, lr=lr, momentum=0.9, weight_decay=5e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("batch_norm", "decay_biases", "devices", "microbatch"),
    [(True, False, 2, None), (False, True, 1, 4)],
)
def test_twenty_steps_equal_pytorch(batch_norm, decay_biases, devices, microbatch):
    """Every loss and the final parameters, in float64, with padding in every third batch."""
    n, lr, mean_rgb = 16, float(np.float32(1e-3)), (128.0, 129.0, 130.0)
    config = TrainConfig(
        image_size=32,
        scale=(32,),
        batch_size=n,
        learning_rate=lr,
        decay_biases=decay_biases,
        microbatch=microbatch,
        batch_norm=batch_norm,
    )
    reference = tiny_torch_vgg(batch_norm).double()
    params, batch_stats = to_jax(reference, 1)
    optimizer = torch_sgd(reference, lr, decay_biases)

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
            jnp.int32(0),
            params,
            batch_stats,
            make_optimizer(config).init(params),
            jax.random.key(0),
        )
        state = jax.device_put(state, replicated(mesh))
        for i in range(20):
            batch = training_batch(i, n, num_real=n if i % 3 else 11)
            mask = batch["mask"]
            state, sums = step(state, shard_batch(batch, mesh))

            shift = batch["colour_shift"][:, None, None]
            inputs = batch["image"] - np.array(mean_rgb, np.float32) + shift
            labels = torch.from_numpy(batch["label"][mask].astype(np.int64))
            optimizer.zero_grad()
            logits = reference(to_torch(inputs[mask].astype(np.float64)))
            loss = torch.nn.functional.cross_entropy(logits, labels)
            loss.backward()
            optimizer.step()
            assert sums.count == mask.sum()
            assert float(sums.loss) / mask.sum() == pytest.approx(loss.item(), rel=1e-6)

        expected, expected_stats = to_jax(reference, 1)
        assert_trees_close(state.params, expected, 1e-6)
        if batch_norm:
            assert_trees_close(state.batch_stats, expected_stats, 1e-6)
