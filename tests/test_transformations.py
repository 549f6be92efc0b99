"""JAX's transformations of a net, compared with the same net of plain linen layers.

`python -m tests.test_transformations` writes the table of docs/transformations.md.
"""

import functools
import re
from collections.abc import Callable
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from tests.helpers.tiny import images, init
from vgg_jax import VGG, Conv, InputError, VGGConfig
from vgg_jax.layers import BatchNorm
from vgg_jax.ops.convolution import (
    convolution,
    default_conv,
    first_cuda_conv,
    pointwise_conv,
    window_conv,
)

PAGE = Path(__file__).parents[1] / "docs" / "transformations.md"

# Images, maps of 4x4 and 2x2 positions, and a 1x1 kernel: every path of a CPU.
CONFIG = VGGConfig(((Conv(6),), (Conv(6),), (Conv(6, 1), Conv(6))), fc=(8, 8))
MODEL = VGG(CONFIG, 3, image_size=8)
# For tests of what is no convolution. Its fc6 reads 2x2 positions.
SMALL_MODEL = VGG(VGGConfig(((Conv(6),), (Conv(6),)), fc=(8, 8)), 3, image_size=8)
LABELS = np.array([0, 2])


class PlainVGG(nn.Module):
    """The same net of linen's own layers."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        types = {"dtype": self.dtype, "param_dtype": x.dtype}
        for stage, convs in enumerate(CONFIG.stages, 1):
            for number, conv in enumerate(convs, 1):
                window = (conv.kernel_size, conv.kernel_size)
                x = nn.Conv(conv.features, window, name=f"conv{stage}_{number}", **types)(x)
                x = nn.relu(x)
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = x.reshape(len(x), -1)
        x = nn.relu(nn.Dense(8, name="fc6", **types)(x))
        x = nn.relu(nn.Dense(8, name="fc7", **types)(x))
        return nn.Dense(3, name="fc8", **types)(x)


def nll(logits):
    """Sum of the losses of two images."""
    one_hot = jax.nn.one_hot(LABELS, 3, dtype=logits.dtype)
    return -jnp.sum(jax.nn.log_softmax(logits) * one_hot)


def loss(apply, params, x):
    return nll(apply(params, x).astype(x.dtype))


def hvp_forward_over_reverse(apply, params, x):
    gradient = jax.grad(functools.partial(loss, apply))
    return jax.jvp(lambda p: gradient(p, x), (params,), (params,))[1]


def hvp_reverse_over_reverse(apply, params, x):
    def dot(p):
        gradients = jax.grad(functools.partial(loss, apply))(p, x)
        return jax.tree.reduce(jnp.add, jax.tree.map(jnp.vdot, gradients, params))

    return jax.grad(dot)(params)


def hvp_reverse_over_forward(apply, params, x):
    return jax.grad(lambda p: jax.jvp(lambda p: loss(apply, p, x), (p,), (params,))[1])(params)


def stack(params):
    """Two nets."""
    return jax.tree.map(lambda a: jnp.stack([a, a[::-1]]), params)


def total_loss(apply, stacked, x):
    logits = jax.vmap(apply, (0, None))(stacked, x)
    return sum(map(nll, logits.astype(x.dtype)))


def scan_gradient(apply, params, x):
    def total(p):
        batches = jnp.stack([x, 2 * x])
        return lax.map(functools.partial(loss, apply, p), batches).sum()

    return jax.grad(total)(params)


def shard_map_gradient(apply, params, x):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))

    def gradient(p, x):
        return jax.grad(lambda p: lax.psum(jnp.sum(apply(p, x).astype(x.dtype) ** 2), "data"))(p)

    return jax.jit(jax.shard_map(gradient, mesh=mesh, in_specs=(P(), P("data")), out_specs=P()))(
        params, x
    )


def explicit_mesh_gradient(apply, params, x):
    mesh = jax.make_mesh((2,), ("data",))  # explicit axes are the default
    with jax.set_mesh(mesh):
        params = jax.device_put(params, NamedSharding(mesh, P()))
        x = jax.device_put(x, NamedSharding(mesh, P("data")))
        return jax.jit(jax.grad(lambda p: jnp.sum(apply(p, x).astype(x.dtype) ** 2)))(params)


def pmap_gradient(apply, params, x):
    gradient = jax.grad(lambda p, x: jnp.sum(apply(p, x).astype(x.dtype) ** 2))
    return jax.pmap(gradient, in_axes=(None, 0))(params, x[:, None])


# `transform(apply, params, x)`, by the name in the table.
TRANSFORMATIONS: dict[str, Callable] = {
    "`jax.grad`": lambda f, p, x: jax.grad(loss, (1, 2))(f, p, x),
    "`jax.jvp`": lambda f, p, x: jax.jvp(f, (p, x), (p, x[::-1]))[1],
    "`jax.linearize`": lambda f, p, x: jax.linearize(f, p, x)[1](p, x[::-1]),
    "`jax.jacfwd`": lambda f, p, x: jax.jacfwd(f, 1)(p, x),
    "`jax.jacrev`": lambda f, p, x: jax.jacrev(f, 1)(p, x),
    "`jax.hessian`": lambda f, p, x: jax.hessian(lambda row: loss(f, p, x.at[0, 3].set(row)))(
        x[0, 3]
    ),
    "forward-over-reverse product": hvp_forward_over_reverse,
    "reverse-over-forward product": hvp_reverse_over_forward,
    "reverse-over-reverse product": hvp_reverse_over_reverse,
    "`jax.vmap` over images": lambda f, p, x: jax.vmap(lambda row: f(p, row[None])[0])(x),
    "`jax.vmap` over parameters": lambda f, p, x: jax.vmap(f, (0, None))(stack(p), x),
    "gradient of such an ensemble": lambda f, p, x: jax.grad(total_loss, 1)(f, stack(p), x),
    "gradient of each example": lambda f, p, x: jax.vmap(
        jax.grad(lambda p, row: jnp.sum(f(p, row[None]).astype(x.dtype) ** 2)), (None, 0)
    )(p, x),
    "`jax.checkpoint`": lambda f, p, x: jax.grad(jax.checkpoint(functools.partial(loss, f)))(p, x),
    "`jax.lax.scan` over batches": scan_gradient,
    "`jax.pmap`": pmap_gradient,
    "`jax.shard_map` with `check_vma=True`": shard_map_gradient,
    "explicit mesh axes": explicit_mesh_gradient,
}


def random_params(dtype):
    """Parameters with which every layer has derivatives of about the same size."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(MODEL.lazy_init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]

    def draw(leaf):
        deviation = np.sqrt(2 / np.prod(leaf.shape[:-1])) if leaf.ndim > 1 else 0.1
        return jnp.asarray(rng.normal(0, deviation, leaf.shape), dtype)

    return jax.tree.map(draw, shapes)


# These take the rules that the others take as well.
LIKE_OTHERS = (
    "`jax.linearize`",
    "`jax.jacfwd`",
    "`jax.jacrev`",
    "reverse-over-forward product",
    "`jax.vmap` over images",
    "`jax.vmap` over parameters",
    "gradient of each example",
    "`jax.lax.scan` over batches",
)
# These compile by themselves.
NOT_JITTED = ("`jax.pmap`", "explicit mesh axes")


def outcomes(name, dtype, param_dtype):
    """The result of a transformation of our net and of the plain one, as lists of arrays."""
    model = MODEL.clone(dtype=dtype, param_dtype=param_dtype)
    params = random_params(param_dtype)
    x = jnp.asarray(images(2, 8, 8), param_dtype)

    def transform(net):
        function = functools.partial(
            TRANSFORMATIONS[name], lambda params, x: net.apply({"params": params}, x)
        )
        result = (function if name in NOT_JITTED else jax.jit(function))(params, x)
        return [np.asarray(a, np.float64) for a in jax.tree.leaves(result)]

    return transform(model), transform(PlainVGG(dtype))


def largest_error(actual, expected):
    """The largest difference in an array, relative to its largest value."""
    pairs = zip(actual, expected, strict=True)
    return max(np.abs(a - e).max() / np.abs(e).max() for a, e in pairs)


def float64_error(name):
    with jax.enable_x64(True):
        return largest_error(*outcomes(name, jnp.float64, jnp.float64))


def float32_error(name):
    return largest_error(*outcomes(name, jnp.float32, jnp.float32))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name not in ("`jax.grad`", "`jax.jvp`")))
        for name in TRANSFORMATIONS
    ],
)
def test_transformation_like_plain_net(name):
    assert float64_error(name) < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in TRANSFORMATIONS if name not in LIKE_OTHERS])
def test_transformation_in_float32_and_bfloat16(name):
    """The error of bfloat16 against float32 is at most twice that of the plain net."""
    actual, exact = outcomes(name, jnp.float32, jnp.float32)
    assert largest_error(actual, exact) < 2e-5
    actual, plain = outcomes(name, jnp.bfloat16, jnp.float32)
    assert largest_error(actual, exact) < 2 * largest_error(plain, exact)


def scores(params, x):
    """Mean scores of the 2x2 windows of a scaled map."""
    return window_conv(x * params["scale"], params["kernel"]).mean((1, 2))


def scores_by_windows(params, x):
    """The same from windows that are cut one by one."""
    x = x * params["scale"]
    windows = [
        x[:, i : i + 2, j : j + 2].reshape(len(x), -1)
        for i in range(x.shape[1] - 1)
        for j in range(x.shape[2] - 1)
    ]
    return sum(window @ params["kernel"] for window in windows) / len(windows)


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_transformation_of_score_map(name):
    """fc6 on a map that is larger than its window."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        shapes = {"x": (2, 5, 4, 3), "kernel": (12, 3), "scale": (1, 1, 1, 3)}
        arrays = {key: jnp.asarray(rng.normal(size=shape)) for key, shape in shapes.items()}
        x = arrays.pop("x")
        actual, expected = (
            [np.asarray(a) for a in jax.tree.leaves(TRANSFORMATIONS[name](net, arrays, x))]
            for net in (scores, scores_by_windows)
        )
        assert largest_error(actual, expected) < 1e-12


def normalised(params, x):
    """Mean outputs of a batch normalisation in training. The first example does not count."""
    batch_norm = BatchNorm(dtype=x.dtype, param_dtype=x.dtype)
    stats = {"mean": jnp.zeros(3), "var": jnp.ones(3)}
    variables = {"params": params, "batch_stats": stats}
    mask = jnp.arange(len(x)) != 0 if len(x) > 1 else None
    y, _ = batch_norm.apply(variables, x, True, mask, mutable=["batch_stats"])
    return (y * y).mean((1, 2))


def normalised_by_formula(params, x):
    counted = x[1:] if len(x) > 1 else x
    mean, var = counted.mean((0, 1, 2)), counted.var((0, 1, 2))
    y = (x - mean[None, None, None]) / jnp.sqrt(var + 1e-5)[None, None, None]
    y = y * params["scale"][None, None, None] + params["bias"][None, None, None]
    return (y * y).mean((1, 2))


@pytest.mark.parametrize("name", [name for name in TRANSFORMATIONS if name != "explicit mesh axes"])
def test_transformation_of_batch_norm(name):
    """`test_gradient_on_explicit_mesh` has the explicit axes."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        params = {key: jnp.asarray(rng.normal(size=3)) for key in ("scale", "bias")}
        x = jnp.asarray(rng.normal(size=(2, 5, 4, 3)))
        actual, expected = (
            [np.asarray(a) for a in jax.tree.leaves(TRANSFORMATIONS[name](net, params, x))]
            for net in (normalised, normalised_by_formula)
        )
        assert largest_error(actual, expected) < 1e-12


@pytest.mark.parametrize("name", ["scale", "bias"])
@pytest.mark.parametrize("transform", ["grad", "jvp"])
def test_one_parameter_of_batch_norm_in_shard_map(name, transform):
    """Statistics of the whole batch over two devices, and a derivative of one parameter only."""
    rng = np.random.default_rng(0)
    x, value = rng.normal(size=(4, 3, 3, 2)), rng.normal(size=2)
    others = {"scale": np.ones(2), "bias": np.zeros(2)}
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))

    def derivative(value, x, axis_name):
        layer = BatchNorm(dtype=x.dtype, param_dtype=x.dtype, axis_name=axis_name)
        stats = {"mean": jnp.zeros(2), "var": jnp.ones(2)}

        def loss(value):
            variables = {"params": others | {name: value}, "batch_stats": stats}
            y, _ = layer.apply(variables, x, True, mutable=["batch_stats"])
            total = (y**3).sum()
            return total if axis_name is None else lax.psum(total, axis_name)

        return jax.grad(loss)(value) if transform == "grad" else jax.jvp(loss, [value], [value])[1]

    with jax.enable_x64(True):
        expected = derivative(jnp.asarray(value), jnp.asarray(x), None)
        sharded = jax.shard_map(
            functools.partial(derivative, axis_name="data"),
            mesh=mesh,
            in_specs=(P(), P("data")),
            out_specs=P(),
        )
        actual = jax.jit(sharded)(jnp.asarray(value), jnp.asarray(x))
    np.testing.assert_allclose(actual, expected, rtol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("path", [first_cuda_conv, default_conv])
def test_transformations_on_paths_of_accelerators(path, monkeypatch):
    """The CPU computes what a GPU or a TPU would. The other transformations are like these."""
    names = ("`jax.jvp`", "`jax.hessian`", "forward-over-reverse product", "explicit mesh axes")
    names += ("`jax.vmap` over parameters", "gradient of each example")

    def convolve(x, epilogue, kernel, bias, filters):
        return path(x, kernel, bias, epilogue)

    monkeypatch.setattr("vgg_jax.ops.convolution._convolve", convolve)
    jax.clear_caches()
    try:
        errors = {name: float64_error(name) for name in names}
    finally:
        jax.clear_caches()
    assert max(errors.values()) < 1e-12, errors


def on_explicit_mesh(shape, params, x):
    """The arrays on a mesh with explicit axes, the batch sharded over the first."""
    mesh = jax.make_mesh(shape, ("data", "model"))
    put = functools.partial(jax.device_put, device=NamedSharding(mesh, P()))
    return put(params), jax.device_put(x, NamedSharding(mesh, P("data")))


@pytest.mark.slow
@pytest.mark.parametrize(
    "call",
    [
        lambda model, v, x: model.apply(v, x, train=True, mutable=["batch_stats"])[0],
        lambda model, v, x: model.clone(pool="avg").apply(v, x),
        lambda model, v, x: model.apply(v, x, method="score_map", ceil=True),
        lambda model, v, x: model.apply(v, x, method="features", layers=("relu1_1", "pool1"))[
            "pool1"
        ],
    ],
    ids=["batch norm in training", "average pooling", "score map", "features"],
)
def test_gradient_on_explicit_mesh(call):
    """Poolings that no convolution computes, and an fc6 that reads several positions."""
    model = SMALL_MODEL.clone(batch_norm=True, dropout_rate=0.0)
    variables, x = init(model), images(2, 8, 8)
    gradient = jax.jit(jax.grad(lambda v, x: jnp.sum(call(model, v, x) ** 2)))
    actual = gradient(*on_explicit_mesh((2, 1), variables, x))
    expected = gradient(variables, x)
    scale = max(jnp.abs(leaf).max() for leaf in jax.tree.leaves(expected))
    for a, e in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        np.testing.assert_allclose(a, e, atol=1e-5 * scale)


@pytest.mark.slow
def test_bfloat16_gradient_on_explicit_mesh_of_two_axes():
    """XLA aborts if a CPU sums bfloat16 over one of two axes."""
    model = MODEL.clone(dtype=jnp.bfloat16)
    params, x = on_explicit_mesh((1, 2), random_params(jnp.float32), images(2, 8, 8))
    gradient = jax.jit(jax.grad(lambda p, x: jnp.sum(model.apply({"params": p}, x))))
    jaxpr = str(jax.make_jaxpr(gradient)(params, x))
    sums = re.findall(r":(\w+)\[[^\n]*\] = psum", jaxpr)
    assert sums and set(sums) == {"f32"}
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(gradient(params, x)))


def test_sharded_kernel_is_refused():
    mesh = jax.make_mesh((2,), ("data",))
    kernel = jax.device_put(jnp.ones((3, 3, 8, 8)), NamedSharding(mesh, P(None, None, "data")))
    with pytest.raises(InputError, match=r"sharded as P.*'data'.*: expected only the batch axis"):
        convolution(jnp.ones((2, 8, 8, 8)), kernel, jnp.zeros(8))


def test_matmul_precision_of_the_caller():
    """The setting is read at the call, though a primitive is traced later."""

    def product(x, kernel):
        with jax.default_matmul_precision("highest"):
            return pointwise_conv(x, kernel).sum()

    gradient = jax.jit(jax.grad(product, (0, 1)))
    text = gradient.lower(jnp.ones((2, 1, 1, 3)), jnp.ones((3, 4))).as_text()
    products = re.findall(r"dot_general.*", text)
    assert len(products) == 2 and all("HIGHEST" in product for product in products)


@pytest.mark.slow
def test_gradient_of_each_example_with_symbolic_batch():
    def loss_of_one(params, x):
        return jnp.sum(MODEL.apply({"params": params}, x[None]) ** 2)

    gradients = jax.jit(jax.vmap(jax.grad(loss_of_one), (None, 0)))
    params, x = random_params(jnp.float32), images(3, 8, 8)
    (size,) = jax.export.symbolic_shape("n")
    shape = jax.ShapeDtypeStruct((size, 8, 8, 3), jnp.float32)
    actual = jax.export.export(gradients)(params, shape).call(params, x)
    for a, e in zip(*map(jax.tree.leaves, (actual, gradients(params, x))), strict=True):
        np.testing.assert_allclose(a, e, atol=1e-5 * np.abs(e).max())


def table():
    """The lines of the page's table, from new results."""
    header = "| transformation | vgg_jax | plain linen | difference in float64 | in float32 |"
    rows = (
        f"| {name} | yes | yes | {float64_error(name):.0e} | {float32_error(name):.0e} |"
        for name in TRANSFORMATIONS
    )
    return "\n".join([header, "|---|---|---|---|---|", *rows])


def test_page_lists_all_transformations():
    """The numbers are of the run that wrote them, and those of rounding."""
    rows = re.findall(r"^\| (.+?) \| yes \| yes \| (.+) \| (.+) \|$", PAGE.read_text(), re.M)
    assert [name for name, *_ in rows] == list(TRANSFORMATIONS)
    assert all(1e-17 < float(error) < 1e-12 for _, error, _ in rows)
    assert all(1e-8 < float(error) < 2e-5 for *_, error in rows)


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 2)
    before, _, after = re.split(r"((?:^\|.*\n)+)", PAGE.read_text(), flags=re.M)
    PAGE.write_text(f"{before}{table()}\n{after}")
