"""The training process of `tools/soak.py`: train_tiny, which may log the memory that it uses.

VGG_JAX_SOAK_LOG=FILE python -m tests.programs.soak_train DATA --net shallow …
"""

import ctypes
import os
import sys
import threading
import time
from pathlib import Path

from tests.programs import train_tiny

RESOURCE_LOG = "VGG_JAX_SOAK_LOG"  # the variable that names the log file


class MallInfo(ctypes.Structure):
    """The result of glibc's mallinfo2, for all arenas."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        )
    ]


def log_resources(path: Path) -> None:
    """Writes a line five times a second: resident MB, MB allocated by malloc, open files."""
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = MallInfo

    def write() -> None:
        with path.open("w") as file:
            while True:
                pages = int(Path("/proc/self/statm").read_text().split()[1])
                info = libc.mallinfo2()
                print(
                    pages * os.sysconf("SC_PAGE_SIZE") / 1e6,
                    (info.uordblks + info.hblkhd) / 1e6,
                    len(os.listdir("/proc/self/fd")),
                    file=file,
                    flush=True,
                )
                time.sleep(0.2)

    threading.Thread(target=write, daemon=True).start()


def main() -> int:
    if RESOURCE_LOG in os.environ:
        log_resources(Path(os.environ[RESOURCE_LOG]))
    return train_tiny.main()


if __name__ == "__main__":
    sys.exit(main())
