"""The cost of importing the package, and its public names."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import vgg_jax

ROOT = Path(__file__).parents[1]


def run_program(name):
    command = [sys.executable, "-m", f"tests.programs.{name}"]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.integration
def test_import_is_light_and_starts_nothing():
    results = [run_program("import_cost") for _ in range(3)]
    assert all(result.returncode == 0 for result in results), results[0].stderr
    reports = [json.loads(result.stdout) for result in results]
    # The best of three counts, since other programs may use the machine.
    assert min(report["seconds"] for report in reports) < 2
    heavy = {"tensorflow", "tensorflow_datasets", "matplotlib", "sklearn", "PIL", "tqdm"}
    assert not heavy & set(reports[0]["modules"])
    assert reports[0]["backends"] == []


@pytest.mark.integration
def test_help_needs_no_jax():
    """Importing jax alone takes longer than `vgg-jax --help`."""
    result = run_program("light_imports")
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("\n0 []\n")


@pytest.mark.integration
def test_train_names_missing_extra():
    """Nets, `preprocess`, `predict` and `help` work without the packages of vgg-jax[train]."""
    result = run_program("without_train_extra")
    assert result.returncode == 2, result.stderr
    hint = "run pip install -e '.[train]' in a clone of vgg_jax"
    dense, both, fit, fit_without_optax, evaluate, *_ = result.stdout.splitlines()
    assert "photo.jpg: " in dense and "photo.jpg: " in both
    assert fit == f"reading and writing runs needs orbax-checkpoint: {hint}"
    assert fit_without_optax.startswith("vgg_jax.fit cannot be imported (import of optax")
    assert evaluate.startswith("the data pipeline needs TensorFlow")
    assert fit_without_optax.endswith(hint) and evaluate.endswith(hint)
    assert "Total params: 132,863,336" in result.stdout
    assert result.stderr.count("\n") == 1
    assert "run pip install -e '.[train]' in a clone of vgg_jax" in result.stderr


@pytest.mark.integration
def test_editable_install_works_from_the_folder_above(tmp_path):
    """A clone is called vgg_jax, as the package, and Python finds it in the current folder."""
    clone, packages = tmp_path / "vgg_jax", tmp_path / "site-packages"
    without_caches = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "vgg_jax", clone / "vgg_jax", ignore=without_caches)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, clone)
    backend = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["build-backend"]
    # What `pip install -e` does: build a wheel in the clone, and unpack it.
    build = f"import {backend} as backend; backend.build_editable('..')"
    subprocess.run([sys.executable, "-c", build], cwd=clone, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(packages)
    program = f"import site; site.addsitedir({str(packages)!r}); import vgg_jax; print(vgg_jax)"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-S", "-c", program]  # -S: no other installation is found
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert str(clone / "vgg_jax" / "__init__.py") in result.stdout, result.stderr


def test_public_names_exist():
    assert set(vgg_jax.__all__) <= set(dir(vgg_jax))
    for name in vgg_jax.__all__:
        assert getattr(vgg_jax, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'vgg12'"):
        vgg_jax.vgg12  # noqa: B018


@pytest.mark.slow
def test_data_does_not_import_keras():
    """TensorFlow would, which takes a second. It can still be used."""
    program = (
        "import sys, vgg_jax.data; assert 'keras' not in sys.modules;"
        "import tensorflow as tf; from tensorflow.keras.layers import Dense;"
        "assert tf.keras.optimizers.Adam and tf.optimizers.SGD; import keras.src.optimizers as k;"
        "assert k.Adam; print(Dense(2)(tf.zeros((1, 3))).shape)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "(1, 2)\n"), result.stderr
