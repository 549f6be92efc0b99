"""Prints the collectives of a training step on four devices, and the sizes of its parameters.

python -m tests.programs.count_collectives
"""

import json

import jax

if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 4)

    from tests.distributed.test_scaling import collectives, parameter_sizes
    from vgg_jax.distributed.sharding import MeshConfig

    print(json.dumps([collectives(MeshConfig(data=2, model=2)), parameter_sizes()]))
