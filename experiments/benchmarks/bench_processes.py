"""Measures throughput of 1, 2, 4 and 8 processes on this machine, next to `scaling_model.py`.

    python -m experiments.benchmarks.bench_processes

Five minutes on two cores, most of it compilation. Prints one JSON line (results/scaling.json).

Each process has one device on one core; more processes than cores take turns. They train net A, 32
pixels, 16 images a process, 4,096 features of fc6 and of fc7, float32. They exchange gradients by
gloo over loopback.

The model has three measurements as inputs (key "told"): a step of one process, a step of one
process with twice the images, and a sum over two processes. The second one separates the update
from the rest of a step. The model predicts all other figures (key "foretold").
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from experiments.script import HelpFormatter, run

PROCESSES = (1, 2, 4, 8)
BATCH, IMAGE_SIZE, FEATURES, STEPS = 16, 32, 4096, 7
MESHES: dict[str, dict[str, Any]] = {"data": {}, "fsdp": {"fsdp": True}, "model": {"model": 2}}
CORES = (
    sorted(os.sched_getaffinity(0))
    if hasattr(os, "sched_getaffinity")
    else list(range(os.cpu_count() or 1))
)


def median_seconds(function: Callable[[], object]) -> float:
    """The median of all calls but the first, which compiles."""
    seconds = []
    for _ in range(STEPS):
        start = time.monotonic()
        function()
        seconds.append(time.monotonic() - start)
    return statistics.median(seconds[1:])


def work(process_id: int, num_processes: int, port: int, batch: int, mesh_name: str) -> None:
    """Runs in each process. The first prints the seconds of a step and of a sum over all processes.

    Args:
        process_id: Number of this process, from 0.
        num_processes: Number of all processes.
        port: The coordinator's port on this machine.
        batch: Images of each process.
        mesh_name: A key of `MESHES`.
    """
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {CORES[process_id % len(CORES)]})
    # Imported only now, because libraries count the cores when they are imported.
    import jax
    import numpy as np
    from jax.sharding import NamedSharding, PartitionSpec

    jax.config.update("jax_num_cpu_devices", 1)
    if num_processes > 1:
        jax.distributed.initialize(f"127.0.0.1:{port}", num_processes, process_id)
    from vgg_jax import IMAGENET, TrainConfig
    from vgg_jax.distributed.sharding import MeshConfig, make_mesh, replicated, shard_batch
    from vgg_jax.model import build_model
    from vgg_jax.training.optimizer import make_optimizer
    from vgg_jax.training.step import init_state, jit_steps

    mesh_config = MeshConfig(**MESHES[mesh_name])
    global_batch = batch * num_processes
    config = TrainConfig(
        net="A",
        fc=(FEATURES, FEATURES),
        image_size=IMAGE_SIZE,
        scale=(IMAGE_SIZE,),
        batch_size=global_batch,
        learning_rate=1e-3,
    )
    mesh = make_mesh(global_batch, mesh_config=mesh_config)
    model = build_model(config, 10)
    train_step, _ = jit_steps(config, model, IMAGENET.mean_rgb, mesh, mesh_config)
    state = init_state(model, make_optimizer(config), 0, mesh, mesh_config)
    rng = np.random.default_rng(0)
    rows = global_batch // (num_processes // mesh_config.model)
    host_batch = {
        "image": rng.integers(0, 256, (rows, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8),
        "colour_shift": np.zeros((rows, 3), np.float32),
        "label": rng.integers(0, 10, rows).astype(np.int32),
        "mask": np.ones(rows, bool),
    }
    device_batch = shard_batch(host_batch, mesh)

    def run_step() -> None:
        nonlocal state
        state, _ = jax.block_until_ready(train_step(state, device_batch))

    step = median_seconds(run_step)
    size = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    values = jax.make_array_from_callback(
        (num_processes, size), sharding, lambda _: np.ones((1, size), np.float32)
    )
    add = jax.jit(lambda x: x.sum(0), out_shardings=replicated(mesh))
    total = median_seconds(lambda: jax.block_until_ready(add(values)))
    if process_id == 0:
        print(json.dumps({"step": step, "sum": total, "bytes": 4 * size}), flush=True)
    if num_processes > 1:
        jax.distributed.shutdown()


def measure(num_processes: int, mesh_name: str, batch: int = BATCH) -> dict[str, Any]:
    """Starts the processes, and returns the first one's result."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = [sys.executable, "-m", "experiments.benchmarks.bench_processes", "--worker"]
    workers = [
        subprocess.Popen(
            [*script, str(process_id), str(num_processes), str(port), str(batch), mesh_name],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for process_id in range(num_processes)
    ]
    outputs = [worker.communicate()[0] for worker in workers]
    exit_codes = [worker.returncode for worker in workers]
    if any(exit_codes):
        raise SystemExit(f"{num_processes} processes, {mesh_name}: exit codes {exit_codes}")
    return json.loads(outputs[0].splitlines()[-1])


def compare() -> dict[str, Any]:
    """Measures every mesh, and predicts each from three of the measurements."""
    from experiments.benchmarks.scaling_model import (
        BYTES_PER_PARAMETER,
        Machine,
        net_of,
        step_seconds,
    )

    results = {
        (mesh_name, count): measure(count, mesh_name)
        for mesh_name in MESHES
        for count in PROCESSES
        if mesh_name == "data" or count in (2, 4)
    }
    one, two = results["data", 1], results["data", 2]
    doubled = measure(1, "data", 2 * BATCH)
    net = net_of("A", IMAGE_SIZE, 10, (FEATURES, FEATURES))
    # Time of one batch's images; the update takes the rest of a step.
    images = doubled["step"] - one["step"]
    bandwidth = two["bytes"] / two["sum"]  # a ring of two moves each byte once each way
    machine = Machine(
        operations=6 * BATCH * (net.conv_macs + net.fc_macs) / images,
        devices_per_host=max(PROCESSES),
        bandwidth_within_host=bandwidth,
        bandwidth_between_hosts=bandwidth,
        overlaps=False,
        memory_bandwidth=BYTES_PER_PARAMETER * one["bytes"] / 4 / (one["step"] - images),
        images=float("inf"),
        processors=len(CORES),
        latency=0,
    )
    rows = []
    for (mesh_name, count), result in results.items():
        predicted = step_seconds(net, machine, count, BATCH, **MESHES[mesh_name])
        # A process trains BATCH images in one step.
        rows.append(
            {
                "mesh": mesh_name,
                "processes": count,
                "images_per_second": round(BATCH * count / result["step"], 2),
                "relative": round(count * one["step"] / result["step"], 3),
                "foretold": round(count * one["step"] / predicted, 3),
                "sum_seconds": round(result["sum"], 4),
            }
        )
    return {
        "net": "A",
        "image_size": IMAGE_SIZE,
        "batch": BATCH,
        "cores": len(CORES),
        "parameters": one["bytes"] // 4,
        "told": {
            "step": one["step"],
            "step_of_twice_the_images": doubled["step"],
            "sum_of_two": two["sum"],
        },
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--worker", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        process_id, num_processes, port, batch, mesh_name = args.worker
        work(int(process_id), int(num_processes), int(port), int(batch), mesh_name)
    else:
        print(json.dumps(compare()))


if __name__ == "__main__":
    run(main)
