"""Every command and every Python program of README and docs runs, pasted one after the other."""

import itertools
import json
import os
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import sklearn.datasets
from PIL import Image

from tests.helpers.pages import PAGES, blocks, commands
from tests.helpers.photos import make_photo_folder
from tests.helpers.tiny import init, narrow
from tests.helpers.tiny_data import Cifar10
from vgg_jax import CONFIGS, IMAGENET, VGG, cli
from vgg_jax.weights import Weights, save
from vgg_jax.weights.layouts import Preprocessing

pytestmark = pytest.mark.slow

# For the narrow net D, whose layers have fewer channels than the published weights.
LPIPS_WEIGHTS = {
    f"relu{i}_{2 if i < 3 else 3}": np.full(4 * i, 0.1, np.float32) for i in range(1, 6)
}
SMALL_RUN = "--image-size 32 --scale 32 36 --fc 12 8 --batch-size 32 --epochs 1"
CLASS_FOLDERS = {"blue": "class 0", "red": "class 1"}
# Appended to a command, so that it ends soon.
FINE_TUNED = "--net D --init-from vgg16.safetensors --freeze conv"
SMALLER = {
    "vgg-jax train": f"{SMALL_RUN} --no-compilation-cache",
    # The warm-up must end before the run.
    "vgg-jax train PHOTOS --net D --optimizer adamw": "--epochs 2",
    # Cached features need one scale.
    f"vgg-jax train PHOTOS {FINE_TUNED} --cache-features": "--scale 32",
    "vgg-jax evaluate": "--no-compilation-cache",
    "vgg-jax predict": "--no-compilation-cache",
    "vgg-jax report": "--no-compilation-cache",
    "vgg-jax explain": "--no-compilation-cache",
    "vgg-jax import": "--image-size 32",
    "python -m experiments.examples.style_transfer": "--size 64 --steps 2",
}
# The tests have two devices and no object store; tests/test_paths.py has one.
REPLACED = {
    "data=4,model=2": "data=1,model=2",
    "gs://BUCKET/photos": "PHOTOS",
    "gs://BUCKET/runs/one": "runs/one",
    "HOST:8476": "localhost:8476",
}
# The runs that some pages assume.
RUNS = {"runs/digits-A": "", "runs/PHOTOS-D": "PHOTOS --net D", "runs/PHOTOS-A": "PHOTOS --net A"}
ASSUMED = {
    "evaluation.md": RUNS,
    "export.md": RUNS,
    "reports.md": RUNS,
    "weights.md": ["runs/digits-A"],
}
# .ci/run installs the package and calls pytest. tests/integration/test_wheel.py installs a wheel.
# tests/integration/test_browser.py installs onnxruntime-web.
RUN_ELSEWHERE = ("pip", "pytest", "source", "python -m venv", "npm")
# Packages that one page needs besides, and .ci/run installs for it.
MORE_PACKAGES = {"export.md": ("ai_edge_litert", "openvino")}


@pytest.fixture(scope="module")
def narrow_nets():
    with pytest.MonkeyPatch.context() as patch:
        for name in ("A", "A-LRN", "B", "C", "D", "E"):
            patch.setitem(CONFIGS, name, narrow(name))
        # torchvision's nets are as narrow, and read as small images.
        patch.setattr("vgg_jax.export.writer._PYTORCH_HEAD", (1, *narrow("D").fc))
        yield


@pytest.fixture(scope="module")
def workplace(narrow_nets, tmp_path_factory):
    """A folder with what the pages assume: photos, weights, a data set and runs.

    There are 200 digits only.
    """
    torch = pytest.importorskip("torch", reason="needs torch: pip install torch")
    folder = tmp_path_factory.mktemp("workplace")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("vgg_jax.perceptual._published_linear_weights", lambda: LPIPS_WEIGHTS)
        digits = sklearn.datasets.load_digits()
        digits.images, digits.target = digits.images[:200], digits.target[:200]
        patch.setattr("sklearn.datasets.load_digits", lambda: digits)
        split = {"x": digits.images.astype(np.uint8), "y": digits.target}
        names = itertools.product(split, ("train", "test"))
        np.savez("mnist.npz", **{f"{name}_{part}": split[name] for name, part in names})
        make_photo_folder(Path("PHOTOS"))
        imagenet = make_photo_folder(Path("IMAGENET"))
        for split, (label, name) in itertools.product(("train", "val"), CLASS_FOLDERS.items()):
            Path(imagenet, split, label).rename(Path(imagenet, split, name))
        pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
        for name in ("photo.jpg", "painting.jpg"):
            Image.fromarray(pixels).save(name)
        Cifar10(data_dir="DIR").download_and_prepare()
        net = VGG(CONFIGS["D"], 1000, image_size=32)
        preprocessing = Preprocessing(IMAGENET.mean_rgb)
        classes = tuple(f"class {i}" for i in range(1000))
        for name, model in (("vgg16", net), ("vgg16_bn", net.clone(batch_norm=True))):
            variables = init(model)
            arrays = variables["params"], variables.get("batch_stats", {})
            save(
                f"{name}.safetensors",
                Weights("D", "vgg_jax", model, *arrays, True, preprocessing, classes),
            )
        run_command(["vgg-jax", "export", "vgg16.safetensors", "t.safetensors", "--layout", "timm"])
        from safetensors.torch import load_file

        torch.save(load_file("t.safetensors"), "vgg16.pth")
        for run in RUNS:
            run_command(["vgg-jax", "train", *shlex.split(RUNS[run]), "--workdir", run])
        yield folder


def run_command(words):
    """Runs a command in this process."""
    words = [REPLACED.get(word, word) for word in words]
    line = shlex.join(words)
    if line.startswith(RUN_ELSEWHERE):
        return
    for start, flags in SMALLER.items():
        if line.startswith(start):
            words = words + shlex.split(flags)
    if words[0] == "vgg-jax":
        code = cli.main(words[1:] or ["--version"])
    else:
        assert words[:2] == ["python", "-m"], line
        code = run_module(words[2], words[3:])
    # A finished run is stopped by nothing, and `verify-data` finds no bad photo.
    assert code == 0, line


def run_module(name, arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *arguments])
        try:
            runpy.run_module(name, run_name="__main__")
        except SystemExit as error:
            return error.code or 0
    return 0


def run_processes(lines):
    """Runs commands with environment variables at the same time, in a run of their own."""
    workdir = f"runs/of-{len(lines)}-processes"
    assert not Path(workdir).exists()
    processes = []
    for words in lines:
        words = [words[0].replace("HOST:8476", "localhost:8476"), *words[1:]]
        settings = dict(word.split("=", 1) for word in words if word.startswith("JAX_"))
        command = [word for word in words if not word.startswith("JAX_")]
        assert command[0] == "vgg-jax"
        flags = shlex.split(f"--net A {SMALL_RUN} --workdir {workdir} --no-compilation-cache")
        arguments = [sys.executable, "-m", "vgg_jax", *command[1:], *flags]
        processes.append(subprocess.Popen(arguments, env=os.environ | settings))
    assert {process.wait(timeout=300) for process in processes} == {0}


def assert_changed_layers(before, after, kinds):
    """Only layers whose names start with one of `kinds` differ."""
    for name, layer in before.items():
        is_equal = all(np.array_equal(layer[leaf], after[name][leaf]) for leaf in layer)
        assert is_equal != name.startswith(kinds), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_page_runs(page, workplace, tmp_path, monkeypatch):
    for package in MORE_PACKAGES.get(page.name, ()):
        name = package.replace("_", "-")
        pytest.importorskip(package, reason=f"needs {name}: pip install {name}")
    shutil.copytree(workplace, tmp_path, dirs_exist_ok=True)
    for run in RUNS:
        if run not in ASSUMED.get(page.name, ()):
            shutil.rmtree(tmp_path / run)
    if page.name == "weights.md":  # it makes the file
        (tmp_path / "vgg16.safetensors").unlink()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(PAGES[0].parent)
    names = {"__name__": "__main__"}
    with jax.numpy_rank_promotion("allow"):  # jax's default, which users have
        for block in blocks(page):
            if block.language == "bash":
                lines = commands(block.text)
                if lines[0][0].startswith("JAX_"):
                    run_processes(lines)
                    continue
                for words in lines:
                    run_command(words)
            elif block.language == "python":
                exec(compile(block.text, page.name, "exec"), names)
    if page.name == "README.md":
        assert names["logits"].shape == (1, 10)
        assert names["scores"].shape == (1, 2, 3, 10)
    if page.name == "jax.md":
        assert names["scores"].shape == (1, 2, 4, 1000)
        assert names["maps"]["pool5"].shape[1:3] == (9, 9)
    if page.name == "recipes.md":
        np.testing.assert_allclose(np.diag(names["similarity"]), np.ones(4), rtol=1e-5)
        assert names["distance"].shape == (1,)
        assert names["distance_map"].shape == (1, 32, 32)
        assert names["heat_maps"].shape == (4, 32, 32)
        assert_changed_layers(names["new_variables"]["params"], names["params"], ("conv", "fc"))
        assert_changed_layers(names["params"], names["head_params"], ("fc",))
        jax.tree.map(np.testing.assert_array_equal, names["restored"], names["state"])
        np.testing.assert_allclose(names["posteriors"].sum(1), np.ones(8), rtol=1e-5)
        assert np.isfinite(names["loss"])
    if page.name == "evaluation.md":
        assert names["posteriors"].shape == (2, 1000)
        np.testing.assert_allclose(names["posteriors"].sum(1), [1, 1], atol=1e-5)
        assert json.loads(Path("D/evaluation.json").read_text())["count"] == 7
