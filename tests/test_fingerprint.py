"""Results equal those of release 0.1.0, whose files are in tests/reference."""

import shutil
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest

import vgg_jax
from tools.fingerprint import compute, digest
from vgg_jax.export.verify import verify
from vgg_jax.runs.metadata import load_run
from vgg_jax.training.loop import fit

pytestmark = pytest.mark.usefixtures("small_nets")

REFERENCE = Path(__file__).parent / "reference"
NETS = {"deep with batch norm": {"net": "deep", "batch_norm": True, "size": 12}}


def sample(tree):
    """A few values of each leaf, and each leaf's norm."""
    leaves = [np.asarray(leaf, np.float32) for leaf in jax.tree.leaves(tree)]
    norms = [np.linalg.norm(np.float64(leaf)) for leaf in leaves]
    return np.concatenate([*(leaf.ravel()[:8] for leaf in leaves), np.float32(norms)])


def images():
    mean = np.array(vgg_jax.IMAGENET.mean_rgb, np.float32)
    return np.random.default_rng(5).integers(0, 256, (2, 16, 16, 3)).astype(np.float32) - mean


@pytest.fixture
def old_run(tmp_path):
    """A run that release 0.1.0 began, and that was stopped in its second of three epochs."""
    with zipfile.ZipFile(REFERENCE / "run-0.1.0.zip") as file:
        file.extractall(tmp_path)
    return tmp_path / "run"


@pytest.mark.slow
def test_results_equal_release_0_1_0(monkeypatch):
    monkeypatch.delenv("VGG_JAX_DATA", raising=False)
    with np.load(REFERENCE / "values-0.1.0.npz") as expected, jax.numpy_rank_promotion("allow"):
        for name, tree in compute(NETS, "deep", steps=4, size=16, fc=16, count=4):
            values = sample(tree)
            # In bfloat16 two CPUs, or two releases of jax, differ by rounding.
            tolerance = 3e-2 if "bfloat16" in name else 1e-5
            assert np.abs(values - expected[name]).max() <= tolerance * np.abs(values).max(), name


def test_digest_sees_one_changed_bit():
    tree = {"a": np.zeros(3, np.float32), "b": [np.arange(4)]}
    changed = {"a": np.float32([0, 0, -0.0]), "b": [np.arange(4)]}
    assert digest(tree) == digest(jax.tree.map(np.copy, tree)) != digest(changed)
    assert digest(tree) != digest({"a": tree["a"], "c": tree["b"]})


@pytest.mark.slow
def test_fit_resumes_run_of_release_0_1_0(old_run):
    history = fit(load_run(old_run).config, old_run).history
    metrics = [
        [record[split][name] for split in ("train", "validation") for name in ("loss", "accuracy")]
        for record in history
    ]
    with np.load(REFERENCE / "values-0.1.0.npz") as expected:
        # The reference ran on one device, and the tests on two: they round in another order.
        np.testing.assert_allclose(metrics, expected["run"], rtol=5e-3)


def test_load_reads_run_and_weights_of_release_0_1_0(old_run):
    with np.load(REFERENCE / "values-0.1.0.npz") as expected:
        for path in (old_run, REFERENCE / "weights-0.1.0.safetensors"):
            model, variables, metadata = vgg_jax.load(path)
            logits = model.apply(variables, images())
            np.testing.assert_allclose(logits, expected["logits"], rtol=1e-4, atol=1e-5)
            assert metadata["classes"] == tuple("0123456789")


def test_verify_accepts_export_of_release_0_1_0(tmp_path):
    pytest.importorskip("onnxruntime", reason="needs onnxruntime: pip install '.[onnx]'")
    path = shutil.copy(REFERENCE / "net-0.1.0.onnx", tmp_path / "net.onnx")
    assert verify(path).difference < 1e-5
