"""3x3 convolution by Winograd's F(4x4, 3x3): 36 products for a 4x4 tile of outputs where the definition takes 144.

Y = Aᵀ[(G g Gᵀ) ⊙ (Bᵀ d B)]A, with the matrices of Lavin & Gray (arXiv 1509.09308). What makes it fast on a CPU: the tile
transforms are sums written out, the 36 positions are one batched matrix product, and few images are taken at a time, so that
their 36 planes stay in the cache. In float32 the result is within 2e-5 of the largest value; in bfloat16 it is not usable.
"""

import functools
from collections.abc import Sequence

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

_PIXELS = 4096  # outputs taken at a time; a step of net A at 32 pixels: 3 % slower at 2048 and 16384, equal at 8192


def _combine(matrix: np.ndarray, planes: Sequence[Array], axis: int) -> Array:
    """Each row of a small matrix as a sum of scaled planes, stacked."""
    rows = [functools.reduce(jnp.add, (float(m) * p for m, p in zip(row, planes, strict=True) if m)) for row in matrix]
    # Fused with its reader the first of two transforms would be computed six times over, and compile ten times as long.
    return lax.optimization_barrier(jnp.stack(rows, axis))


def _transform_filters(kernel: Array) -> Array:
    """(3, 3, C, K) -> (36, C, K)"""
    return (jnp.asarray(_GG, kernel.dtype) @ kernel.reshape(9, -1)).reshape(36, *kernel.shape[2:])


def _input_tiles(x: Array) -> Array:
    """(n, H, W, C) -> (36, tiles, C): the 6x6 windows at every fourth pixel, zero padded, transformed."""
    _, h, w, c = x.shape
    rows, columns = -(-h // 4), -(-w // 4)
    x = jnp.pad(x, ((0, 0), (1, 4 * rows + 1 - h), (1, 4 * columns + 1 - w), (0, 0)))
    x = _combine(_BT, [x[:, i : i + 4 * rows - 3 : 4] for i in range(6)], 0)
    return _combine(_BT, [x[:, :, :, j : j + 4 * columns - 3 : 4] for j in range(6)], 1).reshape(36, -1, c)


def _output_image(tiles: Array, n: int, h: int, w: int) -> Array:
    """(36, tiles, K) -> (n, H, W, K)"""
    rows, columns, k = -(-h // 4), -(-w // 4), tiles.shape[-1]
    tiles = tiles.reshape(6, 6, n, rows, columns, k)
    y = _combine(_AT, [tiles[i] for i in range(6)], 3)  # (6, n, rows, 4, columns, K)
    y = _combine(_AT, [y[j] for j in range(6)], 4)
    return y.reshape(n, 4 * rows, 4 * columns, k)[:, :h, :w]


def _gradient_tiles(g: Array) -> Array:
    """(n, H, W, K) -> (36, tiles, K): the transpose of `_output_image`."""
    _, h, w, k = g.shape
    g = jnp.pad(g, ((0, 0), (0, -h % 4), (0, -w % 4), (0, 0)))
    g = _combine(_AT.T, [g[:, i::4] for i in range(4)], 0)
    return _combine(_AT.T, [g[:, :, :, j::4] for j in range(4)], 1).reshape(36, -1, k)


def _chunked(x: Array) -> Array:
    """(N, H, W, C) -> (chunks, n, H, W, C), zero images added at the end where N does not divide."""
    n, h, w, _ = x.shape
    chunks = max(1, -(-n // max(1, _PIXELS // (h * w))))
    size = max(1, -(-n // chunks))
    return jnp.pad(x, ((0, chunks * size - n), (0, 0), (0, 0), (0, 0))).reshape(chunks, size, *x.shape[1:])


def _convolve(x: Array, filters: Array) -> Array:
    def one(x: Array) -> Array:
        return _output_image(jnp.einsum("tnc,tck->tnk", _input_tiles(x), filters), *x.shape[:3])

    chunks = _chunked(x)
    y = one(chunks[0]) if len(chunks) == 1 else lax.map(one, chunks)
    return y.reshape(-1, *x.shape[1:3], filters.shape[-1])[: x.shape[0]]


@jax.custom_vjp
def convolution_3x3(x: Array, kernel: Array) -> Array:
    """(N, H, W, C), (3, 3, C, K) -> (N, H, W, K): stride 1, zero padding 1. Differentiable in reverse, any number of times."""
    return _convolve(x, _transform_filters(kernel))


def _forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return convolution_3x3(x, kernel), (x, kernel)


def _backward(saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, kernel = saved
    dx = _convolve(g, _transform_filters(kernel[::-1, ::-1].swapaxes(2, 3)))

    def add(total: Array, pair: tuple[Array, Array]) -> tuple[Array, None]:
        return total + jnp.einsum("tnc,tnk->tck", _input_tiles(pair[0]), _gradient_tiles(pair[1])), None

    total, _ = lax.scan(add, jnp.zeros((36, *kernel.shape[2:]), x.dtype), (_chunked(x), _chunked(g)))
    return dx, (jnp.asarray(_GG.T, x.dtype) @ total.reshape(36, -1)).reshape(kernel.shape)


convolution_3x3.defvjp(_forward, _backward)
