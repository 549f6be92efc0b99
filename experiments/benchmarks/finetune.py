"""Fine-tunes net D on photos from pretrained convolutions, next to PyTorch.

    python -m experiments.benchmarks.finetune PHOTOS --init-from FILE --freeze --seeds 0 1 2 \\
        [--peer "python -m experiments.benchmarks.torch_finetune"]

PHOTOS has the folders train/CLASS and val/CLASS. The peer runs after each run of `vgg-jax train`,
with the same settings and number of epochs. Frozen convolutions see centre crops at S = 384, once.
Free ones see random crops at S from 320 to 448, some of them mirrored, or with --centre the same
centre crops as frozen ones. Epochs are validated on centre crops. The weights of the best epoch are
evaluated on whole photos too (dense). Prints one JSON document. With 400 photos on two cores, a run
takes two minutes with frozen convolutions. With free ones an epoch takes one to two minutes.
"""

import argparse
import json
import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from experiments.paper.record_runs import record_run
from experiments.script import HelpFormatter, run, stdout_of

SETTINGS = "--net D --fc 256 256 --batch-size 32 --skip-bad --colour-shift 0"
CENTRE = "--scale 384 --crop centre --no-flip"
FROZEN = f"--freeze conv --cache-features {CENTRE}"
RANDOM = "--scale 320 448"  # random crops and flips


def fine_tune(args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Runs `vgg-jax train` and `evaluate`, and returns their numbers."""
    with tempfile.TemporaryDirectory() as folder:
        workdir = Path(folder, "run")
        images = FROZEN if args.freeze else CENTRE if args.centre else RANDOM
        options = f"{SETTINGS} {images} --epochs {args.epochs}"
        command = [sys.executable, "-m", "vgg_jax", "train", args.photos, *shlex.split(options)]
        command += ["--seed", str(seed)]
        command += ["--init-from", args.init_from, "--workdir", str(workdir)]
        started = time.perf_counter()
        print(stdout_of(command), file=sys.stderr)
        seconds = time.perf_counter() - started
        return {
            "seconds": round(seconds, 1),
            **record_run(str(workdir)),
            "dense_accuracy_of_best_epoch": evaluate_dense(workdir),
        }


def evaluate_dense(workdir: Path) -> float:
    """Evaluates the best weights of a run on whole photos, resized as in training."""
    result = workdir / "dense"
    command = [sys.executable, "-m", "vgg_jax", "evaluate", str(workdir), "--out", str(result)]
    print(stdout_of([*command, "--skip-bad"]), file=sys.stderr)
    return round(1 - json.loads((result / "evaluation.json").read_text())["top1_error"], 4)


def fine_tune_peer(args: argparse.Namespace, seed: int, num_epochs: int) -> dict[str, Any]:
    command = [*shlex.split(args.peer), args.photos, "--init-from", args.init_from]
    command += ["--epochs", str(num_epochs), "--seed", str(seed)]
    command += [f"--{name}" for name in ("freeze", "centre") if getattr(args, name)]
    started = time.perf_counter()
    result = json.loads(stdout_of(command))
    return {"seconds": round(time.perf_counter() - started, 1)} | result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("photos", metavar="PHOTOS")
    parser.add_argument(
        "--init-from", required=True, metavar="FILE", help="pretrained convolutions"
    )
    parser.add_argument("--freeze", action="store_true", help="freeze the convolutions")
    parser.add_argument("--centre", action="store_true", help="centre crops for free convolutions")
    parser.add_argument("--epochs", type=int, default=74, help="largest number of epochs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--peer", help="command of another program")
    args = parser.parse_args()
    runs = []
    for seed in args.seeds:
        own = fine_tune(args, seed)
        runs.append({"vgg_jax": own})
        if args.peer:
            runs[-1]["peer"] = fine_tune_peer(args, seed, len(own["epochs"]))
    print(json.dumps({"command": " ".join(sys.argv), "runs": runs}, indent=1))


if __name__ == "__main__":
    run(main)
