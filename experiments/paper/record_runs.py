"""Records the curves of finished runs as one JSON document.

    python -m experiments.paper.record_runs runs/digits-A … --command "vgg-jax train" \\
        --device "2 cores of …" > experiments/results/digits.json

Each run has the settings that differ from the data set's preset, and the loss, accuracy, learning
rate and seconds of each epoch. Takes a second.
"""

import argparse
import dataclasses
import json
import platform
from pathlib import Path
from typing import Any

import jax

from experiments.script import HelpFormatter, run
from vgg_jax import preset
from vgg_jax.runs.metadata import load_run


def record_run(workdir: str) -> dict[str, Any]:
    metadata = load_run(Path(workdir))
    config = metadata.config
    defaults = dataclasses.asdict(preset(config.data))
    changes = {
        name: value
        for name, value in dataclasses.asdict(config).items()
        if value != defaults[name] and name != "seed"
    }
    lines = (Path(workdir) / "metrics.jsonl").read_text().splitlines()
    epochs = [json.loads(line) for line in lines]
    best = max(epoch["validation"]["accuracy"] for epoch in epochs)
    return {
        "data": {
            "name": config.data,
            "storage": metadata.storage,
            "train": metadata.train_size,
            "validation": metadata.validation_size,
        },
        "seed": config.seed,
        "other_than_the_preset": changes,
        "training_seconds": round(sum(epoch["seconds"] for epoch in epochs), 1),
        "best_validation_accuracy": round(best, 4),
        "epochs": [record_epoch(epoch) for epoch in epochs],
    }


def record_epoch(epoch: dict[str, Any]) -> dict[str, Any]:
    return {
        "learning_rate": epoch["learning_rate"],
        "train": [round(epoch["train"][name], 4) for name in ("loss", "accuracy")],
        "validation": [round(epoch["validation"][name], 4) for name in ("loss", "accuracy")],
        "seconds": round(epoch["seconds"], 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("workdirs", nargs="+")
    parser.add_argument(
        "--command", required=True, action="append", help="a command that made the runs"
    )
    parser.add_argument("--device", required=True)
    args = parser.parse_args()
    document = {
        "command": args.command,
        "device": args.device,
        "python": platform.python_version(),
        "jax": jax.__version__,
        "runs": [record_run(workdir) for workdir in args.workdirs],
    }
    print(json.dumps(document, indent=1))


if __name__ == "__main__":
    run(main)
