"""Compares dense evaluation, crops and both, at one scale and at three, as Table 5 does.

    vgg-jax train cifar10 --data-dir DIR --net A --batch-norm --scale 32 64 --schedule step \\
        --drop-epochs 4 5 --epochs 6 --workdir runs/cifar10-A-jitter
    python -m experiments.paper.evaluation_techniques runs/cifar10-A-jitter --data-dir DIR \\
        --device "2 cores of …" > experiments/results/evaluation_techniques.json

The data is CIFAR-10. The crop has 32 pixels, and the shorter side S of the training images lies in
[32; 64]; the paper has 224 and [256; 512]. The test scales are S_min, the middle and S_max. Each
technique evaluates the whole split once at each scale. A combination averages the posteriors, and
its cost is the sum. Prints one JSON document with the paper's errors. Training takes 25 minutes on
two cores, and this script takes 11.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np

import vgg_jax
from experiments.script import HelpFormatter, run
from vgg_jax.evaluation.evaluate import Evaluation, load_evaluation
from vgg_jax.runtime.compilation_cache import enable_compilation_cache

# Protocols whose posteriors a technique averages.
TECHNIQUES = {
    "center": ("center",),
    "dense": ("dense",),
    "multi-crop": ("multi-crop",),
    "both": ("dense", "multi-crop"),
}

# Validation errors in %, top-1 and top-5. Table 5 has S in [256; 512] and Q = 256, 384, 512.
# Table 3 has dense evaluation at Q = 384.
PAPER = {
    "D": {
        "dense": [24.8, 7.5],
        "multi-crop": [24.6, 7.5],
        "both": [24.4, 7.2],
        "dense, one scale": [25.6, 8.1],
    },
    "E": {
        "dense": [24.8, 7.5],
        "multi-crop": [24.6, 7.4],
        "both": [24.4, 7.1],
        "dense, one scale": [25.5, 8.0],
    },
}


def evaluate_all(
    args: argparse.Namespace,
) -> dict[tuple[str, int], tuple[Evaluation, dict[str, Any]]]:
    """Evaluates every protocol at every scale, and reports progress on stderr."""
    outcomes, net = {}, vgg_jax.load(args.run)
    for name in ("center", "dense", "multi-crop"):
        for scale in args.scales:
            with tempfile.TemporaryDirectory() as out:
                results = vgg_jax.evaluate(
                    *net,
                    split=args.split,
                    protocol=name,
                    scales=(scale,),
                    data_dir=args.data_dir,
                    out=out,
                )
                evaluation = load_evaluation(Path(out) / "posteriors.npz")
            outcomes[name, scale] = evaluation, results
            print(
                name, scale, results["top1_error"], results["seconds"], file=sys.stderr, flush=True
            )
    return outcomes


def combine(
    technique: str, scales: tuple[int, ...], parts: Iterable[tuple[Evaluation, dict[str, Any]]]
) -> dict[str, Any]:
    """Averages the posteriors of evaluations, and returns a row of the table."""
    evaluations, results = zip(*parts, strict=True)
    mean = np.mean([evaluation.posteriors for evaluation in evaluations], 0)
    errors = dataclasses.replace(evaluations[0], posteriors=mean).errors()
    seconds = sum(result["seconds"] for result in results)
    return {
        "technique": technique,
        "scales": scales,
        "top1_error": errors["top1_error"],
        "interval": errors["top1_error_interval"],
        "top5_error": errors["top5_error"],
        "milliseconds_an_image": 1000 * seconds / len(mean),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--data-dir")
    parser.add_argument("--split", default="val", help="val: the run's validation images")
    parser.add_argument("--scales", type=int, nargs=3, default=[32, 48, 64])
    parser.add_argument("--device", required=True)
    args = parser.parse_args()
    enable_compilation_cache()
    outcomes = evaluate_all(args)
    rows = [
        combine(technique, scales, [outcomes[name, scale] for name in names for scale in scales])
        for scales in (*((scale,) for scale in args.scales), tuple(args.scales))
        for technique, names in TECHNIQUES.items()
    ]
    _, results = outcomes["center", args.scales[0]]
    document = {name: results[name] for name in ("run", "epoch", "data", "split", "net", "count")}
    document |= {
        "device": args.device,
        "jax": jax.__version__,
        "rows": rows,
        "paper_percent": PAPER,
    }
    print(json.dumps(document, indent=1))


if __name__ == "__main__":
    run(main)
