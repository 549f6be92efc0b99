"""Convolutions with gradients of our own, for every transformation of JAX.

`jax.custom_vjp` refuses forward-mode derivatives. So a convolution whose gradients are faster than
JAX's own is a primitive here, which is linear in its input and in its kernel.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax import Array, lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import NamedSharding, PartitionSpec

# The arrays of a convolution. A primitive computes one of them from the other two.
_INPUT, _KERNEL, _OUTPUT = _ROLES = range(3)
_CONFIG: Any = jax.config  # jax 0.10 does not declare the types of its settings


class _Settings(NamedTuple):
    """The parameters of a primitive."""

    result: int  # which of the three arrays it computes
    shape: tuple[int, ...]  # of the result
    tree: Any  # the structure of the residuals
    precision: Any  # `jax.default_matmul_precision` at the call; a primitive is traced later


def bilinear_conv(
    name: str,
    *,
    forward: Callable[..., Array],
    input_gradient: Callable[..., Array],
    kernel_gradient: Callable[..., Array],
    is_matrix_product: bool = False,
) -> Callable[..., Array]:
    """Makes a convolution from three functions: its output and its two gradients.

    The sum of g · forward(x, kernel) is linear in x, in the kernel and in g. The three functions
    are its derivatives with respect to g, x and the kernel. So the derivatives of each function
    are the other two, to every order.

    Args:
        name: Name of the primitive, as a jaxpr shows it.
        forward: `forward(x, kernel, *residuals)` returns the output.
        input_gradient: `input_gradient(kernel, g, *residuals, shape=…)` returns the gradient with
            respect to an input of that shape.
        kernel_gradient: `kernel_gradient(x, g, *residuals, shape=…)` returns the gradient with
            respect to a kernel of that shape.
        is_matrix_product: `vmap` over kernels batches the product, which suits a GPU. By default it
            computes one after the other, which suits a CPU.

    Returns:
        A function `conv(x, kernel, *residuals)`. Residuals are pytrees of arrays whose first axis
        is the batch, such as the mask of a ReLU. They are constants in derivatives.
    """

    @functools.partial(jax.jit, static_argnames=_Settings._fields)  # traced once for each shape
    def compute(a: Array, b: Array, *leaves: Array, **params: Any) -> Array:
        settings = _Settings(**params)
        residuals = jax.tree.unflatten(settings.tree, leaves)
        with jax.default_matmul_precision(settings.precision):
            if settings.result == _OUTPUT:
                return forward(a, b, *residuals)
            gradient = input_gradient if settings.result == _INPUT else kernel_gradient
            return gradient(a, b, *residuals, shape=settings.shape)

    primitive = Primitive(name)
    primitive.def_impl(compute)
    primitive.def_abstract_eval(_result_type)
    ad.primitive_jvps[primitive] = functools.partial(_jvp, primitive)
    ad.primitive_transposes[primitive] = functools.partial(_transpose, primitive)
    batching.primitive_batchers[primitive] = (
        functools.partial(_batch_by_vmap, compute)
        if is_matrix_product
        else functools.partial(_batch_conv, primitive, compute)
    )
    mlir.register_lowering(primitive, mlir.lower_fun(compute, multiple_results=False))

    def conv(x: Array, kernel: Array, *residuals: Any) -> Array:
        leaves, tree = jax.tree.flatten(residuals)
        shape = jax.eval_shape(forward, x, kernel, *residuals).shape
        settings = _Settings(_OUTPUT, shape, tree, _CONFIG.jax_default_matmul_precision)
        return _bind(primitive, x, kernel, *leaves, **settings._asdict())

    return conv


def _bind(primitive: Primitive, *operands: Array, **params: Any) -> Array:
    return primitive.bind(*match_varying_axes(*operands), **params)


def match_varying_axes(*arrays: Array) -> tuple[Array, ...]:
    """Casts arrays in `jax.shard_map` so that they vary over the same mesh axes.

    The transpose of the cast sums a gradient over the axes that it adds.

    Args:
        *arrays: Arrays.

    Returns:
        The arrays. Outside of `jax.shard_map` they are unchanged.
    """
    varying = [jax.typeof(array).manual_axis_type.varying for array in arrays]
    axes = frozenset().union(*varying)
    return tuple(
        lax.pcast(array, tuple(axes - own), to="varying") if axes - own else array
        for array, own in zip(arrays, varying, strict=True)
    )


def _operand_roles(result: int) -> list[int]:
    return [role for role in _ROLES if role != result]


def _result_type(a: Any, *_: Any, shape: tuple[int, ...], **params: Any) -> Any:
    sharding = NamedSharding(a.sharding.mesh, PartitionSpec(*[None] * len(shape)))
    return a.update(shape=shape, weak_type=False, sharding=sharding)


def _jvp(primitive: Primitive, primals: tuple, tangents: tuple, **params: Any) -> tuple[Array, Any]:
    (a, b, *leaves), (da, db, *_) = primals, tangents
    y = _bind(primitive, a, b, *leaves, **params)
    pairs = [(da, b)] * (type(da) is not ad.Zero) + [(a, db)] * (type(db) is not ad.Zero)
    terms = [_bind(primitive, *pair, *leaves, **params) for pair in pairs]
    return y, functools.reduce(ad.add_tangents, terms, ad.Zero(jax.typeof(y).to_tangent_aval()))


def _transpose(primitive: Primitive, ct: Any, *operands: Any, result: int, **params: Any) -> tuple:
    """The gradient with respect to the operand that is unknown."""
    arrays, leaves = dict(zip(_operand_roles(result), operands, strict=False)), operands[2:]
    unknown = next(role for role, array in arrays.items() if ad.is_undefined_primal(array))
    arrays[result] = ad.instantiate_zeros(ct)
    gradient = _bind(
        primitive,
        *(arrays[role] for role in _operand_roles(unknown)),
        *leaves,
        **(params | {"result": unknown, "shape": arrays[unknown].aval.shape}),
    )
    gradients = (gradient if role == unknown else None for role in _operand_roles(result))
    return (*gradients, *(None for _ in leaves))


def _batch_by_vmap(
    compute: Callable[..., Array], operands: tuple, dims: tuple, **params: Any
) -> tuple[Array, int]:
    """The rule of `vmap` for a matrix product. JAX then differentiates the batched product."""
    return jax.vmap(functools.partial(compute, **params), dims)(*operands), 0


def _batch_conv(
    primitive: Primitive,
    compute: Callable[..., Array],
    operands: tuple,
    dims: tuple,
    **params: Any,
) -> tuple[Array, int]:
    """The rule of `vmap` for a convolution.

    It joins batches that share a kernel. Otherwise it computes one after the other, since one alone
    fills all cores of a CPU.
    """
    size = next(a.shape[dim] for a, dim in zip(operands, dims, strict=True) if dim is not None)
    if not isinstance(size, int):  # a symbolic size, from jax.export
        return _batch_by_vmap(compute, operands, dims, **params)
    result, shape = params["result"], params["shape"]
    kernel = _operand_roles(result).index(_KERNEL) if result != _KERNEL else None
    if kernel is not None and dims[kernel] is None:
        joined = (
            a if i == kernel else _join(batching.bdim_at_front(a, dim, size))
            for i, (a, dim) in enumerate(zip(operands, dims, strict=True))
        )
        y = primitive.bind(*joined, **(params | {"shape": (size * shape[0], *shape[1:])}))
        return y.reshape(size, *shape), 0
    stacked = {
        i: batching.bdim_at_front(a, dim, size)
        for i, (a, dim) in enumerate(zip(operands, dims, strict=True))
        if dim is not None
    }

    def bind_one(rows: dict[int, Array]) -> Array:
        return primitive.bind(*(rows.get(i, a) for i, a in enumerate(operands)), **params)

    return lax.map(bind_one, stacked), 0


def _join(x: Array) -> Array:
    return x.reshape(-1, *x.shape[2:])
