"""The command line: each command, and errors to one sentence.

Exit codes: 0 done, 1 a check that did not hold, 2 bad input, 3 an image that cannot be read, 4 diverged, 69 an object store that fails, 74
the end could not be saved, 75 stopped and resumable, 76 ended because another process of the run had, 130 interrupted.
"""

import contextlib
import ctypes
import json
import os
import platform
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from vgg_jax.cli.parser import parser
from vgg_jax.configs.models import CONFIGS, Protocol, TrainConfig
from vgg_jax.configs.presets import preset
from vgg_jax.errors import DataError, InputError
from vgg_jax.paths import is_store_error, path_of
from vgg_jax.runtime.signals import hear_second_signal


def main(argv: Sequence[str] | None = None) -> int:
    arguments = vars(parser().parse_args(argv))
    command = COMMANDS[arguments.pop("command")]
    if argv is None and command is train:
        use_huge_pages()
        hear_second_signal()
    try:
        if arguments.pop("compilation_cache", False):
            keep_compiled_programs()
        code = command(**arguments)
    except InputError as error:
        print(f"vgg-jax: {' '.join(str(error).split())}", file=sys.stderr)
        code = 3 if isinstance(error, DataError) else 2
    except ModuleNotFoundError as error:
        if error.name and error.name.startswith("vgg_jax"):
            raise
        print(
            f"vgg-jax: this command needs {error.name}: pip install 'vgg-jax[train]'",
            file=sys.stderr,
        )
        code = 2
    except (
        OSError
    ) as error:  # a disk that is full, a folder that may not be read: the message has the path
        print(f"vgg-jax: {error}", file=sys.stderr)
        code = 2
    except Exception as error:
        if not (is_store_error(error) and any("://" in str(value) for value in arguments.values())):
            raise
        print(
            f"vgg-jax: the object store cannot be used ({' '.join(str(error).split())[:300]})",
            file=sys.stderr,
        )
        code = 69
    except KeyboardInterrupt:
        print("vgg-jax: interrupted", file=sys.stderr)
        code = 130
    if argv is None and code:  # at once: no thread that still compiles or writes is waited for
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def keep_compiled_programs() -> None:
    """Lets the next start find what this one compiles, in $JAX_COMPILATION_CACHE_DIR or the user's cache folder."""
    # jaxlib 0.10 writes an error of two kilobytes for each program that it finds, over a preference of LLVM's. What fails is raised.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # Of programs with oneDNN's convolutions, in bfloat16: jaxlib 0.12 cannot write those.
    warnings.filterwarnings(
        "ignore", r"(?s)Error writing persistent compilation cache entry.*std::bad_alloc"
    )
    import jax

    if not jax.config.values["jax_compilation_cache_dir"]:
        # A folder for each machine, since a home may be shared by several and a program for one processor need not run on another.
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
        jax.config.update(
            "jax_compilation_cache_dir",
            os.path.join(os.path.expanduser(cache), "vgg_jax", platform.node()),
        )


def use_huge_pages() -> None:
    """Starts this program again with glibc's memory in huge pages, which only the environment can ask for before it starts.

    A training step asks for gigabytes and gives them back: in pages of 4 kB net D at 224 pixels, batch 8, takes 1.15 times as long
    (2 cores). Commands that keep their memory gain nothing by it. What an image took is kept for the next one, which makes the input
    2 % faster. A user's own GLIBC_TUNABLES are left as they are.
    """
    if (
        sys.platform == "linux"
        and platform.libc_ver()[0] == "glibc"
        and "GLIBC_TUNABLES" not in os.environ
    ):
        # glibc before 2.35 knows no huge pages, and says nothing.
        tunables = {"hugetlb": 1, "mmap_threshold": 2**25, "trim_threshold": 2**28}
        environment = os.environ | {
            "GLIBC_TUNABLES": ":".join(
                f"glibc.malloc.{name}={value}" for name, value in tunables.items()
            )
        }
        with contextlib.suppress(OSError):
            os.execve(sys.executable, sys.orig_argv, environment)


def keep_memory() -> None:
    """Lets glibc keep the memory that one batch has freed for the next, instead of handing it back to Linux page by page.

    For commands whose memory is bounded, before any thread starts. Net A's dense evaluation of photos is 1.2 times as fast (2 cores).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        m_trim_threshold, m_mmap_max, m_arena_max = -1, -4, -8
        mallopt(m_arena_max, 1)
        mallopt(m_mmap_max, 0)
        mallopt(
            m_trim_threshold, -1
        )  # never; any number is an int, and 2 GB at the top are sometimes free


def train(
    data: str, workdir: str | None, data_dir: str | None, download: bool, **given: Any
) -> int:
    how = {
        name: given.pop(name) for name in ("save_seconds", "on_nan", "debug_nans") if name in given
    }
    if "exclude" in given:
        from vgg_jax.data import read_list

        given["exclude"] = read_list(given["exclude"])
    distributed = given.pop("distributed", "auto")
    spread = given.pop("mesh", {}) | {
        name: given.pop(name) for name in ("fsdp", "reduce") if name in given
    }
    config = preset(data, **given)
    from vgg_jax.distributed import multihost
    from vgg_jax.distributed.sharding import Layout
    from vgg_jax.training.report import against_divergence

    layout = Layout(**spread)
    if joined := multihost.join(distributed):
        if not multihost.is_first():
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # also what C++ prints
        print(joined, flush=True)
    from vgg_jax.training.loop import DivergedError, NotSavedError, fit

    try:
        with multihost.left_together():
            outcome = fit(
                config,
                workdir or f"runs/{plain(data)}-{config.net}",
                data_dir,
                download,
                layout=layout,
                **how,
            )
    except multihost.LostError as error:
        print(f"vgg-jax: {error}", file=sys.stderr)
        return 76
    except DivergedError as error:
        if multihost.is_first():
            print(f"vgg-jax: {error}: {against_divergence(error.rate)}", file=sys.stderr)
        return 4
    except NotSavedError as error:
        if multihost.is_first():
            print(
                f"vgg-jax: {error}; make room, and the same command goes on from what was saved before",
                file=sys.stderr,
            )
        return 74
    return 75 if outcome.stopped else 0


def plain(data: str) -> str:
    """What data is called in the name of a folder."""
    return data.rstrip("/").replace("/", "-").replace(":", "-").strip(".-") or "data"


def summary(
    net: str,
    num_classes: int,
    batch_norm: bool,
    image_size: int,
    batch_size: int | None,
    **step: Any,
) -> int:
    from vgg_jax.summary import table

    if batch_size is None and step["microbatch"] is not None:
        raise InputError(f"microbatch is {step['microbatch']}: expected --batch-size beside it")
    shape: dict[str, Any] = {
        "image_size": image_size,
        "scale": (image_size,),
        "batch_size": batch_size,
    }
    config = (
        None if batch_size is None else TrainConfig(net=net, batch_norm=batch_norm, **shape, **step)
    )
    print(table(CONFIGS[net], num_classes, batch_norm, image_size))
    if config is not None:
        from vgg_jax.training.step import step_memory

        found = {
            name: f"{size / 1e9:.2f} GB" for name, size in step_memory(config, num_classes).items()
        }
        print(
            f"A training step of {batch_size} images takes {found['total']}: {found['state']} for parameters and momentum, the rest for"
        )
        print(
            "activations, gradients and XLA, on one device like this; what the process held before comes on top. Nothing was run."
        )
    return 0


def statistics(data: str, split: str, data_dir: str | None, download: bool, skip_bad: bool) -> int:
    from vgg_jax.data import measure, open_split

    source = open_split(data, split, data_dir=data_dir, download=download, skip_bad=skip_bad)
    measured = measure(source, skip_bad=skip_bad)
    print(f"{source.name}: {measured.count} images, RGB on the 0-255 scale")
    for label, values in (
        ("mean over all pixels", measured.pixel_mean),
        ("std over all pixels", measured.pixel_std),
        ("mean of the images' means", measured.image_mean),
        ("mean of the images' stds", measured.image_std),
    ):
        print(f"{label:<26}" + "".join(f"{value:>10.3f}" for value in values))
    return 0


def verify_data(data: str, data_dir: str | None, download: bool, out: str) -> int:
    from vgg_jax.data import verify, write_list

    found = []
    try:
        for split, count, bad in verify(data, data_dir=data_dir, download=download):
            print(f"{data} {split}: {len(bad)} of {count} images cannot be read", flush=True)
            for each in bad:
                print(f"  {each.file!r}: {each.reason}", flush=True)
            found += bad
    finally:
        if found:
            write_list(out, found)
    write_list(out, found)
    if found:
        print(f"{out}: their list; `vgg-jax train {data} --exclude {out}` leaves them out")
    return 3 if found else 0


def import_(file: str, out: str, net: str | None, check: str | None) -> int:
    from vgg_jax.weights import read, save

    weights = read(file, net)
    save(out, weights)
    mean = ", ".join(f"{value:.3f}" for value in weights.preprocessing.mean_rgb)
    print(f"{file}: {weights}; images are RGB, 0-255, less ({mean}); written to {out}")
    if check is None:
        return 0
    from vgg_jax.weights.compare_torch import BOUND, against_torch

    differences = against_torch(weights)
    for layer, difference in differences.items():
        print(f"{layer:<10}{difference:>10.1e}")
    worst = max(differences, key=lambda layer: differences[layer])
    print(
        f"largest difference from PyTorch: {differences[worst]:.1e} of the largest value, in {worst}; bound {BOUND:.0e}"
    )
    return 0 if differences[worst] < BOUND else 1


def export(
    net: str,
    out: str,
    layout: str,
    output: str,
    uint8: bool,
    fold_batch_norm: bool,
    bfloat16: bool,
    arch: str | None,
) -> int:
    from vgg_jax.export import Artefact, with_folded_batch_norm, write
    from vgg_jax.weights import read

    weights = read(net, arch)
    write(
        out,
        Artefact(
            with_folded_batch_norm(weights) if fold_batch_norm else weights, output, uint8, bfloat16
        ),
        layout,
    )
    print(f"{out}: written; `vgg-jax verify {out}` asks it again")
    return 0


def verify(file: str) -> int:
    from vgg_jax.export.verify import BOUND, verify

    said, difference = verify(file)
    print(
        f"{file}: {said}; largest difference from the answer at export: {difference:.1e} of the largest value; bound {BOUND:.0e}"
    )
    return 0 if difference < BOUND else 1


def selfcheck() -> int:
    from vgg_jax import selfcheck

    found = selfcheck.check()
    print(selfcheck.report(found))
    return 0 if all(each.right for each in found) and not selfcheck.known() else 1


def predict(
    net: str, images: list[str], top: int, as_json: bool, protocol: str, scales: list[int]
) -> int:
    keep_memory()
    from vgg_jax.evaluation.predict import predict

    failed = False
    for file, best, error in predict(
        net, images, protocol=Protocol(protocol), scales=scales, top=top
    ):
        failed = failed or error is not None
        if as_json:
            known = {
                "top": [{"class": name, "probability": probability} for name, probability in best]
            }
            print(
                json.dumps({"file": file} | (known if error is None else {"error": error})),
                flush=True,
            )
        elif error is not None:
            print(
                f"vgg-jax: {error}; expected a JPEG, PNG, WebP, BMP or GIF image", file=sys.stderr
            )
        else:
            print(
                f"{file}: " + "; ".join(f"{name} {probability:.1%}" for name, probability in best),
                flush=True,
            )
    return 3 if failed else 0


def evaluate(
    run: str,
    data: str | None,
    split: str,
    scales: list[int],
    protocol: str,
    flip: bool | None,
    softmax_first: bool,
    ceil: bool,
    out: str | None,
    **where: Any,
) -> int:
    keep_memory()
    from vgg_jax.evaluation.evaluate import evaluate, report, save

    chosen = Protocol(protocol, flip, softmax_first, ceil)
    beside = run if path_of(run).is_dir() else run + "-evaluated"
    new = path_of(out or beside)
    made = not new.is_dir() and (out is not None or path_of(run).is_file())
    if made:
        new.mkdir(parents=True)  # now rather than when all is computed
    try:
        evaluation, facts = evaluate(run, data, split, protocol=chosen, scales=scales, **where)
    except BaseException:
        if made:
            new.rmdir()
        raise
    flags = [
        name
        for name, on in (
            ("mirrored", facts["protocol"]["flip"]),
            ("softmax-first", softmax_first),
            ("ceil", ceil),
        )
        if on
    ]
    folder = out or os.path.join(
        beside,
        "-".join(
            [*([plain(data)] if data else []), split, protocol, *map(str, facts["scales"]), *flags]
        ),
    )
    save(folder, evaluation, facts)
    print(
        f"{', '.join([protocol, 'Q = ' + ', '.join(map(str, facts['scales'])), *flags])}: {report(facts)}"
    )
    print(
        f"{facts['seconds']:.1f} s, {facts['images_per_second']:.1f} images/s; {folder}/evaluation.json, {folder}/posteriors.npz"
    )
    return 0


def fuse(posteriors: list[str], out: str | None) -> int:
    from vgg_jax.evaluation.evaluate import fuse, report, save

    fused = fuse(posteriors)
    facts = {"fused": posteriors} | fused.errors()
    if out is not None:
        save(out, fused, facts)
    print(f"mean of {len(posteriors)} posteriors: {report(facts)}")
    return 0


COMMANDS: dict[str, Callable[..., int]] = {
    "train": train,
    "evaluate": evaluate,
    "fuse": fuse,
    "predict": predict,
    "import": import_,
    "export": export,
    "verify": verify,
    "summary": summary,
    "statistics": statistics,
    "verify-data": verify_data,
    "selfcheck": selfcheck,
}
