"""Which errors does the paper's recipe give on ImageNet? Trains and evaluates all its nets.

    python -m experiments.paper.imagenet IMAGENET --out runs/imagenet --dtype bfloat16
    python -m experiments.paper.imagenet --plan
    python -m experiments.paper.imagenet PHOTOS --out runs/try --nets A D --image-size 32 \\
        --fc 16 16 --batch-size 8 --epochs 2 --fine-tune-epochs 1

Answer: unknown. Nobody has run this at full size. The tests run all of it in miniature, as the last
command does: S and Q shrink in proportion to --image-size. Try that first.

Device and time: see --plan, which trains nothing. It lists the stages with their epochs, images,
operations and expected hours on one GPU, eight GPUs and a pod.

Stages (§3.1): A and A-LRN at S = 256 from random layers. B, C, D and E at S = 256, with seven
layers of A. C, D and E at S = 384 from S = 256, at a tenth of the rate. Then S in [256; 512] from
S = 384, all layers, and once more with D's fully connected layers only, for the submission in
Table 6. The rate drops at each plateau of the validation accuracy. Only the stages that --nets
need are trained.

Evaluations: each row of Tables 3 to 6 averages the posteriors of some evaluations of the validation
split. A stage's net is that of its best epoch. OUT/evaluations keeps the posteriors, 200 MB each at
full size. OUT/tables.json has the rows, with the paper's errors beside ours.

Ctrl-C and SIGTERM stop the program with exit code 75. The same command goes on. Finished stages and
evaluations are not repeated. So --nets may grow: first A, then A D. OUT must keep its path.

Several GPUs of one machine are used by default. Several processes are joined as by `vgg-jax train`
(experiments/launch): they train only. Then run the same command in one process to evaluate.

Choices where the paper is silent: the standard deviation of the random layers is 0.01. S = 384 and
jitter have two drops of the rate, so that they end at the same rate as S = 256, and jitter's first
rate is that of S = 384. A plateau is five epochs. docs/paper.md lists the others.

Other than the paper's: validation images are those of ILSVRC 2012, so Table 6 has no test errors.
"""

import argparse
import hashlib
import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

import vgg_jax
from experiments.paper.imagenet_plan import format_plan
from experiments.paper.imagenet_recipe import (
    NETS,
    Part,
    Row,
    Stage,
    scaled,
    select_rows,
    select_stages,
    train_config,
)
from experiments.script import HelpFormatter
from vgg_jax.cli.exit_codes import ExitCode, explain
from vgg_jax.cli.logs import configure_logging
from vgg_jax.cli.parser import parse_mesh
from vgg_jax.configs.evaluation import MAX_PIXELS_PER_BATCH
from vgg_jax.configs.train import ALLREDUCE_DTYPES, DISTRIBUTED_MODES, DTYPES, ON_NAN, TrainConfig
from vgg_jax.distributed import multihost
from vgg_jax.distributed.sharding import MeshConfig
from vgg_jax.errors import InputError
from vgg_jax.evaluation.evaluate import evaluate, fuse
from vgg_jax.paths import to_path
from vgg_jax.runs.checkpoint import CheckpointSaveError
from vgg_jax.runs.files import atomic_write
from vgg_jax.runtime.compilation_cache import enable_compilation_cache
from vgg_jax.runtime.signals import exit_on_second_signal, interrupt_on_sigterm
from vgg_jax.training.loop import fit
from vgg_jax.training.report import divergence_hint
from vgg_jax.training.trainer import DivergedError

NET_DIGEST = "net.sha256"  # file of an evaluation, with the digest of its net


def train(stages: Sequence[Stage], args: argparse.Namespace) -> bool:
    """Trains the stages that are not finished. Returns False if a signal stopped one."""
    mesh_config = MeshConfig(**args.mesh, fsdp=args.fsdp, reduce=args.reduce)
    for stage in stages:
        say(f"stage {stage.name}")
        result = fit(
            train_config(stage, args),
            os.path.join(args.out, stage.name),
            args.data_dir,
            on_nan=args.on_nan,
            mesh_config=mesh_config,
        )
        if result.stopped:
            return False
    return True


def evaluate_all(
    stages: Sequence[Stage], rows: Sequence[Row], args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Evaluates what the rows need, and writes tables.json whenever a row is complete."""
    parts = {part for row in rows for part in row.parts}
    done: set[Part] = set()
    results: dict[Row, dict[str, Any]] = {}
    for stage in stages:
        own = sorted(part for part in parts if part.stage == stage.name)
        evaluate_stage(stage, own, args)
        done |= {*own}
        for row in rows:
            if row not in results and done.issuperset(row.parts):
                results[row] = row_result(row, args)
        write_tables([results[row] for row in rows if row in results], args)
    return [results[row] for row in rows]


def evaluate_stage(stage: Stage, parts: Sequence[Part], args: argparse.Namespace) -> None:
    """Evaluates a stage's net, except for parts that this net has already."""
    if not parts:
        return
    net = vgg_jax.load(os.path.join(args.out, stage.name))
    digest = digest_of(net[1])
    for part in parts:
        folder = evaluation_folder(part, args)
        if evaluated_net(folder) == digest:
            continue
        say(f"evaluation {part.name}")
        evaluate(
            *net,
            args.data,
            protocol=part.protocol,
            scales=(scaled(part.test_scale, args.image_size),),
            data_dir=args.data_dir,
            pixels=args.pixels,
            out=folder,
        )
        atomic_write(to_path(folder) / NET_DIGEST, digest.encode())  # last: the folder is complete


def evaluation_folder(part: Part, args: argparse.Namespace) -> str:
    return os.path.join(args.out, "evaluations", part.name)


def digest_of(variables: Mapping[str, Any]) -> str:
    """A digest of all weights. More epochs, or a stage that was trained again, change it."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(variables):
        digest.update(np.ascontiguousarray(leaf).data)
    return digest.hexdigest()


def evaluated_net(folder: str) -> str | None:
    """The digest of the net of a finished evaluation, or None."""
    path = to_path(folder) / NET_DIGEST
    return path.read_text() if path.exists() else None


def row_result(row: Row, args: argparse.Namespace) -> dict[str, Any]:
    """Averages the posteriors of a row, and returns its errors beside the paper's."""
    evaluation = fuse([evaluation_folder(part, args) for part in row.parts])
    errors = evaluation.errors()
    return {
        "table": row.table,
        "row": row.label,
        "evaluations": [part.name for part in row.parts],
        "paper_percent": [row.top1, row.top5],
        **{name: errors[name] for name in ("top1_error", "top1_error_interval")},
        **{name: errors[name] for name in ("top5_error", "top5_error_interval")},
        "count": errors["count"],
    }


def write_tables(results: Sequence[dict[str, Any]], args: argparse.Namespace) -> None:
    """Replaces tables.json atomically."""
    document = {"settings": vars(args), "jax": jax.__version__, "rows": results}
    content = json.dumps(document, indent=1) + "\n"
    atomic_write(to_path(args.out) / "tables.json", content.encode())


def format_tables(results: Sequence[dict[str, Any]]) -> str:
    """Formats rows as a table in Markdown. Sides are those of crops of 224 pixels."""
    lines = [
        "| table | row | paper top-1 | top-5 | top-1 | top-5 | images |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results:
        paper = " | ".join(f"{percent:.1f}" for percent in result["paper_percent"])
        own = " | ".join(f"{100 * result[name]:.1f}" for name in ("top1_error", "top5_error"))
        lines.append(
            f"| {result['table']} | {result['row']} | {paper} | {own} | {result['count']:,} |"
        )
    return "\n".join(lines)


def say(text: str) -> None:
    if multihost.is_main_process():
        print(text, file=sys.stderr, flush=True)


def reproduce(args: argparse.Namespace) -> ExitCode:
    """Trains, evaluates and prints the tables, or goes on with them."""
    rows = select_rows(args.nets)
    stages = select_stages(rows)
    if args.plan:
        print(format_plan(stages, rows, args))
        return ExitCode.DONE
    if args.data is None:
        raise InputError("no data is given: expected the folder of ImageNet; pass it, or --plan")
    if message := multihost.initialize(args.distributed):
        print(message, file=sys.stderr, flush=True)
        if not multihost.is_main_process():
            logging.getLogger("vgg_jax").setLevel(logging.WARNING)
    with multihost.shutdown_on_exit():
        if not train(stages, args):
            return ExitCode.STOPPED
        if jax.process_count() > 1:
            say("all stages are finished; run the same command in one process to evaluate them")
            return ExitCode.DONE
    print(format_tables(evaluate_all(stages, rows, args)))
    return ExitCode.DONE


def exit_code(args: argparse.Namespace) -> ExitCode:
    """Runs `reproduce`, and turns errors into a sentence and a code of `vgg-jax train`."""
    try:
        with interrupt_on_sigterm():
            return reproduce(args)
    except KeyboardInterrupt:
        code, message = ExitCode.STOPPED, "stopped; the same command goes on"
    except DivergedError as error:
        code, message = ExitCode.DIVERGED, f"{error}: {divergence_hint(error.rate)}"
    except CheckpointSaveError as error:
        code, message = ExitCode.NOT_SAVED, f"{error}; make room, and run the same command"
    except multihost.ProcessLostError as error:
        code, message = ExitCode.PROCESS_LOST, str(error)
    except Exception as error:
        explanation = explain(error, vars(args))
        if explanation is None:
            raise
        code, message = explanation
    print(f"imagenet.py: {message}", file=sys.stderr)
    return code


def parser() -> argparse.ArgumentParser:
    paper = TrainConfig()
    result = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = result.add_argument
    add("data", nargs="?", help="a folder with ImageNet, or a name in --data-dir")
    add("--data-dir", help="folder of prepared data sets")
    add("--out", default="runs/imagenet", help="folder of the runs and tables")
    add("--nets", nargs="+", choices=NETS, default=list(NETS), help="nets of the tables' rows")
    add("--plan", action="store_true", help="print the stages and their expected times")
    add("--seed", type=int, default=0)
    add("--image-size", type=int, default=paper.image_size, help="S and Q keep their ratio to it")
    add("--fc", type=int, nargs=2, default=list(paper.fc), help="features of fc6 and fc7")
    add("--epochs", type=int, default=paper.epochs, help="most epochs at S = 256")
    add("--fine-tune-epochs", type=int, default=paper.epochs, help="most epochs of later stages")
    add("--patience", type=int, default=paper.patience, help="epochs of a plateau")
    add("--learning-rate", type=float, default=1e-2, help="at S = 256; a tenth of it at S = 384")
    add("--jitter-rate", type=float, help="with jitter; default: as at S = 384")
    add("--initializer", choices=("paper", "glorot", "he"), default="paper")
    add("--batch-size", type=int, default=paper.batch_size)
    add("--microbatch", type=int, help="images whose activations are held at once")
    add("--dtype", choices=DTYPES, default=paper.dtype)
    add("--on-nan", choices=ON_NAN, default="stop", help="after a loss that is infinite or NaN")
    add("--pixels", type=int, default=MAX_PIXELS_PER_BATCH, help="computed at once in evaluations")
    add("--mesh", type=parse_mesh, default={}, help="such as data=4,model=2")
    add("--fsdp", action="store_true", help="shard parameters and momentum over the devices")
    add("--reduce", choices=ALLREDUCE_DTYPES, default="float32", help="dtype of the exchange")
    add("--distributed", choices=DISTRIBUTED_MODES, default="auto", help="join other processes")
    return result


def main(argv: Sequence[str] | None = None) -> ExitCode:
    args = parser().parse_args(argv)
    configure_logging(results_only=True)
    enable_compilation_cache()
    return exit_code(args)


if __name__ == "__main__":
    logging.root.handlers.clear()  # orbax adds one, which would print each message twice
    exit_on_second_signal()
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # does not wait for threads that still compile
