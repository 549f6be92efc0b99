"""The first signal asks to stop, the second one ends the process."""

import os
import signal
import subprocess
import sys
import time

import pytest

from vgg_jax.runtime.signals import graceful_stop


def test_graceful_stop_second_signal_interrupts():
    with graceful_stop() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.wait(10)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(10)


@pytest.mark.integration
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_second_signal_ends_call_of_xla(number):
    command = [sys.executable, "-m", "tests.programs.compute_until_signal"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "started\n"
        for _ in range(2):
            time.sleep(0.3)
            process.send_signal(number)
        try:
            # -number, if Python handled the first signal before the second came.
            assert process.wait(10) in (128 + number, -number)
        finally:
            process.kill()
