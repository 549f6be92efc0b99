"""Makes progress under a watchdog of half a second, prints "running", and then hangs.

python -m tests.programs.hang
"""

import time

import jax

from vgg_jax.distributed.multihost import Watchdog

if __name__ == "__main__":
    jax.process_count = lambda: 2  # a single process has no watchdog
    with Watchdog(0.5) as watchdog:
        for _ in range(8):
            time.sleep(0.1)
            watchdog.heartbeat()
        print("running", flush=True)
        time.sleep(60)
