"""The NNX module against the linen module, and its training against a hand-written optax step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import vgg_jax
from tests.helpers.compare import assert_trees_close
from tests.helpers.tiny import SHALLOW, images, init
from vgg_jax import VGG, InputError
from vgg_jax import nnx as vgg_nnx
from vgg_jax.nnx import to_nnx

LABELS = jnp.array([0, 2, 5])
OPTIMIZER = optax.sgd(0.1, momentum=0.9)


@pytest.fixture(scope="module")
def model():
    return VGG(SHALLOW, num_classes=7, image_size=16, batch_norm=True)


@pytest.fixture(scope="module")
def variables(model):
    """Variables whose biases and statistics are random too."""
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: x + jnp.float32(rng.uniform(0, 0.1, x.shape)), init(model))


@pytest.fixture
def net(model, variables):
    return to_nnx(model, variables, rngs=nnx.Rngs(3))


def dropout_keys():
    """The keys that a net with `nnx.Rngs(3)` draws."""
    stream = nnx.Rngs(3)["dropout"].fork()
    while True:
        yield stream()


def nnx_loss(net, x):
    return optax.softmax_cross_entropy_with_integer_labels(net(x), LABELS).mean()


@functools.partial(jax.jit, static_argnums=0)
def linen_gradients(model, variables, x, key):
    """Loss, gradients of the parameters and new statistics of the linen module in training."""

    def loss(params):
        logits, updates = model.apply(
            {**variables, "params": params},
            x,
            train=True,
            rngs={"dropout": key},
            mutable=["batch_stats"],
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, LABELS)
        return losses.mean(), updates["batch_stats"]

    (value, stats), gradients = jax.value_and_grad(loss, has_aux=True)(variables["params"])
    return value, gradients, stats


def variables_of(net):
    return net.to_linen()[1]


def to_tree(state):
    """A state of an `nnx.VGG` as a plain tree: layer -> leaf -> array."""
    return nnx.to_pure_dict(state)


def test_layers_are_attributes(net, variables):
    for name, layer in variables["params"].items():
        for leaf, value in layer.items():
            variable = getattr(net, name)[leaf]
            assert type(variable) is nnx.Param
            np.testing.assert_array_equal(variable, value)
    assert type(net.bn1_1.mean) is nnx.BatchStat
    assert net.conv1_1.kernel.shape == (3, 3, 3, 8)
    assert net.fc8.bias.shape == (7,)
    np.testing.assert_array_equal(net.bn2_1.var, variables["batch_stats"]["bn2_1"]["var"])


def test_inference_equals_linen(net, model, variables):
    x = images(2, 16, 16)
    np.testing.assert_array_equal(net(x), model.apply(variables, x))
    larger = images(1, 24, 31)
    np.testing.assert_array_equal(
        net.score_map(larger, ceil=True),
        model.apply(variables, larger, ceil=True, method="score_map"),
    )
    layers = ("relu1_1", "fc6")
    expected = model.apply(variables, larger, layers=layers, method="features")
    assert_trees_close(net.features(larger, layers), expected, 1e-6)
    assert_trees_close(net.features(larger, iter(layers)), expected, 1e-6)


def test_inference_draws_nothing(net, variables):
    """`to_nnx` gives a net in inference mode, which does not change it."""
    before = jax.tree.map(jnp.copy, nnx.to_pure_dict(nnx.state(net, nnx.RngCount)))
    x = images(3, 16, 16)
    np.testing.assert_array_equal(net(x), net(x))
    jax.tree.map(np.testing.assert_array_equal, variables_of(net), variables)
    after = nnx.to_pure_dict(nnx.state(net, nnx.RngCount))
    jax.tree.map(np.testing.assert_array_equal, after, before)


@pytest.mark.slow
def test_training_equals_linen(net, model, variables):
    """Loss, gradients and statistics of one call."""
    x = images(3, 16, 16)
    key = next(dropout_keys())
    expected_loss, expected_gradients, expected_stats = linen_gradients(model, variables, x, key)
    net.train()
    loss, gradients = nnx.jit(nnx.value_and_grad(nnx_loss))(net, x)
    assert loss == pytest.approx(float(expected_loss), rel=1e-5)
    # A bias before a batch normalisation has no effect: its gradient is rounding errors.
    assert_trees_close(to_tree(gradients), expected_gradients, 1e-4, floor=1e-2)
    assert_trees_close(variables_of(net)["batch_stats"], expected_stats, 1e-5)
    assert_trees_close(variables_of(net)["params"], variables["params"], 1e-12)


def test_mask_leaves_out_examples(net, model, variables):
    x, mask = images(3, 16, 16), jnp.array([True, True, False])
    net.train()
    net(x, mask)
    without = to_nnx(model, variables, rngs=nnx.Rngs(3))
    without.train()
    without(x[:2])
    assert_trees_close(variables_of(net), variables_of(without), 1e-5)


def test_dropout_draws_from_rngs(net, model, variables):
    """Each call takes the next key; `frozen` batch normalisations keep other things equal."""
    x = images(3, 16, 16)
    frozen = tuple(name for name in variables["params"] if name.startswith("bn"))
    net.model = model.clone(frozen=frozen)
    net.train()
    keys = dropout_keys()
    for _ in range(2):
        expected = net.model.apply(variables, x, train=True, rngs={"dropout": next(keys)})
        np.testing.assert_array_equal(net(x), expected)
    jax.tree.map(np.testing.assert_array_equal, variables_of(net), variables)


@pytest.mark.slow
def test_optimizer_equals_optax(net, model, variables):
    """Three steps under `nnx.jit`, with momentum, batch normalisation and dropout."""
    batches = [images(3, 16, 16, seed=seed) for seed in range(3)]
    optimizer = nnx.Optimizer(net, OPTIMIZER, wrt=nnx.Param)
    net.train()

    @nnx.jit
    def step(net, optimizer, x):
        loss, gradients = nnx.value_and_grad(nnx_loss)(net, x)
        optimizer.update(net, gradients)
        return loss

    @jax.jit
    def expected_step(variables, state, x, key):
        loss, gradients, stats = linen_gradients(model, variables, x, key)
        updates, state = OPTIMIZER.update(gradients, state)
        params = optax.apply_updates(variables["params"], updates)
        return {"params": params, "batch_stats": stats}, state, loss

    expected, state = variables, OPTIMIZER.init(variables["params"])
    for x, key in zip(batches, dropout_keys(), strict=False):
        loss = step(net, optimizer, x)
        expected, state, expected_loss = expected_step(expected, state, x, key)
        assert loss == pytest.approx(float(expected_loss), rel=1e-4)
    assert_trees_close(variables_of(net), expected, 1e-4)
    net.eval()
    x = batches[0]
    np.testing.assert_allclose(net(x), model.apply(expected, x), rtol=1e-3, atol=1e-4)


def test_optimizer_of_a_filter_trains_one_layer(net, model, variables):
    x = images(3, 16, 16)
    trained = nnx.All(nnx.Param, nnx.PathContains("fc8"))
    decay = optax.chain(optax.add_decayed_weights(0.1), OPTIMIZER)
    optimizer = nnx.Optimizer(net, decay, wrt=trained)

    @nnx.jit
    def step(net, optimizer, x):
        gradients = nnx.grad(nnx_loss, argnums=nnx.DiffState(0, trained))(net, x)
        optimizer.update(net, gradients)

    step(net, optimizer, x)

    def loss(fc8):
        params = {**variables["params"], "fc8": fc8}
        logits = model.apply({**variables, "params": params}, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, LABELS).mean()

    old = variables["params"]["fc8"]
    gradients = jax.grad(loss)(old)
    expected = jax.tree.map(lambda p, g: p - 0.1 * (g + 0.1 * p), old, gradients)
    assert_trees_close(variables_of(net)["params"]["fc8"], expected, 1e-5)
    for collection, layers in variables_of(net).items():
        for name, layer in layers.items():
            if name != "fc8":
                jax.tree.map(np.testing.assert_array_equal, layer, variables[collection][name])


def test_frozen_layers_have_no_gradient(net, model):
    net.model = model.clone(frozen=("conv1_1", "bn1_1"))
    net.train()
    mean = jnp.copy(net.bn1_1.mean[...])
    gradients = to_tree(nnx.jit(nnx.grad(nnx_loss))(net, images(3, 16, 16)))
    for name in ("conv1_1", "bn1_1"):
        assert all(not np.any(leaf) for leaf in gradients[name].values())
    assert np.any(gradients["conv2_1"]["kernel"])
    np.testing.assert_array_equal(net.bn1_1.mean, mean)


@pytest.mark.slow
def test_split_and_merge_in_jax_jit(net, model, variables):
    """The functional API: a step as a pure function of the state."""
    x = images(3, 16, 16)
    net.train()
    optimizer = nnx.Optimizer(net, OPTIMIZER, wrt=nnx.Param)
    graphdef, state = nnx.split((net, optimizer))

    @functools.partial(jax.jit, compiler_options=vgg_jax.compiler_options())
    def step(state, x):
        net, optimizer = nnx.merge(graphdef, state)
        loss, gradients = nnx.value_and_grad(nnx_loss)(net, x)
        optimizer.update(net, gradients)
        return nnx.state((net, optimizer)), loss

    state, loss = step(state, x)
    key = next(dropout_keys())
    expected_loss, gradients, stats = linen_gradients(model, variables, x, key)
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, variables["params"], gradients)
    assert loss == pytest.approx(float(expected_loss), rel=1e-5)
    jax.tree.map(np.testing.assert_array_equal, variables_of(net), variables)
    nnx.update((net, optimizer), state)
    assert_trees_close(variables_of(net), {"params": expected, "batch_stats": stats}, 1e-4)


@pytest.mark.slow
def test_ensemble_under_vmap(model):
    """Nets of different seeds at once equal each one alone, in inference and in training."""

    @nnx.split_rngs(splits=2)
    @nnx.vmap
    def create(rngs):
        return vgg_nnx.VGG(model.clone(dropout_rate=0.0), rngs=rngs)

    @nnx.vmap(in_axes=(0, None))
    def logits(net, x):
        return net(x)

    def unstack(nets):
        return [jax.tree.map(lambda leaf, i=i: leaf[i], variables_of(nets)) for i in range(2)]

    x = images(3, 16, 16)
    nets = create(nnx.Rngs(0))
    assert nets.conv1_1.kernel.shape == (2, 3, 3, 3, 8)
    assert np.any(nets.conv1_1.kernel[0] != nets.conv1_1.kernel[1])

    apply = functools.partial(nets.model.apply, train=True, mutable=["batch_stats"])
    expected, expected_stats = zip(*(jax.jit(apply)(v, x) for v in unstack(nets)), strict=True)
    np.testing.assert_allclose(nnx.jit(logits)(nets, x), expected, rtol=1e-3, atol=1e-4)
    for variables, stats in zip(unstack(nets), expected_stats, strict=True):
        assert_trees_close(variables["batch_stats"], stats["batch_stats"], 1e-5)

    nets.eval()
    expected = [nets.model.apply(variables, x) for variables in unstack(nets)]
    np.testing.assert_allclose(nnx.jit(logits)(nets, x), expected, rtol=1e-3, atol=1e-4)


def test_view_shares_variables(net):
    """`nnx.view` gives a net in another mode, which updates the same statistics."""
    view = nnx.view(net, deterministic=False, use_running_average=False)
    before = jnp.copy(net.bn1_1.mean[...])
    view(images(3, 16, 16))
    assert net.deterministic
    assert np.any(net.bn1_1.mean[...] != before)


def test_new_net_is_in_training_mode(model):
    net = vgg_nnx.VGG(model, rngs=nnx.Rngs(0))
    expected = model.init(nnx.Rngs(0).params(), images(1, 16, 16))
    jax.tree.map(np.testing.assert_array_equal, variables_of(net), expected)
    assert not (net.deterministic or net.use_running_average)
    x = images(3, 16, 16)
    assert np.any(net(x) != net(x))
    net.eval()
    np.testing.assert_array_equal(net(x), net(x))


def test_to_linen_returns_what_to_nnx_took(net, model, variables):
    actual_model, actual = net.to_linen()
    assert actual_model == model
    assert actual.keys() == variables.keys()
    jax.tree.map(np.testing.assert_array_equal, actual, variables)


def test_saved_net_is_loaded(tmp_path):
    """From a file to an NNX module and back; NumPy's arrays become jax's."""
    small = VGG(vgg_jax.CONFIGS["A"], 3, image_size=32)
    small = small.clone(config=vgg_jax.VGGConfig(small.config.stages, fc=(12, 8)))
    metadata = {
        "net": "A",
        "classes": ("a", "b", "c"),
        "preprocessing": {"mean_rgb": (1.0, 2.0, 3.0)},
    }
    vgg_jax.save(tmp_path / "a.safetensors", small, init(small), metadata)
    loaded, variables, metadata = vgg_jax.load(tmp_path / "a.safetensors")
    net = to_nnx(loaded, variables)
    assert isinstance(net.conv1_1.kernel[...], jax.Array)
    vgg_jax.save(tmp_path / "b.safetensors", *net.to_linen(), metadata)
    same = vgg_jax.load(tmp_path / "b.safetensors")
    assert same[0] == loaded
    jax.tree.map(np.testing.assert_array_equal, same[1], variables)


def test_weights_without_fc_layers(model, variables):
    params = {k: v for k, v in variables["params"].items() if not k.startswith("fc")}
    net = to_nnx(model, {**variables, "params": params})
    x = images(2, 16, 16)
    expected = model.apply(variables, x, layers=("pool2",), method="features")
    assert_trees_close(net.features(x, ("pool2",)), expected, 1e-6)
    assert not hasattr(net, "fc6")
    message = (
        "^fc8 needs fc6, fc7, fc8, and the net has no fully connected layers: expected weights "
        "with them, or features up to pool2$"
    )
    with pytest.raises(InputError, match=message):
        net(x)
    with pytest.raises(InputError, match=message):
        net.score_map(x)
    with pytest.raises(InputError, match=r"^relu6 needs fc6, and the net"):
        net.features(x, ("pool2", "relu6"))
    assert set(variables_of(net)["params"]) == set(params)


def test_bad_arguments(model, variables):
    with pytest.raises(InputError, match=r"^rngs is None: expected nnx.Rngs\(seed\)"):
        vgg_nnx.VGG(model)
    message = r"^fc8/kernel in params has the shape \(16, 7\): expected \(16, 9\); pass the"
    with pytest.raises(InputError, match=message):
        to_nnx(model.clone(num_classes=9), variables)
    with pytest.raises(InputError, match=r"^params has bn1_1, .*which this net has not: expected"):
        to_nnx(model.clone(batch_norm=False), variables)
    with pytest.raises(InputError, match=r"^batch_stats has no bn1_1, .*: expected"):
        to_nnx(model, {"params": variables["params"]})
    net = to_nnx(model, variables)
    x = images(2, 16, 16)
    with pytest.raises(InputError, match="no layer 'conv9_9'"):
        net.features(x, ("conv9_9",))
    with pytest.raises(InputError, match="layers is the string 'pool1': expected a tuple"):
        net.features(x, "pool1")
    net.train()
    with pytest.raises(InputError, match=r"^rngs is None and the net is in training mode"):
        net(x)
    net.deterministic = True
    with pytest.raises(InputError, match=r"^deterministic is True and use_running_average is"):
        net(x)


@pytest.mark.parametrize("channels", [1, 4])
def test_other_channels(channels):
    """Trained nets that are adapted, and new parameters."""
    rgb = VGG(SHALLOW, num_classes=7, image_size=16)
    model, variables = vgg_jax.with_in_channels(rgb, init(rgb), channels)
    x = images(2, 16, 16, channels=channels)
    np.testing.assert_array_equal(to_nnx(model, variables)(x), model.apply(variables, x))
    new = vgg_nnx.VGG(model, rngs=nnx.Rngs(0))
    assert new.conv1_1.kernel.shape == (3, 3, channels, 8)
    assert new.score_map(x).shape == (2, 1, 1, 7)
