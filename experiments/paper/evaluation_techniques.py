"""Dense evaluation, crops or both, at one scale or three: error and cost on CIFAR-10, the paper's Table 5 beside them.

    vgg-jax train cifar10 --data-dir DIR --net A --batch-norm --scale 32 64 --schedule step --drop-epochs 4 5 --epochs 6 \
        --workdir runs/cifar10-A-jitter
    python -m experiments.paper.evaluation_techniques runs/cifar10-A-jitter --data-dir DIR --device "2 cores of …" \
        > experiments/results/evaluation_techniques.json

The training images' shorter side S lies in [32; 64], the crop is 32 pixels: the paper's [256; 512] and 224, made small. So the test
scales are S_min, the middle and S_max. Each technique is run once at each scale on all images of the split; what combines several is the
mean of their posteriors, and its cost their sum. Prints one JSON document. Training takes 25 minutes on two cores, this 11.
"""

import argparse
import dataclasses
import json
import sys

import jax
import numpy as np

from experiments.script import run
from vgg_jax.configs.evaluation import EvalProtocol
from vgg_jax.evaluation.evaluate import evaluate
from vgg_jax.runtime.compilation_cache import enable_compilation_cache

TECHNIQUES = {
    "center": ("center",),
    "dense": ("dense",),
    "multi-crop": ("multi-crop",),
    "both": ("dense", "multi-crop"),
}
# Table 5: S in [256; 512], Q = 256, 384, 512, validation errors in %. Table 3 has dense evaluation at Q = 384.
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run")
    parser.add_argument("--data-dir")
    parser.add_argument("--split", default="val", help="val: what the run validated on")
    parser.add_argument("--scales", type=int, nargs=3, default=[32, 48, 64])
    parser.add_argument("--device", required=True)
    args = parser.parse_args()
    enable_compilation_cache()
    single = {}
    for name in ("center", "dense", "multi-crop"):
        for scale in args.scales:
            single[name, scale] = evaluate(
                args.run,
                split=args.split,
                protocol=EvalProtocol(name),
                scales=(scale,),
                data_dir=args.data_dir,
            )
            print(
                name,
                scale,
                single[name, scale][1]["top1_error"],
                single[name, scale][1]["seconds"],
                file=sys.stderr,
                flush=True,
            )

    rows = []
    for scales in (*((scale,) for scale in args.scales), tuple(args.scales)):
        for technique, names in TECHNIQUES.items():
            parts = [single[name, scale] for name in names for scale in scales]
            mean = np.mean([evaluation.posteriors for evaluation, _ in parts], 0)
            errors = dataclasses.replace(parts[0][0], posteriors=mean).errors()
            seconds = sum(facts["seconds"] for _, facts in parts)
            row = {
                "technique": technique,
                "scales": scales,
                "top1_error": errors["top1_error"],
                "interval": errors["top1_error_interval"],
            }
            rows.append(
                row
                | {
                    "top5_error": errors["top5_error"],
                    "milliseconds_an_image": 1000 * seconds / len(mean),
                }
            )
    first = single["center", args.scales[0]][1]
    run = {name: first[name] for name in ("run", "epoch", "data", "split", "net", "count")}
    print(
        json.dumps(
            run
            | {"device": args.device, "jax": jax.__version__, "rows": rows, "paper_percent": PAPER},
            indent=1,
        )
    )


if __name__ == "__main__":
    run(main)
