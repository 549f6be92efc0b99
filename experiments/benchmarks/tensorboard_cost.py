"""Measures how much longer training takes with --tensorboard.

    python -m experiments.benchmarks.tensorboard_cost --pairs 5 -- digits --epochs 6
    python -m experiments.benchmarks.tensorboard_cost --pairs 3 -- PHOTOS --net A --epochs 3 \\
        --fc 256 256 --batch-size 32 --skip-bad

The flags after -- are those of `vgg-jax train`. Each pair is a run without and a run with
--tensorboard, in turn first. The seconds of a run are those of its epochs but the first, which
compiles, with validation; and those of the whole program. Prints one JSON document. Six epochs of
the digits take half a minute a run on two cores. Needs the extra `report`.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from experiments.script import run, stdout_of


def train(flags: list[str]) -> dict[str, float]:
    """Trains in a new folder, and returns its seconds."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "vgg_jax", "train", *flags, "--workdir", f"{folder}/run"]
        started = time.perf_counter()
        print(stdout_of(command), file=sys.stderr)
        seconds = time.perf_counter() - started
        lines = Path(folder, "run", "metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines][1:]
        epochs = sum(record["seconds"] + record["validation_seconds"] for record in records)
    return {"epochs": round(epochs, 3), "program": round(seconds, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("flags", nargs="+", help="flags of `vgg-jax train`")
    args = parser.parse_args()
    pairs = []
    for number in range(args.pairs):
        kinds = ("without", "with") if number % 2 == 0 else ("with", "without")
        pairs.append(
            {
                kind: train([*args.flags, *(["--tensorboard"] if kind == "with" else [])])
                for kind in kinds
            }
        )
    ratios = {
        name: round(
            statistics.median(pair["with"][name] / pair["without"][name] for pair in pairs), 4
        )
        for name in ("epochs", "program")
    }
    print(json.dumps({"command": " ".join(sys.argv), "ratios": ratios, "pairs": pairs}, indent=1))


if __name__ == "__main__":
    run(main)
