"""Predicts training throughput of 1 to 1,024 devices for each mesh, by a model on paper.

    python -m experiments.benchmarks.scaling_model --machine h200 --net D    # 256 images a device
    python -m experiments.benchmarks.scaling_model --machine ethernet --net E --batch 32
    python -m experiments.benchmarks.scaling_model --machine h200 --net D --global-batch 256

The last command divides the paper's batch among the devices. The script takes a second and starts
nothing. A step has a forward pass, a backward pass and the exchange of the gradients. The model
counts these costs:

- compute: a multiply-add costs 6 operations, at the rate that was measured on one device. A "model"
  axis of m repeats the convolutions for the images of m devices on each of them. It divides fc6 and
  fc7.
- parameters: each costs 12 bytes of memory traffic for the forward and backward passes and its
  gradient, and 20 for the updates of itself and of its momentum. "model" divides all of this for
  fc6 and fc7. "fsdp" divides the update, and gathering a parameter costs 8 bytes.
- data: a sum of all gradients over n devices moves 2 (n - 1) / n of their bytes over each link.
  Between hosts, a device sends its own share of its host's sum. The gradients of fc6, fc7 and fc8
  are 89 % of net D's and are ready first. The backward pass of the convolutions hides their
  exchange, if the machine sends while it computes and there are no micro-batches.
- fsdp: moves the same bytes, half of them before the step. fc6's parameters are gathered during the
  forward pass of the convolutions.
- model: the m devices of a group exchange fc7's output (forward) and the gradient of fc6's input
  (backward). Nothing hides that.
- input: a host reads a limited number of images a second.

results/scaling.json compares this with processes on one machine (`bench_processes.py`). Nothing was
measured on more than one accelerator.
"""

import argparse
import dataclasses
import json
from typing import Any

from experiments.script import HelpFormatter, run
from vgg_jax import CONFIGS
from vgg_jax.summary import summarize

DEVICES = [2**i for i in range(11)]
BYTES_PER_PARAMETER = 32  # memory traffic of a step


@dataclasses.dataclass(frozen=True)
class Machine:
    """A machine's rates. Bandwidths are bytes a second of one device."""

    operations: float  # a second of one device in training: measured, or half of its peak
    devices_per_host: int
    bandwidth_within_host: float
    bandwidth_between_hosts: float
    overlaps: bool  # sends while it computes
    memory_bandwidth: float
    images: float  # a second that one host reads and crops
    processors: float = float("inf")  # more devices than these take turns
    latency: float = 1e-5  # seconds of one message


MACHINES = {
    # 54 % of 989 teraflops (results/gpu.json has 55 %), NVLink 4, a 400 Gb/s adapter for each GPU.
    # Input: 96 cores at 600 photos/s, measured on an EPYC with older code. A Xeon's cores read
    # 320 to 420 (results/input.json).
    "h200": Machine(5.36e14, 8, 4.5e11, 5e10, True, 4.8e12, 57_600),
    # Half of 197 teraflops, and four links of 50 GB/s between neighbours of a slice of 256.
    # A host has 112 cores for 8 chips.
    "v5e": Machine(1e14, 256, 1e11, 1e10, True, 8e11, 32 * 60_000),
    # Hosts with one H200 each, and 10 Gb/s between them.
    "ethernet": Machine(5.36e14, 1, 1.25e9, 1.25e9, True, 4.8e12, 10_000, latency=5e-5),
}


@dataclasses.dataclass(frozen=True)
class Net:
    """A net's multiply-adds for one image, and its parameters."""

    conv_macs: int
    fc_macs: int
    conv_params: int
    divided_params: int  # of fc6 and fc7, which "model" divides
    fc_params: int  # of fc6, fc7 and fc8
    fc6_inputs: int
    fc7_outputs: int


def net_of(
    name: str, image_size: int = 224, classes: int = 1000, fc: tuple[int, int] = (4096, 4096)
) -> Net:
    layers = summarize(dataclasses.replace(CONFIGS[name], fc=fc), classes, image_size=image_size)
    convs = [layer for layer in layers if layer.name.startswith("conv")]
    fcs = [layer for layer in layers if layer.name.startswith("fc")]
    return Net(
        conv_macs=sum(layer.macs for layer in convs),
        fc_macs=sum(layer.macs for layer in fcs),
        conv_params=sum(layer.params for layer in convs),
        divided_params=sum(layer.params for layer in fcs[:2]),
        fc_params=sum(layer.params for layer in fcs),
        fc6_inputs=fcs[0].macs // fc[0],
        fc7_outputs=fc[1],
    )


def allreduce_seconds(size: float, devices: int, machine: Machine) -> float:
    """Seconds to add up `size` bytes over devices: rings within hosts, then rings between them."""
    local = min(devices, machine.devices_per_host)
    hosts = -(-devices // machine.devices_per_host)
    turns = max(1.0, devices / machine.processors)
    within = 2 * (local - 1) / local * size / machine.bandwidth_within_host
    between = 2 * (hosts - 1) / hosts * size / local / machine.bandwidth_between_hosts
    return turns * (within + between) + 2 * (local + hosts - 2) * machine.latency


def step_seconds(
    net: Net,
    machine: Machine,
    devices: int,
    batch: float,
    model: int = 1,
    fsdp: bool = False,
    gradient_bytes: int = 4,
) -> float:
    """Predicts the seconds of one training step.

    Args:
        net: The net.
        machine: The machine.
        devices: Number of devices.
        batch: Images of one device.
        model: Size of the "model" axis.
        fsdp: Parameters and momentum are sharded over the "data" axis.
        gradient_bytes: Bytes of each gradient value in the exchange.
    """
    turns = max(1.0, devices / machine.processors)
    convs = turns * 6 * batch * model * net.conv_macs / machine.operations
    fcs = turns * 6 * batch * net.fc_macs / machine.operations
    # Each group of `model` devices lies on one host and exchanges gradients as one device.
    groups = devices // model
    per_host = max(1, machine.devices_per_host // model)
    machine_of_groups = dataclasses.replace(machine, devices_per_host=per_host)
    hidden_forward = convs / 3 if machine.overlaps else 0.0
    hidden_backward = convs * 2 / 3 if machine.overlaps else 0.0

    params = net.conv_params + net.fc_params - net.divided_params * (1 - 1 / model)
    bytes_per_param = 20 + 20 / groups if fsdp else BYTES_PER_PARAMETER
    memory = turns * params * bytes_per_param / machine.memory_bandwidth

    reduce = allreduce_seconds(gradient_bytes * params, groups, machine_of_groups)
    if fsdp:
        # Reduce-scatter and all-gather are each half of an all-reduce.
        gather = allreduce_seconds(4 * params, groups, machine_of_groups) / 2
        exchange = max(0.0, gather - hidden_forward) + max(0.0, reduce / 2 - hidden_backward)
    else:
        exchange = max(0.0, reduce - hidden_backward)
    if model > 1:
        activations = 2 * batch * model * (net.fc7_outputs + net.fc6_inputs)
        exchange += allreduce_seconds(activations, model, machine)
    input_seconds = batch * min(devices, machine.devices_per_host) / machine.images
    return max(convs + fcs + memory + exchange, input_seconds)


def table(
    net: Net, machine: Machine, batch: float, global_batch: int | None
) -> list[dict[str, Any]]:
    """Returns a row for each number of devices: images a second of each mesh, and efficiency.

    Efficiency is relative to as many devices that each train alone.
    """
    rows: list[dict[str, Any]] = []
    single = None
    for devices in DEVICES:
        device_batch = batch if global_batch is None else global_batch / devices
        if device_batch < 1:
            break
        meshes: dict[str, dict[str, Any]] = {
            "data": {},
            "data, bfloat16": {"gradient_bytes": 2},
            "fsdp": {"fsdp": True},
        }
        meshes |= {f"model={m}": {"model": m} for m in (2, 8) if m <= devices}
        rates = {
            name: devices * device_batch / step_seconds(net, machine, devices, device_batch, **mesh)
            for name, mesh in meshes.items()
        }
        single = single or rates["data"]
        rows.append(
            {
                "devices": devices,
                "images_per_second": {name: round(rate) for name, rate in rates.items()},
                "efficiency": {
                    name: round(rate / devices / single, 3) for name, rate in rates.items()
                },
                "best": max(rates, key=lambda name: rates[name]),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--machine", choices=MACHINES, default="h200")
    parser.add_argument("--net", choices=CONFIGS, default="D")
    parser.add_argument("--batch", type=int, default=256, help="images a device")
    parser.add_argument("--global-batch", type=int, help="images of all devices, instead")
    args = parser.parse_args()
    rows = table(net_of(args.net), MACHINES[args.machine], args.batch, args.global_batch)
    print(json.dumps(vars(args) | {"rows": rows}))


if __name__ == "__main__":
    run(main)
