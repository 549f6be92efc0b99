"""The work and the expected time of the stages in `imagenet_recipe.py`.

The rates of one H200 are those in results/gpu.json: steps of nets D and E on images in memory.
Other nets get D's operations a second. `scaling_model.py` predicts the ratio of eight GPUs to one,
and the rate of the pod, for the global batch and the best of its meshes. No pod was measured.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.benchmarks import scaling_model
from experiments.paper.imagenet_recipe import STAGES, Part, Row, Stage, train_config
from vgg_jax.configs.models import CONFIGS
from vgg_jax.summary import summarize

GPU_RESULTS = Path(__file__).parents[1] / "results" / "gpu.json"
# 370,000 iterations of 256 images are 74 epochs (§3.1).
IMAGES_PER_EPOCH = 370_000 * 256 // 74
VALIDATION_IMAGES = 50_000  # §4
MACHINES = {"1 H200": ("h200", 1), "8 H200": ("h200", 8), "256 TPU v5e": ("v5e", 256)}
NOTE = f"""\
Epochs are of {IMAGES_PER_EPOCH:,} images, and as many as there can be: plateaus may end a stage
earlier. Hours are those of training steps in bfloat16 with all layers, without validation.
1 H200: as measured for D and E (results/gpu.json), with images in memory. Other nets: with D's
operations a second. 8 H200 and the TPU: not measured. scaling_model.py predicts them. It assumes
that a host of 8 H200 reads at most {scaling_model.MACHINES["h200"].images:,} images a second."""


def training_operations(net: str, images: int) -> int:
    """Counts the operations to train on crops: 3 passes, and 2 operations a multiply-add (§3.1)."""
    return 6 * images * sum(layer.macs for layer in summarize(CONFIGS[net]))


def evaluation_operations(net: str, part: Part, images: int) -> int:
    """Counts the operations of a part on square images (§3.2)."""
    layers = summarize(CONFIGS[net])
    fc_macs = sum(layer.macs for layer in layers if layer.name.startswith("fc"))
    if part.protocol == "multi-crop":
        return 2 * images * 50 * sum(layer.macs for layer in layers)
    positions = (part.test_scale // 32 - 6) ** 2
    maps = summarize(CONFIGS[net], image_size=part.test_scale, top=False)
    return 2 * images * 2 * (sum(layer.macs for layer in maps) + positions * fc_macs)


def measured_rate(net: str) -> float:
    """Images a second that one H200 trains on in bfloat16, measured for D and E."""
    rows = json.loads(GPU_RESULTS.read_text())["steps"]
    rates = {
        row["net"]: row["images_per_second"]
        for row in rows
        if (row["mode"], row["dtype"]) == ("train", "bfloat16")
    }
    ratio = training_operations("D", 1) / training_operations(net, 1)
    return rates[net] if net in rates else rates["D"] * ratio


def predicted_rate(net: str, machine: str, devices: int, batch: int) -> tuple[float, str]:
    """Images a second of the best mesh, and that mesh, by the model on paper."""
    rows = scaling_model.table(
        scaling_model.net_of(net), scaling_model.MACHINES[machine], 0, global_batch=batch
    )
    # No more devices than images can be used.
    row = [row for row in rows if row["devices"] <= devices][-1]
    return row["images_per_second"][row["best"]], row["best"]


def expected_rate(net: str, machine: str, devices: int, batch: int) -> float:
    """Images a second: the model's, scaled to the measured rate of one H200."""
    rate, _ = predicted_rate(net, machine, devices, batch)
    if machine != "h200":
        return rate
    if devices == 1:
        return measured_rate(net)
    one, _ = predicted_rate(net, machine, 1, batch)
    input_rate = scaling_model.MACHINES[machine].images  # of one host
    return min(rate * measured_rate(net) / one, input_rate)


def plan(stages: Sequence[Stage], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Lists the work and the expected hours of each stage, for crops of 224 pixels."""
    lines = []
    for stage in stages:
        config = train_config(stage, args)
        images = config.epochs * IMAGES_PER_EPOCH
        hours = {
            name: images / 3600 / expected_rate(stage.net, *machine, config.batch_size)
            for name, machine in MACHINES.items()
        }
        lines.append(
            {
                "stage": stage.name,
                "from": stage.init_from or "random",
                "rate": config.learning_rate,
                "epochs": config.epochs,
                "images": images,
                "operations": training_operations(stage.net, images),
                "hours": hours,
            }
        )
    return lines


def format_plan(stages: Sequence[Stage], rows: Sequence[Row], args: argparse.Namespace) -> str:
    """Formats the plan as a table in Markdown, with what the times assume."""
    lines = plan(stages, args)
    total = {name: sum(line[name] for line in lines) for name in ("images", "operations")}
    total["hours"] = {name: sum(line["hours"][name] for line in lines) for name in MACHINES}
    names = ("stage", "from", "rate", "epochs")
    heading = [*names, "million images", "10¹⁸ operations", *(f"{name}, h" for name in MACHINES)]
    table = [heading, ["---"] * len(heading)]
    for line in [*lines, {"stage": "all", "from": "", "rate": "", "epochs": ""} | total]:
        numbers = (line["images"] / 1e6, line["operations"] / 1e18, *line["hours"].values())
        table.append([*(f"{line[name]}" for name in names), *(f"{x:.1f}" for x in numbers)])
    parts = {part for row in rows for part in row.parts}
    operations = sum(
        evaluation_operations(STAGES[part.stage].net, part, VALIDATION_IMAGES) for part in parts
    )
    return "\n".join(
        [
            *(f"| {' | '.join(cells)} |" for cells in table),
            "",
            f"{len(parts)} evaluations of {VALIDATION_IMAGES:,} images: "
            f"{operations / 1e18:.2f} · 10¹⁸ operations, as for square images.",
            f"Meshes: {format_meshes(stages, args.batch_size)}.",
            NOTE,
        ]
    )


def format_meshes(stages: Sequence[Stage], batch: int) -> str:
    """Lists the meshes that the times assume."""
    meshes = {
        name: sorted({predicted_rate(stage.net, *machine, batch)[1] for stage in stages})
        for name, machine in MACHINES.items()
    }
    return "; ".join(f"{name}: {' or '.join(values)}" for name, values in meshes.items())
