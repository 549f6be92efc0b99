"""Images a second by 1, 2, 4 and 8 processes on this machine, each with a device on one core, beside what scaling_model.py says.

    python -m experiments.benchmarks.bench_processes

Net A on images of 32 pixels, 16 a process, fc6 and fc7 4,096 wide, float32, exchanged by gloo over loopback; five minutes on two cores,
most of them for compiling. Prints one JSON line. The model is told three measurements: the step of one process, that of one with twice the
images, which tells the update from the rest, and what a sum over two takes. The rest it foretells. More processes than cores take turns.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time

COUNTS = (1, 2, 4, 8)
BATCH, SIZE, WIDTH, STEPS = 16, 32, 4096, 7
MESHES = {"data": {}, "fsdp": {"fsdp": True}, "model": {"model": 2}}
CORES = (
    sorted(os.sched_getaffinity(0))
    if hasattr(os, "sched_getaffinity")
    else list(range(os.cpu_count() or 1))
)


def measured(number: int, count: int, port: int, each: int, mesh_name: str) -> None:
    """One of the processes: prints the median seconds of a step, and of a sum over all processes of as many bytes as the parameters."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {CORES[number % len(CORES)]})
    import jax
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec

    jax.config.update("jax_num_cpu_devices", 1)
    if count > 1:
        jax.distributed.initialize(f"127.0.0.1:{port}", count, number)
    from vgg_jax import IMAGENET, TrainConfig
    from vgg_jax.distributed.sharding import MeshConfig, make_mesh, replicated, shard_batch
    from vgg_jax.model import build_model
    from vgg_jax.training.optimizer import sgd
    from vgg_jax.training.step import init_state, jit_steps

    layout, total = MeshConfig(**MESHES[mesh_name]), each * count
    config = TrainConfig(
        net="A",
        fc=(WIDTH, WIDTH),
        image_size=SIZE,
        scale=(SIZE,),
        batch_size=total,
        learning_rate=1e-3,
    )
    mesh, model, groups = (
        make_mesh(total, layout=layout),
        build_model(config, 10),
        count // layout.model,
    )
    step, _ = jit_steps(config, model, IMAGENET.mean_rgb, mesh, layout)
    state = init_state(model, sgd(config), 0, mesh, layout)
    rng = np.random.default_rng(0)
    rows = total // groups
    batch = {
        "image": rng.integers(0, 256, (rows, SIZE, SIZE, 3), np.uint8),
        "colour_shift": np.zeros((rows, 3), np.float32),
        "label": rng.integers(0, 10, rows).astype(np.int32),
        "mask": np.ones(rows, bool),
    }
    placed = shard_batch(batch, mesh)
    steps, sums = [], []
    for _ in range(STEPS):
        started = time.monotonic()
        state, found = step(state, placed)
        jax.block_until_ready((state, found))
        steps.append(time.monotonic() - started)
    size = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    spread = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    mine = jax.make_array_from_callback(
        (count, size), spread, lambda _: np.ones((1, size), np.float32)
    )
    add = jax.jit(lambda x: x.sum(0), out_shardings=replicated(mesh))
    for _ in range(STEPS):
        started = time.monotonic()
        jax.block_until_ready(add(mine))
        sums.append(time.monotonic() - started)
    if number == 0:
        print(
            json.dumps(
                {
                    "step": statistics.median(steps[1:]),
                    "sum": statistics.median(sums[1:]),
                    "bytes": 4 * size,
                }
            ),
            flush=True,
        )
    if count > 1:
        jax.distributed.shutdown()


def run(count: int, mesh: str, each: int = BATCH) -> dict:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    commands = [
        [
            sys.executable,
            "-m",
            "experiments.benchmarks.bench_processes",
            "--worker",
            str(number),
            str(count),
            str(port),
            str(each),
            mesh,
        ]
        for number in range(count)
    ]
    group = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        for command in commands
    ]
    outputs = [process.communicate()[0] for process in group]
    if any(process.returncode for process in group):
        raise SystemExit(
            f"{count} processes, {mesh}: exit codes {[process.returncode for process in group]}"
        )
    return json.loads(outputs[0].splitlines()[-1])


def main() -> None:
    from scaling_model import PASSES, Machine, net_of, step

    found = {
        (mesh, count): run(count, mesh)
        for mesh in MESHES
        for count in COUNTS
        if mesh == "data" or count in (2, 4)
    }
    alone, twice, pair = found["data", 1], run(1, "data", 2 * BATCH), found["data", 2]
    told = {
        "step": alone["step"],
        "step_of_twice_the_images": twice["step"],
        "sum_of_two": pair["sum"],
    }
    net = net_of("A", SIZE, 10, (WIDTH, WIDTH))
    images = twice["step"] - alone["step"]  # of half of them; what is left of a step is the update
    rate = 6 * BATCH * (net.conv_macs + net.fc_macs) / images
    memory = PASSES * alone["bytes"] / 4 / (alone["step"] - images)
    near = pair["bytes"] / pair["sum"]  # a ring of two moves each byte once each way
    machine = Machine(
        rate, max(COUNTS), near, near, False, memory, float("inf"), len(CORES), latency=0
    )
    rows = []
    for (mesh, count), seconds in found.items():
        foretold = step(net, machine, count, BATCH, **MESHES[mesh])
        rates = [BATCH * count / each for each in (seconds["step"], foretold)]
        relative = [round(each * alone["step"] / BATCH, 3) for each in rates]
        rows.append(
            {
                "mesh": mesh,
                "processes": count,
                "images_per_second": round(rates[0], 2),
                "relative": relative[0],
                "foretold": relative[1],
                "sum_seconds": round(seconds["sum"], 4),
            }
        )
    print(
        json.dumps(
            {
                "net": "A",
                "image_size": SIZE,
                "batch": BATCH,
                "cores": len(CORES),
                "parameters": alone["bytes"] // 4,
                "told": told,
                "rows": rows,
            }
        )
    )


if __name__ == "__main__":
    if "--worker" in sys.argv:
        measured(*map(int, sys.argv[2:6]), sys.argv[6])
    else:
        argparse.ArgumentParser(
            description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        ).parse_args()
        main()
