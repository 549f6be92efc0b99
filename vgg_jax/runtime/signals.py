"""SIGINT and SIGTERM: the first lets a run save what it has, the second ends it at once."""

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def graceful_stop() -> Iterator[threading.Event]:
    """An event that the first SIGINT or SIGTERM sets; the second one acts as it always does."""
    stop = threading.Event()
    if (
        threading.current_thread() is not threading.main_thread()
    ):  # only the main thread may handle signals
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def handle(number: int, frame: object) -> None:
        stop.set()
        restore()
        print("stopping after this step; once more to stop at once", file=sys.stderr, flush=True)

    for number in before:
        signal.signal(number, handle)
    try:
        yield stop
    finally:
        restore()


def exit_on_second_signal() -> None:
    """Ends this process at once by a second SIGINT or SIGTERM, whatever it is in.

    Python's own handlers wait for a call of XLA's to return, which may take minutes, and of two signals meanwhile hear one.
    """
    read, write = socket.socketpair()
    write.setblocking(False)
    signal.set_wakeup_fd(write.fileno(), warn_on_full_buffer=False)

    def watch(_: socket.socket) -> None:  # which is closed when nobody has it
        heard = 0
        while True:
            for number in read.recv(16):
                heard += number in (signal.SIGINT, signal.SIGTERM)
                if heard == 2:
                    os._exit(128 + number)

    threading.Thread(target=watch, args=(write,), daemon=True).start()
