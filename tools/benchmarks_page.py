"""Writes docs/benchmarks.md, its plots and tables of other pages from experiments/results/*.json.

    pip install -e '.[docs]'
    python -m tools.benchmarks_page

Run it after a result has changed. tests/test_docs.py fails if a page or a plot is stale.
"""

import json
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "experiments" / "results"
IMAGES = ROOT / "docs" / "images"
PAGE = ROOT / "docs" / "benchmarks.md"
OURS, PEER = "#d62728", "#7f7f7f"

INTRODUCTION = """# Benchmarks

`python -m tools.benchmarks_page` writes this page from the files in `experiments/results`.

- A ratio says how many times as fast vgg_jax is. Below 1 the other library is faster.
- The two programs of a pair run in turn, each in its own process.
- A ratio is the median of its pairs. Seconds and rates are the medians of each program.
- Ratios are rounded down.
- Each section names the commit that recorded its results. Later commits may be faster or slower.
- `torch_step.py`, `torch_dense.py` and `torch_input.py`, scripts of PyTorch and torchvision, are
  not in the repository.
- The commands have the paths of their day: `experiments/bench_step.py` is now
  `python -m experiments.benchmarks.bench_step`. `experiments/README.md` lists all scripts.
"""


def load(name: str) -> dict[str, Any]:
    """Reads a file of experiments/results."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def floor(value: float, digits: int = 2) -> str:
    """Rounds a ratio down, never in our favour."""
    scale = 10**digits
    return f"{math.floor(value * scale + 1e-9) / scale:.{digits}f}"


def median(values: Iterable[float]) -> float:
    """The middle value, or the smaller one of two."""
    ordered = sorted(values)
    return ordered[(len(ordered) - 1) // 2]


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Formats a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def section(title: str, result: dict[str, Any], text: str, **versions: str) -> str:
    """Formats a section that names the commit, machine, versions and command of its result."""
    names = {"python": "Python", "jax": "jax", "torch": "PyTorch", "torchvision": "torchvision"}
    names |= {"onnxruntime": "ONNX Runtime"}
    known = result | result.get("versions", {}) | versions
    software = [f"{names[key]} {known[key]}" for key in names if key in known]
    commands = result.get("commands", result.get("command", []))
    commands = [commands] if isinstance(commands, str) else commands
    facts = f"Commit `{result['commit']}`. Machine: {result['device']}."
    facts += f" Versions: {', '.join(software)}." if software else ""
    code = "".join(f"\n{command}" for command in commands)
    return f"## {title}\n\n{text}\n\n{facts}\n" + (f"\n```text{code}\n```\n" if code else "")


def step_name(row: dict[str, Any]) -> str:
    """Names a row of steps.json: net, image size, batch and dtype."""
    net = f"{row['net']}, batch norm" if row.get("batch_norm") else row["net"]
    return f"{net}, {row['image_size']} px, batch {row['batch']}, {row['dtype']}"


def peer_name(row: dict[str, Any]) -> str:
    """Names the other library of a row of steps.json, without its version."""
    return (
        "torch.compile" if "compile" in row["peer"] else row["peer"].split(",")[0].rsplit(" ", 1)[0]
    )


def steps_tables(steps: Sequence[dict[str, Any]], image_prefix: str) -> str:
    """Training and inference steps beside their peers, with plots."""
    header = ("net", "peer", "vgg_jax, s", "peer, s", "ratio", "of the pairs", "pairs")
    parts = []
    for mode, title in (("train", "Training"), ("infer", "Inference")):
        rows = [
            (
                step_name(row),
                peer_name(row),
                f"{median(ours for ours, _ in row['pairs']):.3f}",
                f"{median(peer for _, peer in row['pairs']):.3f}",
                floor(row["median_ratio"]),
                " to ".join(floor(limit(row["ratios"])) for limit in (min, max)),
                len(row["pairs"]),
            )
            for row in steps
            if row["mode"] == mode
        ]
        plot = f"![{title} steps](images/{image_prefix}_{mode}.svg)"
        parts.append(f"{title}:\n\n{plot}\n\n{table(header, rows)}")
    return "\n\n".join(parts)


def peers(steps: Sequence[dict[str, Any]]) -> str:
    """Names the peers of steps, with their versions."""
    return "; ".join(sorted({row["peer"] for row in steps}))


def steps_section() -> str:
    """Training and inference steps on a CPU without AMX."""
    result = load("steps_without_amx")
    text = (
        "A step of training, or a batch of inference, on two cores of a CPU with instructions for "
        "bfloat16 but without AMX. There, the convolutions of a net in bfloat16 are computed in "
        "float32, which is faster ([oneDNN and bfloat16](performance.md#onednn-and-bfloat16)). "
        f"Peers: {peers(result['steps'])}. {result['remark']}\n\n"
        + steps_tables(result["steps"], "steps_without_amx")
    )
    return section("Steps on a CPU", result, text)


def steps_with_amx_section() -> str:
    """Training and inference steps on a CPU with AMX."""
    result = load("steps")
    older = table(
        ("net", "mode", "peer", "ratio"),
        (
            (step_name(row), row["mode"], peer_name(row), floor(row["median_ratio"]))
            for row in result["steps_older_jax"]
        ),
    )
    text = (
        "These rows are older. Since then `compile_inference` lets oneDNN lay out its kernels once "
        "([Packed kernels](performance.md#packed-kernels)), which was not measured with AMX. "
        f"Peers: {peers(result['steps'])}. {result['remark']}\n\n"
        + steps_tables(result["steps"], "steps")
        + f"\n\nWith jax 0.10.1:\n\n{older}"
    )
    return section("Steps on a CPU with AMX", result, text)


def gpu_section() -> str:
    """Steps on a GPU."""
    result = load("gpu")
    rows = [row for row in result["steps"] if "ratios" in row]
    text = f"Batch 256 at 224 pixels, bfloat16. The peer is {result['peer']}.\n\n" + table(
        ("net", "mode", "ratio", "images/s", "of the peak", "memory, GB", "peer's memory, GB"),
        (
            (
                row["net"],
                row["mode"],
                floor(row["median_ratio"]),
                f"{math.floor(row['images_per_second']):,}",
                f"{math.floor(100 * row['share_of_peak'])} %",
                f"{row['device_memory'] / 1e9:.1f}",
                f"{row['peer_device_memory'] / 1e9:.1f}",
            )
            for row in rows
        ),
    )
    return section("Steps on a GPU", result, text)


def evaluation_section() -> str:
    """The dense evaluation and the crops beside PyTorch."""
    result, exactness = load("evaluate_A_256"), load("check_dense")
    rows = [
        (
            row["evaluation"],
            row["images"],
            f"{median(ours for ours, _ in row['pairs']):.2f}",
            f"{median(peer for _, peer in row['pairs']):.2f}",
            floor(row["median_ratio"]),
            len(row["pairs"]),
        )
        for row in result["rows"]
    ]
    cold = result["nothing_compiled_before"]
    cold_rows = [
        (row["evaluation"], row["images"], f"{ours:.2f}", f"{peer:.2f}", floor(row["ratio"]))
        for row in cold["rows"]
        for ours, peer in (row["pair"],)
    ]
    largest = max(run["largest_difference"] for run in exactness["runs"])
    names = ("evaluation", "photos", "vgg_jax, images/s", "PyTorch, images/s", "ratio")
    text = (
        "Images a second of net A at Q = 256, with decoding and mirror images. The photos have all "
        "sizes (§3.2). PyTorch takes one image at a time. Every program was compiled before.\n\n"
        + table((*names, "pairs"), rows)
        + "\n\nWith nothing compiled before, older code in one pair each "
        f"(commit `{cold['commit']}`, {cold['device']}):\n\n"
        + table(names, cold_rows)
        + f"\n\nThe dense posteriors of {exactness['runs'][0]['images']} photos differ from "
        f"PyTorch's by at most {largest:.0e} (A, A-LRN, C and D with batch normalisation, Q = 256 "
        f"and 384; commit `{exactness['commit']}`). {result['remark']}"
    )
    return section("Evaluation", result, text)


def techniques_section() -> str:
    """The paper's evaluation techniques on a small net."""
    result = load("evaluation_techniques")
    rows = [
        (
            row["technique"],
            ", ".join(map(str, row["scales"])),
            f"{100 * row['top1_error']:.1f} %",
            f"{100 * row['interval'][0]:.1f} to {100 * row['interval'][1]:.1f} %",
            f"{row['milliseconds_an_image']:.1f}",
        )
        for row in result["rows"]
    ]
    text = (
        "Net A with batch normalisation on CIFAR-10 (six epochs, crops of 32 pixels, S in "
        "[32; 64]), on 5,000 validation images.\n\n"
        + table(("technique", "Q", "top-1 error", "95 % interval", "ms an image"), rows)
        + "\n\nThe paper's net E on ImageNet (Table 5, three scales): dense 24.8 %, multi-crop "
        "24.6 %, both 24.4 % top-1 error."
    )
    return section("Evaluation techniques", result, text)


def input_section() -> str:
    """The training input beside torchvision's."""
    result = load("input")
    rows = []
    for run in (run for run in result["runs"] if "ratios" in run):
        ours = median(pair[0] for pair in run["images_per_second"])
        peer = median(pair[1] for pair in run["images_per_second"])
        source = "TFRecord files" if run["tfrecord"] else "a folder"
        rows.append(
            (source, f"{ours:.0f}", f"{peer:.0f}", floor(run["median_ratio"]), len(run["ratios"]))
        )
    text = (
        "500 ImageNet photos, decoded, rescaled to S in [256; 512], cropped to 224 pixels and "
        f"mirrored. The peer is torchvision with two workers. {result['remark']}\n\n"
        + table(("read from", "vgg_jax, images/s", "torchvision, images/s", "ratio", "pairs"), rows)
    )
    return section("Training input", result, text)


def runtimes_section() -> str:
    """Exported files in ONNX Runtime, and PyTorch."""
    result = load("compare_runtimes")
    names = {"vgg_jax": "vgg_jax", "onnxruntime": "ONNX Runtime", "torch": "PyTorch"}
    text = (
        f"Images a second, centre crops at 224 pixels in batches of {result['batch']}. ONNX "
        "Runtime runs the exported file. The last column is the largest difference of its logits "
        "from ours, as a part of the largest logit.\n\n![Images a second](images/runtimes.svg)\n\n"
        + table(
            ("net", *names.values(), "difference"),
            (
                (
                    row["net"],
                    *(f"{row['images_per_second'][name]:.1f}" for name in names),
                    f"{row['differences']['onnxruntime']:.0e}",
                )
                for row in result["nets"]
            ),
        )
    )
    return section("Exported files", result, text)


def memory_section() -> str:
    """Memory of a step, measured and predicted."""
    result = load("memory")
    rows = result["of the code as it stands"]
    ours = next(row for row in rows if row["jax"] == result["jax"])
    text = (
        "The memory that a training step adds to the process, and the prediction of "
        "`vgg-jax summary NET --batch-size N`.\n\n"
        + table(
            ("net", "jax", "predicted, GB", "measured, GB", "predicted / measured"),
            (
                (
                    step_name(row),
                    row["jax"],
                    f"{row['predicted'] / 1e9:.2f}",
                    f"{row['measured'] / 1e9:.2f}",
                    f"{row['ratio']:.2f}",
                )
                for row in rows
            ),
        )
        + f"\n\nThe whole process of D with 8 photos takes {ours['process'] / 1e9:.1f} GB, "
        f"PyTorch's {result['peer']['process'] / 1e9:.1f} GB."
    )
    return section("Memory", result, text)


def first_answer_section() -> str:
    """Seconds from the start of a process to its first result, beside PyTorch."""
    result = load("first_answer")
    names = ("nothing compiled", "compiled before", "PyTorch")
    rows = [
        (
            row["row"],
            *(f"{statistics.median(row['seconds'][name]):.1f}" for name in names),
            *(floor(row["median_ratios"][name]) for name in names[:2]),
            len(row["seconds"]["PyTorch"]),
        )
        for row in result["rows"]
    ]
    text = (
        "Seconds from the start of a process to its first result: the medians, and the medians of "
        "the ratios, PyTorch's seconds divided by ours. The peer is PyTorch, without torchvision. "
        "To predict, ours evaluates the whole photo, and PyTorch a crop of 224 pixels. With "
        "`compile_inference`, ours reads zeros, and PyTorch the photo. "
        "[First answer](performance.md#first-answer) says where the time goes. "
        f"{result['remark']}\n\n"
        + table(("first result", *names, "ratio", "ratio, compiled before", "rounds"), rows)
        + "\n\nAn earlier version took turns with these rounds. It has none of the changes that "
        "[First answer](performance.md#first-answer) lists "
        f"(commit {result['earlier_commit']}). "
        "The median ratios of the seconds, now to then:\n\n"
        + table(
            ("first result", *names[:2]),
            [
                (row["row"], *(_median_ratio(row, earlier, name) for name in names[:2]))
                for row, earlier in zip(result["rows"], result["earlier_rows"], strict=True)
            ],
        )
    )
    return section("First answer", result, text)


def _median_ratio(row: dict[str, Any], earlier: dict[str, Any], name: str) -> str:
    """The median ratio of the seconds of two rows, round by round. It is rounded up."""
    pairs = zip(row["seconds"][name], earlier["seconds"][name], strict=True)
    ratio = statistics.median(seconds / before for seconds, before in pairs)
    return f"{math.ceil(100 * ratio) / 100:.2f}"


def growth_section() -> str:
    """Time and memory by the size of the data."""
    result, start = load("growth"), load("start")
    images = [run for run in result["runs"] if "images" in run]
    text = (
        "The first step of `vgg-jax train digits` ends after "
        f"{start['first_seconds']:.1f} s, and after {start['second_seconds']:.1f} s if its "
        f"programs were compiled before. `vgg-jax --help` takes {start['help_seconds']:.2f} s "
        f"(commit `{start['commit']}`). An image folder of many files:\n\n"
        + table(
            ("images", "listing, s", "first batch, s", "process, MB"),
            (
                (
                    f"{run['images']:,}",
                    f"{run['open_seconds']:.1f}",
                    f"{run['first_batch_seconds']:.2f}",
                    run["memory_mb"],
                )
                for run in images
            ),
        )
    )
    return section("Start and growth", result, text)


def accuracy_section() -> str:
    """Accuracy of the kernels' variants, and of the digits."""
    result, digits = load("accuracy"), load("digits")
    rows = result["accuracy_mean_and_deviation_over_seeds"].items()
    text = (
        "Net A on 15,000 images of CIFAR-10, five epochs, three seeds: accuracy on 5,000 held-out "
        "images, by the way in which convolutions are computed.\n\n"
        + table(
            ("convolutions", "mean accuracy", "deviation between seeds"),
            (
                (name, f"{100 * mean:.1f} %", f"{100 * std:.1f} points")
                for name, (mean, std) in rows
            ),
        )
        + "\n\n`vgg-jax train` on the 1,797 digits, 180 of them held out "
        f"(commit `{digits['commit']}`, {digits['device']}):\n\n"
        "![Validation accuracy of the digits](images/digits.svg)\n\n"
        + table(
            ("seed", "best validation accuracy", "training, s"),
            (
                (
                    run["seed"],
                    f"{100 * run['best_validation_accuracy']:.1f} %",
                    f"{run['training_seconds']:.0f}",
                )
                for run in digits["runs"]
            ),
        )
    )
    return section("Accuracy", result, text)


def fine_tuning_section() -> str:
    """Fine-tuning on photos from pretrained convolutions."""
    result = load("finetune")
    rows = []
    kinds = {
        "frozen": "frozen, centre crops",
        "free": "free, random crops",
        "free_centre": "free, centre crops",
    }
    for kind, label in kinds.items():
        for run in result[kind]:
            own, peer = run["vgg_jax"], run.get("peer")
            losses = [epoch["validation"][0] for epoch in own["epochs"]]
            rows.append(
                (
                    label,
                    own["seed"],
                    len(own["epochs"]),
                    f"{losses[0]:.2f}, {losses[-1]:.2f}",
                    *_accuracies(own["epochs"]),
                    _percent(own["dense_accuracy_of_best_epoch"]),
                    f"{own['seconds']:.0f}" if own["seconds"] else "",
                    *(_accuracies(peer["epochs"]) if peer else ("", "")),
                    f"{peer['seconds']:.0f}" if peer else "",
                )
            )
    header = (
        *("convolutions", "seed", "epochs", "validation loss, first and last", "best", "last"),
        *("best on whole photos", "s", "PyTorch: best", "last", "s"),
    )
    text = (
        f"{result['data']}. Net D starts from the authors' convolutions, with a new head of two "
        "hidden layers of 256, at the default learning rate. `best` and `last` are validation "
        "accuracies of the best and of the last epoch, on centre crops at S = 384. The best "
        "epoch is chosen by the same photos. Seconds are those of the whole training program. "
        f"PyTorch has the same head, crops, schedule and number of epochs. {result['remark']}\n\n"
        + table(header, rows)
    )
    return section("Fine-tuning", result, text)


def _accuracies(epochs: Sequence[dict[str, Any]]) -> tuple[str, str]:
    """The best and the last validation accuracy."""
    accuracies = [epoch["validation"][1] for epoch in epochs]
    return _percent(max(accuracies)), _percent(accuracies[-1])


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def weights_section() -> str:
    """Weights of torchvision."""
    result = load("check_weights")
    rows = [row for row in result["nets"] if "logits" in row]
    text = (
        "torchvision's nets at full size, read by vgg_jax: the largest difference of the logits, "
        "and of any layer, as parts of the largest value.\n\n"
        + table(
            ("torchvision", "net", "logits", "any layer", "written back bit-equal"),
            (
                (
                    row["net"],
                    row["recognised"],
                    f"{row['logits']:.0e}",
                    f"{row['largest_of_layers']:.0e}",
                    "yes" if row["back_bit_equal"] else "no",
                )
                for row in rows
            ),
        )
    )
    return section("Weights", result, text)


def scaling_section() -> str:
    """Several processes on one machine, and a model of many devices."""
    result = load("scaling")
    measured = result["measured"]
    rows = [
        (row["mesh"], row["processes"], f"{row['relative']:.2f}", f"{row['foretold']:.2f}")
        for row in measured["rows"]
    ]
    text = (
        f"Processes that share {measured['cores']} cores: images a second relative to one process, "
        "measured and predicted by `experiments/benchmarks/scaling_model.py`.\n\n"
        + table(("mesh", "processes", "measured", "predicted"), rows)
        + "\n\nThe tables below are predictions of a model, not measurements. They give the "
        "efficiency for net D: images a second per device, relative to one device by `data`."
    )
    for paper in result["on_paper"]:
        if paper["net"] == "D":
            text += f"\n\n{_scaling_title(paper)}:\n\n{_scaling_table(paper)}"
    return section("Several devices", result, text)


def _scaling_title(paper: dict[str, Any]) -> str:
    if paper["global_batch"]:
        return f"{paper['machine']}, {paper['global_batch']} photos for all devices"
    return f"{paper['machine']}, {paper['batch']} photos for each device"


def _scaling_table(paper: dict[str, Any]) -> str:
    rows = [row for row in paper["rows"] if row["devices"] in SHOWN_DEVICES]
    meshes = list(dict.fromkeys(mesh for row in rows for mesh in row["efficiency"]))
    cells = (
        (row["devices"], *(_two_digits(row["efficiency"].get(mesh)) for mesh in meshes))
        for row in rows
    )
    return table(("devices", *meshes), cells)


def _two_digits(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


SHOWN_DEVICES = (1, 2, 4, 8, 64, 256, 1024)
SECTIONS = (
    steps_section,
    steps_with_amx_section,
    gpu_section,
    evaluation_section,
    techniques_section,
    input_section,
    runtimes_section,
    memory_section,
    first_answer_section,
    growth_section,
    accuracy_section,
    fine_tuning_section,
    weights_section,
    scaling_section,
)


def page() -> str:
    """The text of docs/benchmarks.md."""
    return "\n".join([INTRODUCTION, *(write() for write in SECTIONS)])


def highlights() -> str:
    """The README's table of ratios."""

    def step(mode: str, dtype: str, peer: str, results: str = "steps_without_amx") -> str:
        """The lowest ratio of net D at 224 pixels, of all batches."""
        wanted = {"net": "D", "image_size": 224, "mode": mode, "dtype": dtype}
        rows = [row for row in load(results)["steps"] if row.items() >= wanted.items()]
        return floor(min(r["median_ratio"] for r in rows if r["peer"].startswith(peer)))

    first = next(r for r in load("first_answer")["rows"] if r["row"].startswith("predict"))
    gpu = next(r for r in load("gpu")["steps"] if r["net"] == "D" and r["mode"] == "train")
    folder = next(run for run in load("input")["runs"] if "ratios" in run)
    dense = next(r for r in load("evaluate_A_256")["rows"] if r["evaluation"] == "dense")
    page = "docs/benchmarks.md"
    rows = [
        (
            "Training, net D, float32, CPU",
            step("train", "float32", "PyTorch"),
            "PyTorch",
            "steps-on-a-cpu",
        ),
        (
            "Inference, net D, float32, CPU",
            step("infer", "float32", "ONNX Runtime"),
            "ONNX Runtime",
            "steps-on-a-cpu",
        ),
        (
            "Inference, net D, bfloat16, CPU without AMX",
            step("infer", "bfloat16", "OpenVINO"),
            "OpenVINO",
            "steps-on-a-cpu",
        ),
        (
            "Inference, net D, bfloat16, CPU with AMX",
            step("infer", "bfloat16", "OpenVINO", results="steps"),
            "OpenVINO",
            "steps-on-a-cpu-with-amx",
        ),
        (
            "Training, net D, bfloat16, H200",
            floor(gpu["median_ratio"]),
            "PyTorch with `torch.compile`",
            "steps-on-a-gpu",
        ),
        (
            "Dense evaluation of photos, compiled before, CPU",
            floor(dense["median_ratio"]),
            "PyTorch",
            "evaluation",
        ),
        (
            "Loading and augmenting photos, CPU",
            floor(folder["median_ratio"]),
            "torchvision",
            "training-input",
        ),
        (
            "First answer for a photo, net D, nothing compiled, CPU",
            floor(first["median_ratios"]["nothing compiled"]),
            "PyTorch",
            "first-answer",
        ),
    ]
    return table(
        ("task", "speedup", "compared with"),
        (
            (
                task,
                f"[{ratio}]({page}#{anchor})",
                peer + " (vgg_jax is slower)" * (float(ratio) < 1),
            )
            for task, ratio, peer, anchor in rows
        ),
    )


def faults() -> str:
    """The table of faults that a run survived."""
    result = load("faults")
    rows = (
        (row["fault"], row["trials"], row["lost_steps"], row["result"]) for row in result["rows"]
    )
    quiet = result["run"]["quiet"]["resident_mb"]
    facts = (
        f"Commit `{result['commit']}`, {result['device']}. The undisturbed "
        f"run took {min(quiet)} to {max(quiet)} MB."
    )
    return table(("fault", "trials", "lost steps", "result"), rows) + f"\n\n{facts}"


def fuzzing() -> str:
    """The table of changed files."""
    result = load("fuzz")
    rows = [
        (row["kind"], f"{row['tried']:,}", f"{row['read']:,}", f"{row['refused']:,}")
        for row in result["rows"]
    ]
    total = f"{result['tried']:,} files; {result['crashes_hangs_and_over_a_gigabyte']} failures."
    return table(("file", "tried", "read", "refused"), rows) + f"\n\n{total}"


def quantization() -> str:
    """The table of rounded exports."""
    result = load("quantization")
    titles = {
        "float32": "float32",
        "bfloat16": "`--bfloat16`",
        "float16": "`--onnx-float16`",
        "int8 dynamic": "int8, dynamic: fc6 to fc8",
        "int8 static": "int8, static: all layers",
    }
    rows = [
        (
            titles[row["numbers"]],
            _percent(row["accuracy"]),
            f"{row['bytes']:,}",
            f"{row['relative_time']:.2f}",
        )
        for row in result["rows"]
    ]
    facts = (
        f"Commit `{result['commit']}`, {result['device']}, ONNX Runtime {result['onnxruntime']}, "
        f"`{result['command']}`."
    )
    header = ("numbers", f"accuracy on {result['photos']} photos", "bytes", "time of a photo")
    return table(header, rows) + f"\n\n{facts}"


# Tables in hand-written pages. Each lies between two comments, see `comments`.
TABLES = {
    "README.md": {"highlights": highlights},
    "docs/export.md": {"quantization": quantization},
    "docs/robustness.md": {"faults": faults, "fuzzing": fuzzing},
}


def comments(name: str) -> tuple[str, str]:
    """The comments before and after a table in a hand-written page."""
    return f"<!-- {name}: python -m tools.benchmarks_page -->", f"<!-- end of {name} -->"


def with_tables(page: str) -> str:
    """The text of a hand-written page with its tables renewed."""
    text = (ROOT / page).read_text()
    for name, write in TABLES[page].items():
        begin, end = comments(name)
        before, rest = text.split(begin)
        text = f"{before}{begin}\n{write()}\n{end}{rest.split(end)[1]}"
    return text


def plots() -> dict[str, Any]:
    """The data of each plot, by the name of its file."""
    bars = {
        f"{results}_{mode}": [
            [f"{step_name(row)}, {peer_name(row)}", row["median_ratio"]]
            for row in load(results)["steps"]
            if row["mode"] == mode and "compile" not in row["peer"]
        ]
        for results in ("steps_without_amx", "steps")
        for mode in ("train", "infer")
    }
    runtimes = {row["net"]: row["images_per_second"] for row in load("compare_runtimes")["nets"]}
    digits = {
        f"seed {run['seed']}": [epoch["validation"][1] for epoch in run["epochs"]]
        for run in load("digits")["runs"]
    }
    return bars | {"runtimes": runtimes, "digits": digits}


def draw(name: str, data: Any) -> Any:
    """Draws a plot as a matplotlib figure."""
    import matplotlib.pyplot as plt

    height = 0.6 + 0.24 * len(data) if name.startswith("steps") else 3.2
    figure, axes = plt.subplots(figsize=(7.5, height), layout="constrained")
    if name.startswith("steps"):
        labels, ratios = zip(*reversed(data), strict=True)
        axes.barh(labels, ratios, color=[OURS if ratio >= 1 else PEER for ratio in ratios])
        axes.axvline(1, color=PEER, linewidth=1)
        axes.set_xlabel("times as fast as the peer")
    elif name == "runtimes":
        for k, (label, color) in enumerate(
            (("vgg_jax", OURS), ("onnxruntime", "#1f77b4"), ("torch", PEER))
        ):
            positions = [i + 0.27 * (k - 1) for i in range(len(data))]
            axes.bar(
                positions, [row[label] for row in data.values()], 0.25, label=label, color=color
            )
        axes.set_xticks(range(len(data)), data)
        axes.set_ylabel("images a second")
        axes.legend(frameon=False)
    else:
        for label, accuracies in data.items():
            axes.plot(range(1, len(accuracies) + 1), accuracies, marker="o", label=label)
        axes.set_xlabel("epoch")
        axes.set_ylabel("validation accuracy")
        axes.set_xticks(range(1, len(accuracies) + 1))
        axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def svg_description(data: Any) -> str:
    """The data of a plot as its SVG file holds it, for the test of stale plots."""
    return json.dumps(data)


def save_plots(plots: dict[str, Any], draw: Callable[[str, Any], Any]) -> None:
    """Writes the SVG files of a page.

    Args:
        plots: The data of each plot, by the name of its file.
        draw: Draws a plot as a matplotlib figure, from its name and data.
    """
    import matplotlib

    matplotlib.use("svg")
    # Text stays text, and the file depends on the data alone.
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "vgg_jax", "font.size": 9}
    IMAGES.mkdir(exist_ok=True)
    for name, data in plots.items():
        metadata = {"Date": None, "Creator": None, "Description": svg_description(data)}
        draw(name, data).savefig(IMAGES / f"{name}.svg", metadata=metadata)


def main() -> None:
    """Writes the page, the plots and the tables."""
    save_plots(plots(), draw)
    PAGE.write_text(page())
    for name in TABLES:
        (ROOT / name).write_text(with_tables(name))


if __name__ == "__main__":
    main()
