"""Settings of glibc's malloc, which decide how often memory goes back to Linux."""

import contextlib
import ctypes
import os
import platform
import sys


def use_huge_pages() -> None:
    """Restarts this program with glibc's memory in huge pages.

    Only the environment can ask for huge pages, before a program starts. A training step allocates
    and frees gigabytes, which is slower in pages of 4 kB (docs/performance.md#huge-pages). The
    restart also makes malloc keep the memory of one image for the next one. A user's own
    GLIBC_TUNABLES stay as they are, and then nothing restarts.
    """
    is_glibc = sys.platform == "linux" and platform.libc_ver()[0] == "glibc"
    if not is_glibc or "GLIBC_TUNABLES" in os.environ:
        return
    # glibc before 2.35 has no huge pages, and ignores the setting silently.
    tunables = {"hugetlb": 1, "mmap_threshold": 2**25, "trim_threshold": 2**28}
    value = ":".join(f"glibc.malloc.{name}={setting}" for name, setting in tunables.items())
    with contextlib.suppress(OSError):
        os.execve(sys.executable, sys.orig_argv, os.environ | {"GLIBC_TUNABLES": value})


def configure_malloc() -> None:
    """Makes malloc keep freed memory for the next batch instead of returning it to Linux.

    Returning it page by page is slow (docs/performance.md#malloc). The process then never shrinks,
    so this suits commands whose memory is bounded. Call it before any thread starts.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        m_trim_threshold, m_mmap_max, m_arena_max = -1, -4, -8  # from <malloc.h>
        mallopt(m_arena_max, 1)
        mallopt(m_mmap_max, 0)
        # -1 means never. The largest int is too small: 2 GB may be free at the top of the heap.
        mallopt(m_trim_threshold, -1)
