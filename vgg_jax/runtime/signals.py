"""SIGINT and SIGTERM: the first one lets a command clean up, the second one ends it at once."""

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator


class Terminated(KeyboardInterrupt):
    """SIGTERM, where `interrupt_on_sigterm` turns it into an exception."""


@contextlib.contextmanager
def interrupt_on_sigterm() -> Iterator[None]:
    """Raises `Terminated` in the block at SIGTERM, as SIGINT raises KeyboardInterrupt.

    Does nothing outside the main thread, which alone handles signals.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: object) -> None:
        raise Terminated

    previous = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextlib.contextmanager
def graceful_stop() -> Iterator[threading.Event]:
    """Provides an event that the first SIGINT or SIGTERM sets.

    After the first signal, the previous handlers are restored. Python handles signals in the main
    thread only, so in another thread the event is never set.

    Yields:
        The event.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def handle(number: int, frame: object) -> None:
        stop.set()
        restore()
        # Not by logging: the signal may have interrupted the code that holds a handler's lock.
        print(
            "stopping after this step; send the signal again to stop at once",
            file=sys.stderr,
            flush=True,
        )

    for number in previous:
        signal.signal(number, handle)
    try:
        yield stop
    finally:
        restore()


def exit_on_second_signal() -> None:
    """Ends this process at the second SIGINT or SIGTERM, whatever it is doing.

    This covers the time inside calls into XLA, which may take minutes. Python's own handlers run
    only after such a call returns, and Python merges two signals during one call. So a thread reads
    the signals from a socket.
    """
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)

    # The thread keeps `writer` alive: a socket without a reference is closed.
    def watch(writer: socket.socket) -> None:
        count = 0
        while True:
            for number in reader.recv(16):
                count += number in (signal.SIGINT, signal.SIGTERM)
                if count == 2:
                    os._exit(128 + number)

    threading.Thread(target=watch, args=(writer,), daemon=True).start()
