"""Computes for minutes in one call of XLA, after `exit_on_second_signal` and `graceful_stop`."""

import jax
import jax.numpy as jnp

from vgg_jax.runtime.signals import exit_on_second_signal, graceful_stop


def main() -> None:
    exit_on_second_signal()
    with graceful_stop():
        matrix = jnp.eye(200)

        def halve_product(i, x):
            return x @ x / 2

        loop = jax.jit(lambda x: jax.lax.fori_loop(0, 10**9, halve_product, x))
        compiled = loop.lower(matrix).compile()
        print("started", flush=True)
        compiled(matrix).block_until_ready()


if __name__ == "__main__":
    main()
