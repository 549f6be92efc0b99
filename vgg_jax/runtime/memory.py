"""The memory of this machine, and settings of glibc's malloc.

The settings decide how often memory goes back to Linux.
"""

import contextlib
import ctypes
import errno
import os
import platform
import re
import sys
from pathlib import Path


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


def free_memory() -> float:
    """Bytes of memory that a process can still get; infinite if unknown."""
    limits = [float("inf")]
    # Linux: what it can give without swapping.
    with contextlib.suppress(OSError, StopIteration, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        line = next(line for line in lines if line.startswith("MemAvailable:"))
        limits.append(int(line.split()[1]) * 1024.0)
    return min(limits + [_free_in_cgroup(folder) for folder in _cgroups()])


def _cgroups() -> list[Path]:
    """The folders of this process's cgroup and of those above it, of which each has a limit."""
    root = Path("/sys/fs/cgroup")
    name = ""
    with contextlib.suppress(OSError):
        # Version 2 has the line "0::/name". In a container the name is that of the host.
        match = re.search("^0::/(.*)$", Path("/proc/self/cgroup").read_text(), re.MULTILINE)
        name = match[1] if match else ""
    folder = root / name
    return [folder, *(parent for parent in folder.parents if parent.is_relative_to(root))]


def _free_in_cgroup(folder: Path) -> float:
    """Bytes below the limit of a container. Its file cache counts, since it can be dropped."""
    try:
        # The file may be missing, or say "max".
        limit = int((folder / "memory.max").read_text())
        used = int((folder / "memory.current").read_text())
        cache = re.search(
            r"^inactive_file (\d+)$", (folder / "memory.stat").read_text(), re.MULTILINE
        )
    except (OSError, ValueError):
        return float("inf")
    return float(limit - used + (int(cache[1]) if cache else 0))


def is_out_of_memory(error: BaseException) -> bool:
    """Tells if an error of Python, XLA or TensorFlow says that memory ran out."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    text = r"out of memory|OOM when allocating|bad_alloc|failed to allocate"
    return isinstance(error, MemoryError) or bool(re.search(text, str(error), re.IGNORECASE))
