"""3x3 convolution by Winograd's F(4x4, 3x3): 36 products for a 4x4 tile of outputs where the definition takes 144.

Y = Aᵀ[(G g Gᵀ) ⊙ (Bᵀ d B)]A, with the matrices of Lavin & Gray (arXiv 1509.09308). What makes it fast on a CPU: the tile
transforms are sums written out, the 36 positions are one batched matrix product, and a few images, or a strip of a large one, are
taken at a time, so that their 36 planes stay in the cache. In float32 the result is within 2e-5 of the largest value; in bfloat16 it
is not usable.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

_BT = np.array(
    [[4, 0, -5, 0, 1, 0], [0, -4, -4, 1, 1, 0], [0, 4, -4, -1, 1, 0], [0, -2, -1, 2, 1, 0], [0, 2, -1, -2, 1, 0], [0, 4, 0, -5, 0, 1]]
)
_G = np.array([[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]]) / 24
_AT = np.array([[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]])
_GG = np.kron(_G, _G)  # (36, 9)

# Taken at a time: 4 MB of input, so that the transforms stay in the cache, but at least 256 tiles, over which the product reads the filters
# once (2-core x86, float32, batch 8, forward and both gradients: 2**18 and 2**22 values 1.1 to 1.5 times as long on most maps).
_VALUES = 2**20
_TILES = 256


class _Blocks(NamedTuple):
    """How maps are cut: into groups of whole images, or where one image is too large, into strips of its rows of tiles."""

    images: int  # in a block
    groups: int
    rows: int  # of tiles, in a strip
    strips: int
    columns: int  # of tiles


def _blocks(shape: Sequence[int]) -> _Blocks:
    n, h, w, c = shape
    rows, columns = -(-h // 4), -(-w // 4)
    fit = max(1, max(_VALUES // (16 * c), _TILES) // columns)  # rows of tiles that make a block
    groups = max(1, -(-n // max(1, fit // rows)))
    strips = -(-rows // fit)
    return _Blocks(-(-n // groups), groups, -(-rows // strips), strips, columns)


def _combine(matrix: np.ndarray, planes: Sequence[Array], axis: int) -> Array:
    """Each row of a small matrix as a sum of scaled planes, stacked.

    Each with at most three axes: with four, LLVM takes ten times as long to compile some shapes.
    """
    rows = [functools.reduce(jnp.add, (float(m) * p for m, p in zip(row, planes, strict=True) if m)) for row in matrix]
    # Fused with its reader the first of two transforms would be computed six times over, and compile ten times as long.
    return lax.optimization_barrier(jnp.stack(rows, axis))


def transform_filters(kernel: Array, rotated: bool = False) -> Array:
    """(3, 3, C, K) -> (36, C, K), what `convolve` takes; with the kernel turned by 180 degrees if `rotated`."""
    return (jnp.asarray(_GG[:, ::-1] if rotated else _GG, kernel.dtype) @ kernel.reshape(9, -1)).reshape(36, *kernel.shape[2:])


def _input_tiles(x: Array) -> Array:
    """(n, 4 rows + 2, 4 columns + 2, C) -> (36, tiles, C): the 6x6 windows at every fourth pixel, transformed."""
    n, h, w, c = x.shape
    x = x.reshape(n, h, w * c)
    x = _combine(_BT, [x[:, i : i + h - 5 : 4] for i in range(6)], 0).reshape(6, -1, w, c)
    return _combine(_BT, [x[:, :, j : j + w - 5 : 4] for j in range(6)], 1).reshape(36, -1, c)


def _output_image(tiles: Array, n: int, rows: int, columns: int) -> Array:
    """(36, tiles, K) -> (n, 4 rows, 4 columns, K)"""
    k = tiles.shape[-1]
    tiles = tiles.reshape(6, 6, n * rows, columns * k)
    y = _combine(_AT, list(tiles), 2).reshape(6, -1, columns, k)  # (6, n · 4 rows, columns, K)
    return _combine(_AT, list(y), 2).reshape(n, 4 * rows, 4 * columns, k)


def _gradient_tiles(g: Array) -> Array:
    """(n, 4 rows, 4 columns, K) -> (36, tiles, K): the transpose of `_output_image`."""
    n, h, w, k = g.shape
    g = g.reshape(n * h // 4, 4, w * k)
    g = _combine(_AT.T, [g[:, i] for i in range(4)], 0).reshape(6, -1, w // 4, 4, k)
    return _combine(_AT.T, [g[:, :, :, j] for j in range(4)], 1).reshape(36, -1, k)


def _cut(x: Array, blocks: _Blocks, halo: int) -> Callable[[Array], Array]:
    """A function from a block's number to it, (images, 4 rows + 2 halo, 4 columns + 2 halo, C), zeros where the maps (N, H, W, C) end."""
    images, groups, rows, strips, columns = blocks
    n, h, w, c = x.shape
    down, right = 4 * rows * strips + halo - h, 4 * columns + halo - w
    x = jnp.pad(x, ((0, images * groups - n), (halo, down), (halo, right), (0, 0)))
    size = (images, 4 * rows + 2 * halo, 4 * columns + 2 * halo, c)
    return lambda block: lax.dynamic_slice(x, (block // strips * images, block % strips * 4 * rows, 0, 0), size)


def convolve(x: Array, filters: Array) -> Array:
    """(N, H, W, C), transformed filters (36, C, K) -> (N, H, W, K), as `convolution_3x3`."""
    n, h, w, _ = x.shape
    blocks = _blocks(x.shape)
    images, groups, rows, strips, columns = blocks
    block = _cut(x, blocks, halo=1)

    def one(number: Array) -> Array:
        return _output_image(jnp.einsum("tnc,tck->tnk", _input_tiles(block(number)), filters), images, rows, columns)

    y = lax.map(one, jnp.arange(groups * strips))
    return y.reshape(images * groups, 4 * rows * strips, 4 * columns, filters.shape[-1])[:n, :h, :w]


@jax.custom_vjp
def convolution_3x3(x: Array, kernel: Array) -> Array:
    """(N, H, W, C), (3, 3, C, K) -> (N, H, W, K): stride 1, zero padding 1. Differentiable in reverse, any number of times."""
    return convolve(x, transform_filters(kernel))


def _forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return convolution_3x3(x, kernel), (x, kernel)


def _backward(saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, kernel = saved
    # By itself XLA transposes in blocks; fused, value by value.
    return convolve(g, transform_filters(lax.optimization_barrier(kernel.swapaxes(2, 3)), rotated=True)), kernel_gradient(x, g)


def kernel_gradient(x: Array, g: Array) -> Array:
    """(N, H, W, C) and the gradient (N, H, W, K) of what `convolution_3x3` makes of it -> (3, 3, C, K)."""
    blocks = _blocks(x.shape)
    inputs, gradients = _cut(x, blocks, halo=1), _cut(g, blocks, halo=0)

    def add(total: Array, block: Array) -> tuple[Array, None]:
        return total + jnp.einsum("tnc,tnk->tck", _input_tiles(inputs(block)), _gradient_tiles(gradients(block))), None

    shape = x.shape[-1], g.shape[-1]
    total, _ = lax.scan(add, jnp.zeros((36, *shape), x.dtype), jnp.arange(blocks.groups * blocks.strips))
    return (jnp.asarray(_GG.T, x.dtype) @ total.reshape(36, -1)).reshape(3, 3, *shape)


convolution_3x3.defvjp(_forward, _backward)
