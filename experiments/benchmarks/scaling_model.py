"""Images a second of 1 to 1,024 devices in training, by which mesh: a model on paper, of multiply-adds, bytes and wires.

    python -m experiments.benchmarks.scaling_model --machine h200 --net D                    # 256 images a device
    python -m experiments.benchmarks.scaling_model --machine ethernet --net E --batch 32
    python -m experiments.benchmarks.scaling_model --machine h200 --net D --global-batch 256 # the paper's batch, divided

Takes no time and starts nothing. A step is forward, backward and the exchange of the gradients:

- compute: 6 operations for each multiply-add, at the rate that one device was measured at. A "model" axis of m repeats the convolutions
  of m devices' images on each of them, and divides fc6 and fc7.
- parameters: 12 bytes of memory for each, which is read forward and backward and whose gradient is written, and 20 for its update and that
  of its momentum. "model" divides all of fc6's and fc7's; fsdp divides the update, and takes 8 for putting a parameter together.
- data: a sum of all gradients over n devices takes 2 (n - 1) / n of their bytes on each wire; between hosts a device sends its own share of
  what the devices of a host have added up. The gradients of fc6, fc7 and fc8, 89 % of D's, are there first and travel behind the backward
  pass of the convolutions, where the machine can do both at once and there are no micro-batches.
- fsdp: the same bytes, half of them before the step: fc6's parameters are put together during the forward pass of the convolutions.
- model: between the m devices of a group fc7's output forward and the gradient of fc6's input backward, which nothing hides.
- input: what a host's images a second allow.

What processes on one machine do beside it is in results/scaling.json (`bench_processes.py`). Not measured is anything on more than one
accelerator.
"""

import argparse
import dataclasses
import json

from experiments.script import run
from vgg_jax import CONFIGS
from vgg_jax.summary import summarize

DEVICES = [2**i for i in range(11)]
PASSES = 32  # bytes of memory for each parameter and step


@dataclasses.dataclass(frozen=True)
class Machine:
    rate: float  # operations a second of one device in training, as measured, or half of its peak
    per_host: int  # devices
    near: float  # bytes a second that one device sends to others of its host
    far: float  # … to those of other hosts
    overlaps: bool  # whether it computes while it sends
    memory: float  # bytes a second of a device's memory
    images: float  # a second that one host reads and crops
    at_once: float = float("inf")  # devices that have a processor of their own; more take turns
    latency: float = 1e-5  # seconds of one message


MACHINES = {
    # 54 % of 989 teraflops (results/gpu.json has 55); NVLink 4; a 400 Gb/s adapter a GPU; 96 cores at 600 photos/s, an EPYC's with older
    # code (a Xeon's read 320 to 420: results/input.json).
    "h200": Machine(5.36e14, 8, 4.5e11, 5e10, True, 4.8e12, 57_600),
    # Half of 197 teraflops; four links of 50 GB/s between neighbours of a slice of 256, whose hosts have 112 cores for 8 chips.
    "v5e": Machine(1e14, 256, 1e11, 1e10, True, 8e11, 32 * 60_000),
    # Hosts with one such card and 10 Gb/s between them.
    "ethernet": Machine(5.36e14, 1, 1.25e9, 1.25e9, True, 4.8e12, 10_000, latency=5e-5),
}


@dataclasses.dataclass(frozen=True)
class Net:
    """Of one image the multiply-adds, of the whole the parameters; of the layers before fc6, and behind."""

    conv_macs: int
    fc_macs: int
    conv_params: int
    split_params: int  # fc6's and fc7's, which "model" divides
    fc_params: int  # and fc8's
    read: int  # values that fc6 reads
    width: int  # of fc7


def net_of(
    name: str, image_size: int = 224, classes: int = 1000, fc: tuple[int, int] = (4096, 4096)
) -> Net:
    rows = summarize(dataclasses.replace(CONFIGS[name], fc=fc), classes, image_size=image_size)
    convs, fcs = ([row for row in rows if row.name.startswith(kind)] for kind in ("conv", "fc"))
    split = sum(row.params for row in fcs[:2])
    macs = [sum(row.macs for row in some) for some in (convs, fcs)]
    return Net(
        *macs,
        sum(row.params for row in convs),
        split,
        sum(row.params for row in fcs),
        fcs[0].macs // fc[0],
        fc[1],
    )


def exchange(size: float, devices: int, machine: Machine) -> float:
    """Seconds to add up that many bytes over devices: around a ring within each host, and each device's share between hosts."""
    within = min(devices, machine.per_host)
    hosts = -(-devices // machine.per_host)
    turns = max(1.0, devices / machine.at_once)
    near = 2 * (within - 1) / within * size / machine.near
    far = 2 * (hosts - 1) / hosts * size / within / machine.far
    return turns * (near + far) + 2 * (within + hosts - 2) * machine.latency


def step(
    net: Net,
    machine: Machine,
    devices: int,
    batch: float,
    model: int = 1,
    fsdp: bool = False,
    width: int = 4,
) -> float:
    """Seconds of a step on `batch` images a device; `width` are the bytes in which a gradient travels."""
    turns = max(1.0, devices / machine.at_once)
    convs = turns * 6 * batch * model * net.conv_macs / machine.rate
    fcs = turns * 6 * batch * net.fc_macs / machine.rate
    groups, apart = (
        devices // model,
        dataclasses.replace(machine, per_host=max(1, machine.per_host // model)),
    )  # a group lies on one host
    behind = (
        {"forward": convs / 3, "backward": convs * 2 / 3}
        if machine.overlaps
        else {"forward": 0.0, "backward": 0.0}
    )
    size = net.conv_params + net.fc_params - net.split_params * (1 - 1 / model)
    passes = turns * size * (20 + 20 / groups if fsdp else PASSES) / machine.memory
    exposed = max(0.0, exchange(width * size, groups, apart) - behind["backward"])
    if fsdp:  # reduced and put together are each half of the exchange
        gathered = exchange(4 * size, groups, apart) / 2
        exposed = max(0.0, gathered - behind["forward"]) + max(
            0.0, exchange(width * size, groups, apart) / 2 - behind["backward"]
        )
    if model > 1:
        exposed += exchange(2 * batch * model * (net.width + net.read), model, machine)
    return max(
        convs + fcs + passes + exposed, batch * min(devices, machine.per_host) / machine.images
    )


def table(net: Net, machine: Machine, batch: float | None, global_batch: int | None) -> list[dict]:
    """For each number of devices the images a second of each mesh, and the share of what as many devices alone would do."""
    rows = []
    alone = None
    for devices in DEVICES:
        each = batch if global_batch is None else global_batch / devices
        if each < 1:
            break
        meshes = {"data": {}, "data, bfloat16": {"width": 2}, "fsdp": {"fsdp": True}}
        meshes |= {f"model={m}": {"model": m} for m in (2, 8) if m <= devices}
        found = {
            name: devices * each / step(net, machine, devices, each, **mesh)
            for name, mesh in meshes.items()
        }
        alone = alone or found["data"]
        rows.append(
            {
                "devices": devices,
                "images_per_second": {name: round(rate) for name, rate in found.items()},
                "efficiency": {
                    name: round(rate / devices / alone, 3) for name, rate in found.items()
                },
                "best": max(found, key=found.get),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--machine", choices=MACHINES, default="h200")
    parser.add_argument("--net", choices=CONFIGS, default="D")
    parser.add_argument("--batch", type=int, default=256, help="images a device")
    parser.add_argument("--global-batch", type=int, help="images of all devices together, instead")
    args = parser.parse_args()
    rows = table(net_of(args.net), MACHINES[args.machine], args.batch, args.global_batch)
    print(json.dumps(vars(args) | {"rows": rows}))


if __name__ == "__main__":
    run(main)
