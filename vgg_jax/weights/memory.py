"""Copies arrays of a file into memory that jax uses as it is."""

import mmap
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

# Threads that copy a large array. The system hands out memory page by page, which takes longer than
# to copy, and several threads can wait for pages (docs/performance.md#first-answer).
_THREADS = 4
_MIN_BYTES = 2**24  # fewer are copied sooner than threads start
# Windows has no such flags.
_MMAP_FLAGS: dict[str, Any] = (
    {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
)


def copy_for_jax(array: np.ndarray, dtype: Any) -> np.ndarray:
    """Copies an array into memory of its own, at an address that jax needs not copy on a CPU.

    Memory of `np.empty` has huge pages, which may take a second (docs/performance.md#first-answer).

    Args:
        array: The array, of any layout.
        dtype: Type of the copy.

    Returns:
        The copy, contiguous.

    Raises:
        MemoryError: There is too little memory.
    """
    num_bytes = array.size * np.dtype(dtype).itemsize
    try:
        memory = mmap.mmap(-1, max(num_bytes, 1), **_MMAP_FLAGS)
    except (OSError, OverflowError) as error:
        raise MemoryError(f"no memory for {num_bytes:,} bytes") from error
    copy = np.frombuffer(memory, dtype, array.size).reshape(array.shape)
    # A conversion stays in this thread, since its warnings depend on the thread's np.errstate.
    if num_bytes < _MIN_BYTES or array.dtype != copy.dtype:
        np.copyto(copy, array, casting="unsafe")
        return copy
    with ThreadPoolExecutor(_THREADS) as pool:
        parts = zip(np.array_split(copy, _THREADS), np.array_split(array, _THREADS), strict=True)
        for task in [pool.submit(np.copyto, *part) for part in parts]:
            task.result()
    return copy
