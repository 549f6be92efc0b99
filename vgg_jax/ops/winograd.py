"""3x3 convolution by Winograd's F(4x4, 3x3): 36 products for a 4x4 tile of outputs where the definition takes 144.

Y = Aᵀ[(G g Gᵀ) ⊙ (Bᵀ d B)]A, with the matrices of Lavin & Gray (arXiv 1509.09308). What makes it fast on a CPU: the tile
transforms are sums written out, the 36 positions are one batched matrix product, and a few images, or a strip of a large one, are
taken at a time, so that their 36 planes stay in the cache, with the padding before and what is done behind. In float32 the result is
within 2e-5 of the largest value; in bfloat16 it is not usable.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

_BT = np.array(
    [
        [4, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ]
)
_G = np.array([[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]]) / 24
_AT = np.array([[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]])
_GG = np.kron(_G, _G)  # (36, 9)

# Tiles taken at a time, over which the product reads the filters once, while their planes stay in the cache; of the kernel's gradient, that
# adds to as many sums for each block, as many as make 4 MB of input (2-core x86, float32, batch 8; with a quarter and with four times of
# both forward and gradients take 1.1 to 1.5 times as long on most maps).
_TILES = 256
_GRADIENT_VALUES = 2**20


class _Blocks(NamedTuple):
    """How maps are cut: into groups of whole images, or where one image is too large, into strips of its rows of tiles."""

    images: int  # in a block
    groups: int
    rows: int  # of tiles, in a strip
    strips: int
    columns: int  # of tiles


def _blocks(shape: Sequence[int], tiles: int) -> _Blocks:
    n, h, w, _ = shape
    rows, columns = -(-h // 4), -(-w // 4)
    fit = max(1, tiles // columns)  # rows of tiles that make a block
    groups = max(1, -(-n // max(1, fit // rows)))
    strips = -(-rows // fit)
    return _Blocks(-(-n // groups), groups, -(-rows // strips), strips, columns)


def _apply_matrix(matrix: np.ndarray, planes: Sequence[Array], axis: int) -> Array:
    """Each row of a small matrix as a sum of scaled planes, stacked.

    Each with at most three axes: with four, LLVM takes ten times as long to compile some shapes.
    """
    rows = [
        functools.reduce(jnp.add, (float(m) * p for m, p in zip(row, planes, strict=True) if m))
        for row in matrix
    ]
    # Fused with its reader the first of two transforms would be computed six times over, and compile ten times as long.
    return lax.optimization_barrier(jnp.stack(rows, axis))


def transform_filters(kernel: Array, rotated: bool = False) -> Array:
    """(3, 3, C, K) -> (36, C, K), what `convolve` takes; with the kernel turned by 180 degrees if `rotated`."""
    return (
        jnp.asarray(_GG[:, ::-1] if rotated else _GG, kernel.dtype) @ kernel.reshape(9, -1)
    ).reshape(36, *kernel.shape[2:])


def _input_tiles(x: Array) -> Array:
    """(n, 4 rows + 2, 4 columns + 2, C) -> (36, tiles, C): the 6x6 windows at every fourth pixel, transformed."""
    n, h, w, c = x.shape
    x = x.reshape(n, h, w * c)
    x = _apply_matrix(_BT, [x[:, i : i + h - 5 : 4] for i in range(6)], 0).reshape(6, -1, w, c)
    return _apply_matrix(_BT, [x[:, :, j : j + w - 5 : 4] for j in range(6)], 1).reshape(36, -1, c)


def _output_image(tiles: Array, n: int, rows: int, columns: int) -> Array:
    """(36, tiles, K) -> (n, 4 rows, 4 columns, K)"""
    k = tiles.shape[-1]
    tiles = tiles.reshape(6, 6, n * rows, columns * k)
    y = _apply_matrix(_AT, list(tiles), 2).reshape(6, -1, columns, k)  # (6, n · 4 rows, columns, K)
    return _apply_matrix(_AT, list(y), 2).reshape(n, 4 * rows, 4 * columns, k)


def _gradient_tiles(g: Array) -> Array:
    """(n, 4 rows, 4 columns, K) -> (36, tiles, K): the transpose of `_output_image`."""
    n, h, w, k = g.shape
    g = g.reshape(n * h // 4, 4, w * k)
    g = _apply_matrix(_AT.T, [g[:, i] for i in range(4)], 0).reshape(6, -1, w // 4, 4, k)
    return _apply_matrix(_AT.T, [g[:, :, :, j] for j in range(4)], 1).reshape(36, -1, k)


def _block_reader(x: Array, blocks: _Blocks, halo: int) -> Callable[[Array], Array]:
    """A function from a block's number to it, (images, 4 rows + 2 halo, 4 columns + 2 halo, C), zeros where the maps (N, H, W, C) end."""
    images, groups, rows, strips, columns = blocks
    n, h, w, c = x.shape
    wide = x.dtype if x.dtype == bool else jnp.promote_types(x.dtype, jnp.float32)
    tall, right = 4 * rows + 2 * halo, 4 * columns + halo - w
    if images * groups > n or (
        strips > 1 and 4 * rows * strips > h
    ):  # else nothing but a block is copied
        x = jnp.pad(x, ((0, images * groups - n), (0, 4 * rows * strips - h), (0, 0), (0, 0)))

    def block(number: Array) -> Array:
        first, top = number // strips * images, number % strips * 4 * rows
        start = jnp.clip(top - halo, 0, max(0, x.shape[1] - tall))
        # By itself a copy; with the zeros around in one loop it takes two to five times as long. So below.
        part = lax.optimization_barrier(
            lax.dynamic_slice(
                x, (first, start, 0, 0), (images, min(tall, x.shape[1]), w, c)
            ).astype(wide)
        )
        if strips == 1:
            part = jnp.pad(
                part, ((0, 0), (halo, 4 * rows + halo - x.shape[1]), (halo, right), (0, 0))
            )
        else:  # the first and the last strip reach over the map's edge
            part = jnp.pad(part, ((0, 0), (halo, halo), (halo, right), (0, 0)))
            part = lax.dynamic_slice(
                part, (0, top - start, 0, 0), (images, tall, w + halo + right, c)
            )
        return lax.optimization_barrier(part)

    return block


def convolve(
    x: Array, filters: Array, then: Callable[..., Any] = lambda y: y, *beside: Array
) -> Any:
    """(N, H, W, C), transformed filters (36, C, K) -> (N, H, W, K): stride 1, zero padding 1. Differentiable in reverse.

    `then` is done to the sums while they are in the cache: a function of whole tiles of some images, (n, 4 rows, 4 columns, K), also
    those that reach over the edge, and of the same pixels of what is `beside`, (N, H, W, C). It may pool by 2x2 windows, and return
    several arrays.
    """
    n, h, w, _ = x.shape
    blocks = _blocks(x.shape, _TILES)
    images, groups, rows, strips, columns = blocks
    block, others = (
        _block_reader(x, blocks, halo=1),
        [_block_reader(other, blocks, halo=0) for other in beside],
    )

    def one(number: Array) -> Any:
        y = _output_image(
            jnp.einsum("tnc,tck->tnk", _input_tiles(block(number)), filters), images, rows, columns
        )
        return then(y, *(other(number) for other in others))

    def joined(y: Array) -> Array:
        pooled = 4 * columns // y.shape[3]
        return y.reshape(images * groups, strips * y.shape[2], *y.shape[3:])[
            :n, : h // pooled, : w // pooled
        ]

    return jax.tree.map(joined, lax.map(one, jnp.arange(groups * strips)))


def kernel_gradient(x: Array, g: Array) -> Array:
    """(N, H, W, C) and the gradient (N, H, W, K) of its convolution with a 3x3 kernel -> (3, 3, C, K), of at least float32."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    blocks = _blocks(x.shape, max(_TILES, _GRADIENT_VALUES // 16 // x.shape[-1]))
    inputs, gradients = _block_reader(x, blocks, halo=1), _block_reader(g, blocks, halo=0)

    def add(total: Array, number: Array) -> tuple[Array, None]:
        tiles, gradient_tiles = _input_tiles(inputs(number)), _gradient_tiles(gradients(number))
        return total + jnp.einsum("tnc,tnk->tck", tiles, gradient_tiles), None

    shape = x.shape[-1], g.shape[-1]
    total, _ = lax.scan(
        add, jnp.zeros((36, *shape), wide), jnp.arange(blocks.groups * blocks.strips)
    )
    return (jnp.asarray(_GG.T, wide) @ total.reshape(36, -1)).reshape(3, 3, *shape)
