"""3x3 convolution by Winograd's F(4x4, 3x3), made for CPUs.

Y = Aᵀ[(G g Gᵀ) ⊙ (Bᵀ d B)]A, with the matrices of Lavin & Gray (arXiv 1509.09308). A 4x4 tile of
outputs takes 36 products where the definition takes 144. Three things make it fast on a CPU:

- The tile transforms are unrolled into additions.
- The 36 positions form one batched matrix product.
- The work goes block by block: a few images, or a strip of a large one. The 36 planes of a block
  stay in cache from the padding to the epilogue (docs/performance.md#winograd).

bfloat16 is too coarse for the transforms (docs/performance.md#winograd).

The transforms are hundreds of operations in a net. They use `lax`, which traces faster than jnp,
and `jax.jit` with `inline` keeps their traces for blocks of equal shape
(docs/performance.md#first-answer).
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

# Tiles of a block. The product reads the filters once for each block, whose planes stay in cache.
_TILES = 256
# Input values (4 MB) of a block of the kernel gradient. Each block adds to all sums, so a block is
# larger here (docs/performance.md#winograd).
_GRADIENT_VALUES = 2**20


class _Blocks(NamedTuple):
    """Division of a batch into blocks: groups of images, or strips of one large image."""

    images: int  # in a block
    groups: int
    rows: int  # rows of tiles in a strip
    strips: int
    columns: int  # tiles in a row


def _blocks(shape: Sequence[int], tiles: int) -> _Blocks:
    """Divides a batch (N, H, W, C) into blocks of about `tiles` tiles."""
    n, h, w, _ = shape
    rows, columns = -(-h // 4), -(-w // 4)
    rows_per_block = max(1, tiles // columns)
    groups = max(1, -(-n // max(1, rows_per_block // rows)))
    strips = -(-rows // rows_per_block)
    return _Blocks(-(-n // groups), groups, -(-rows // strips), strips, columns)


def _scaled(factor: int, plane: Array) -> Array:
    if factor in (1, -1):
        return plane if factor == 1 else lax.neg(plane)
    return lax.mul(plane, lax.full_like(plane, factor))


def _apply_matrix(matrix: np.ndarray, planes: Sequence[Array], axis: int) -> Array:
    """Multiplies planes by a small matrix, and stacks the sums of scaled planes.

    Planes have at most three axes: LLVM is slow to compile some shapes of four.
    """
    rows = [
        functools.reduce(lax.add, (_scaled(m, p) for m, p in zip(row, planes, strict=True) if m))
        for row in matrix.tolist()
    ]
    stacked = lax.concatenate([lax.expand_dims(row, (axis,)) for row in rows], axis)
    # Without the barrier, the first of two transforms fuses into the second: it would be computed
    # six times, and compile slowly.
    return lax.optimization_barrier(stacked)


def transform_filters(kernel: Array, rotated: bool = False) -> Array:
    """Transforms a kernel for `convolve`: G g Gᵀ.

    Args:
        kernel: Kernel (3, 3, C, K).
        rotated: Rotate the kernel by 180 degrees first.

    Returns:
        Filters (36, C, K).
    """
    matrix = jnp.asarray(_GG[:, ::-1] if rotated else _GG, kernel.dtype)
    return (matrix @ kernel.reshape(9, -1)).reshape(36, *kernel.shape[2:])


@functools.partial(jax.jit, inline=True)
def _input_tiles(x: Array) -> Array:
    """Cuts 6x6 windows with stride 4 and transforms them.

    (n, 4 rows + 2, 4 columns + 2, C) -> (36, tiles, C).
    """
    n, h, w, c = x.shape
    x = x.reshape(n, h, w * c)
    x = _apply_matrix(_BT, [x[:, i : i + h - 5 : 4] for i in range(6)], 0).reshape(6, -1, w, c)
    return _apply_matrix(_BT, [x[:, :, j : j + w - 5 : 4] for j in range(6)], 1).reshape(36, -1, c)


@functools.partial(jax.jit, inline=True, static_argnums=(1, 2, 3))
def _output_image(tiles: Array, n: int, rows: int, columns: int) -> Array:
    """Transforms products back to output: (36, tiles, K) -> (n, 4 rows, 4 columns, K)."""
    k = tiles.shape[-1]
    tiles = tiles.reshape(6, 6, n * rows, columns * k)
    y = _apply_matrix(_AT, list(tiles), 2).reshape(6, -1, columns, k)  # (6, n · 4 rows, columns, K)
    return _apply_matrix(_AT, list(y), 2).reshape(n, 4 * rows, 4 * columns, k)


@functools.partial(jax.jit, inline=True)
def _gradient_tiles(g: Array) -> Array:
    """Transpose of `_output_image`: (n, 4 rows, 4 columns, K) -> (36, tiles, K)."""
    n, h, w, k = g.shape
    g = g.reshape(n * h // 4, 4, w * k)
    g = _apply_matrix(_AT.T, [g[:, i] for i in range(4)], 0).reshape(6, -1, w // 4, 4, k)
    return _apply_matrix(_AT.T, [g[:, :, :, j] for j in range(4)], 1).reshape(36, -1, k)


def _block_reader(x: Array, blocks: _Blocks, halo: int) -> Callable[[Array], Array]:
    """Makes a function that reads one block of x (N, H, W, C) by its number.

    A block is (images, 4 rows + 2 halo, 4 columns + 2 halo, C), 0 outside of the images.
    """
    images, groups, rows, strips, columns = blocks
    n, h, w, c = x.shape
    acc_dtype = x.dtype if x.dtype == bool else jnp.promote_types(x.dtype, jnp.float32)
    block_height, right = 4 * rows + 2 * halo, 4 * columns + halo - w
    # The batch is only copied if the blocks do not divide it evenly.
    if images * groups > n or (strips > 1 and 4 * rows * strips > h):
        x = jnp.pad(x, ((0, images * groups - n), (0, 4 * rows * strips - h), (0, 0), (0, 0)))
    slice_height = min(block_height, x.shape[1])

    def read_block(number: Array) -> Array:
        first, top = number // strips * images, number % strips * 4 * rows
        start = jnp.clip(top - halo, 0, max(0, x.shape[1] - block_height))
        block = lax.dynamic_slice(x, (first, start, 0, 0), (images, slice_height, w, c))
        # The barriers keep the slice a plain copy, which is faster than one fused with the padding
        # (docs/performance.md#winograd).
        block = lax.optimization_barrier(block.astype(acc_dtype))
        if strips == 1:
            bottom = 4 * rows + halo - x.shape[1]
            block = jnp.pad(block, ((0, 0), (halo, bottom), (halo, right), (0, 0)))
        else:  # the first and the last strip extend past the image
            block = jnp.pad(block, ((0, 0), (halo, halo), (halo, right), (0, 0)))
            size = (images, block_height, w + halo + right, c)
            block = lax.dynamic_slice(block, (0, top - start, 0, 0), size)
        return lax.optimization_barrier(block)

    return read_block


def convolve(
    x: Array, filters: Array, epilogue: Callable[..., Any] = lambda y: y, *extra_inputs: Array
) -> Any:
    """Convolves with a 3x3 kernel, stride 1 and zero padding 1. Has reverse-mode gradients.

    Args:
        x: Input (N, H, W, C).
        filters: The kernel, as `transform_filters` returns it, (36, C, K).
        epilogue: `epilogue(block, *extra_blocks)` runs on each output block while it is in cache.
            A block (n, 4 rows, 4 columns, K) is whole tiles of some images, and may extend past
            their edge. The function may pool 2x2 windows and return several arrays.
        *extra_inputs: Arrays (N, H, W, …), cut into the same blocks for the epilogue.

    Returns:
        The epilogue's outputs, cropped: (N, H, W, K), or (N, H // 2, W // 2, K) if it pools; a
        tuple if it returns one.
    """
    n, h, w, _ = x.shape
    blocks = _blocks(x.shape, _TILES)
    images, groups, rows, strips, columns = blocks
    read_input = _block_reader(x, blocks, halo=1)
    read_extras = [_block_reader(extra, blocks, halo=0) for extra in extra_inputs]

    def convolve_block(number: Array) -> Any:
        products = jnp.einsum("tnc,tck->tnk", _input_tiles(read_input(number)), filters)
        y = _output_image(products, images, rows, columns)
        return epilogue(y, *(read(number) for read in read_extras))

    def join_blocks(y: Array) -> Array:
        stride = 4 * columns // y.shape[3]  # 2 if the epilogue pooled
        y = y.reshape(images * groups, strips * y.shape[2], *y.shape[3:])
        return y[:n, : h // stride, : w // stride]

    return jax.tree.map(join_blocks, lax.map(convolve_block, jnp.arange(groups * strips)))


def kernel_gradient(x: Array, g: Array) -> Array:
    """Gradient of a 3x3 convolution with respect to its kernel.

    Args:
        x: Input (N, H, W, C).
        g: Gradient (N, H, W, K) with respect to the output.

    Returns:
        Gradient (3, 3, C, K), at least float32.
    """
    acc_dtype = jnp.promote_types(x.dtype, jnp.float32)
    blocks = _blocks(x.shape, max(_TILES, _GRADIENT_VALUES // 16 // x.shape[-1]))
    read_input, read_gradient = _block_reader(x, blocks, halo=1), _block_reader(g, blocks, halo=0)

    def add_block(total: Array, number: Array) -> tuple[Array, None]:
        tiles, grad_tiles = _input_tiles(read_input(number)), _gradient_tiles(read_gradient(number))
        return total + jnp.einsum("tnc,tnk->tck", tiles, grad_tiles), None

    shape = x.shape[-1], g.shape[-1]
    numbers = jnp.arange(blocks.groups * blocks.strips)
    total, _ = lax.scan(add_block, jnp.zeros_like(x, acc_dtype, (36, *shape)), numbers)
    return (jnp.asarray(_GG.T, acc_dtype) @ total.reshape(36, -1)).reshape(3, 3, *shape)
