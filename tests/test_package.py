"""What importing the package costs and starts."""

import json
import subprocess
import sys

import pytest

import vgg_jax

IMPORT = """
import json, sys, time
start = time.perf_counter()
import vgg_jax
seconds = time.perf_counter() - start
import jax
print(json.dumps({"seconds": seconds, "modules": sorted(sys.modules), "backends": sorted(jax._src.xla_bridge._backends)}))
"""


def test_import_is_light_and_starts_nothing():
    runs = [
        json.loads(
            subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, check=True).stdout
        )
        for _ in range(3)
    ]
    assert (
        min(run["seconds"] for run in runs) < 2
    )  # the best of three: other programs may hold the machine
    assert not {"tensorflow", "tensorflow_datasets", "matplotlib", "sklearn", "PIL", "tqdm"} & set(
        runs[0]["modules"]
    )
    assert runs[0]["backends"] == []


def test_without_the_extra_the_modules_work_and_training_says_what_is_missing():
    names = ("tensorflow", "tensorflow_datasets", "sklearn", "tqdm", "PIL", "optax", "orbax")
    hide = f"import sys\nfor name in {names}: sys.modules[name] = None\n"
    code = (
        hide
        + "import vgg_jax\nfrom vgg_jax.cli import main\nassert main(['summary', 'A']) == 0\nsys.exit(main(['train']))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 2
    assert "Total params: 132,863,336" in run.stdout
    assert run.stderr.count("\n") == 1
    assert "pip install 'vgg-jax[train]'" in run.stderr


def test_all_that_is_promised_is_there():
    assert set(vgg_jax.__all__) <= set(dir(vgg_jax))
    for name in vgg_jax.__all__:
        assert getattr(vgg_jax, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'vgg12'"):
        vgg_jax.vgg12  # noqa: B018
