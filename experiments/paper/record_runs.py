"""The curves of finished runs as one JSON document, for experiments/results.

    python -m experiments.paper.record_runs runs/digits-A … --command "vgg-jax train" --device "2 cores of …" > experiments/results/digits.json

Of each run: what its configuration has other than the data set's preset, and, epoch by epoch, loss, accuracy, rate and seconds.
Takes a second.
"""

import argparse
import dataclasses
import json
import platform
from pathlib import Path

import jax

from experiments.script import run
from vgg_jax import preset
from vgg_jax.runs.metadata import load_run


def recorded(workdir: str) -> dict:
    run = load_run(Path(workdir))
    usual = dataclasses.asdict(preset(run.config.data))
    given = {
        name: value
        for name, value in dataclasses.asdict(run.config).items()
        if value != usual[name] and name != "seed"
    }
    epochs = [
        json.loads(line) for line in (Path(workdir) / "metrics.jsonl").read_text().splitlines()
    ]
    return {
        "data": {
            "name": run.config.data,
            "storage": run.storage,
            "train": run.train_size,
            "validation": run.validation_size,
        },
        "seed": run.config.seed,
        "other_than_the_preset": given,
        "training_seconds": round(sum(epoch["seconds"] for epoch in epochs), 1),
        "best_validation_accuracy": round(
            max(epoch["validation"]["accuracy"] for epoch in epochs), 4
        ),
        "epochs": [
            {
                "learning_rate": epoch["learning_rate"],
                "train": [round(epoch["train"][name], 4) for name in ("loss", "accuracy")],
                "validation": [
                    round(epoch["validation"][name], 4) for name in ("loss", "accuracy")
                ],
                "seconds": round(epoch["seconds"], 1),
            }
            for epoch in epochs
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workdirs", nargs="+")
    parser.add_argument(
        "--command", required=True, action="append", help="what was run, once for each command"
    )
    parser.add_argument("--device", required=True)
    args = parser.parse_args()
    versions = {"python": platform.python_version(), "jax": jax.__version__}
    print(
        json.dumps(
            {"command": args.command, "device": args.device}
            | versions
            | {"runs": [*map(recorded, args.workdirs)]},
            indent=1,
        )
    )


if __name__ == "__main__":
    run(main)
