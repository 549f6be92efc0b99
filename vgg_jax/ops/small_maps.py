"""Convolution of feature maps smaller than the kernel, on a CPU.

XLA's convolution is slow on them (docs/performance.md#small-maps). In float32 and float64, each
element of the kernel is one matrix product of the inputs and outputs that it connects, and the
products are added. On 2x2 pixels, a 3x3 kernel then needs 16 products of pixels, instead of 36 with
the padding. In 16 bits, each addition would round, so im2col makes one product, with the padding.
A kernel gradient has nothing to add, so it is computed by elements in 16 bits, too.

Activations have the shape (N, H, W, C), kernels (k, k, C, K).
"""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from vgg_jax.ops.bilinear import bilinear_conv


def small_map_conv(x: Array, kernel: Array) -> Array:
    """Convolves (N, H, W, C) with a kernel (k, k, C, K), k odd, to (N, H, W, K)."""
    is_16_bit = jnp.finfo(x.dtype).bits < 32
    return _conv_by_im2col(x, kernel) if is_16_bit else _conv_by_elements(x, kernel)


def windows(x: Array, size: int) -> Array:
    """The size x size window around each position: (N, H, W, C) -> (N, H, W, size · size · C)."""
    h, w = x.shape[1:3]
    pad = (size // 2, size // 2)
    x = jnp.pad(x, ((0, 0), pad, pad, (0, 0)))
    shifted = [x[:, i : i + h, j : j + w] for i in range(size) for j in range(size)]
    return jnp.concatenate(shifted, axis=-1)


# One product for each element of the kernel


class _Element(NamedTuple):
    """An element of the kernel, and the rows and columns of the map that it connects."""

    row: int
    column: int
    inputs: tuple[slice, slice]
    outputs: tuple[slice, slice]


def _elements(height: int, width: int, size: int) -> Iterator[_Element]:
    """The elements of a kernel that meet inputs inside the map."""
    for row, in_rows, out_rows in _overlaps(height, size):
        for column, in_columns, out_columns in _overlaps(width, size):
            yield _Element(row, column, (in_rows, in_columns), (out_rows, out_columns))


def _overlaps(length: int, size: int) -> Iterator[tuple[int, slice, slice]]:
    """For each position along one side of the kernel, the inputs and the outputs."""
    for position in range(size):
        shift = position - size // 2
        first_input, first_output = max(shift, 0), max(-shift, 0)
        count = length - abs(shift)
        if count > 0:
            inputs = slice(first_input, first_input + count)
            yield position, inputs, slice(first_output, first_output + count)


def _pad_to_map(x: Array, place: tuple[slice, slice], height: int, width: int) -> Array:
    """Puts a part of a map at its place, with zeros around it."""
    rows, columns = place
    widths = (rows.start, height - rows.stop), (columns.start, width - columns.stop)
    return jnp.pad(x, ((0, 0), *widths, (0, 0)))


def _forward(x: Array, kernel: Array) -> Array:
    h, w = x.shape[1:3]
    products = (
        _pad_to_map(x[:, *e.inputs] @ kernel[e.row, e.column], e.outputs, h, w)
        for e in _elements(h, w, len(kernel))
    )
    return functools.reduce(jnp.add, products)


def _input_gradient(kernel: Array, g: Array, *, shape: tuple[int, ...]) -> Array:
    h, w = shape[1:3]
    products = (
        _pad_to_map(g[:, *e.outputs] @ kernel[e.row, e.column].T, e.inputs, h, w)
        for e in _elements(h, w, len(kernel))
    )
    return functools.reduce(jnp.add, products)


def _kernel_gradient(x: Array, g: Array, *, shape: tuple[int, ...]) -> Array:
    h, w = x.shape[1:3]
    size, _, channels, features = shape
    products = {
        (e.row, e.column): x[:, *e.inputs].reshape(-1, channels).T
        @ g[:, *e.outputs].reshape(-1, features)
        for e in _elements(h, w, size)
    }
    zeros = jnp.zeros((channels, features), g.dtype)
    elements = [products.get((i, j), zeros) for i in range(size) for j in range(size)]
    return jnp.stack(elements).reshape(shape)


_conv_by_elements = bilinear_conv(
    "small_map_conv",
    forward=_forward,
    input_gradient=_input_gradient,
    kernel_gradient=_kernel_gradient,
)


# Im2col


def _im2col(x: Array, kernel: Array) -> Array:
    return windows(x, len(kernel)) @ kernel.reshape(-1, kernel.shape[-1])


def _im2col_input_gradient(kernel: Array, g: Array, *, shape: tuple[int, ...]) -> Array:
    # The transpose of `windows` would add nine arrays, rounding to bfloat16 each time. A
    # convolution with the rotated kernel is a single product.
    return _im2col(g, lax.optimization_barrier(kernel.swapaxes(2, 3))[::-1, ::-1])


_conv_by_im2col = bilinear_conv(
    "im2col_conv",
    forward=_im2col,
    input_gradient=_im2col_input_gradient,
    kernel_gradient=_kernel_gradient,
)
