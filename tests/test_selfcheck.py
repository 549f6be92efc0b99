"""The self-check finds what is wrong, and only that."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vgg_jax import selfcheck
from vgg_jax.cli import main
from vgg_jax.configs.models import Conv, VGGConfig
from vgg_jax.ops.pooling import relu


@pytest.mark.slow
def test_this_machine_is_right(monkeypatch, capsys):
    one = jax.local_devices()[:1]
    monkeypatch.setattr(jax, "local_devices", lambda: one)
    assert main(["selfcheck"]) == 0
    said = capsys.readouterr().out
    assert said.count("forward, compiled") == 1
    assert "computes rightly here" in said


def test_a_wrong_operation_is_named(monkeypatch, capsys):
    """Op by op a ReLU that is right; compiled one that lets a little below zero through."""
    monkeypatch.setattr(
        selfcheck, "NET", VGGConfig(((Conv(8),),), fc=(16, 16))
    )  # less to compile, op by op
    monkeypatch.setattr(
        "vgg_jax.model.relu",
        lambda x: jnp.maximum(x, -0.5) if isinstance(x, jax.core.Tracer) else relu(x),
    )
    found = selfcheck.run_checks(jax.local_devices()[:1])
    assert {each.what for each in found if not each.passed} >= {
        "forward, compiled",
        "gradient, compiled",
    }
    assert all(
        each.passed
        for each in found
        if each.what in ("forward, op by op", "square of a product, compiled")
    )
    monkeypatch.setattr("vgg_jax.selfcheck.run_checks", lambda: found)
    assert main(["selfcheck"]) == 1
    said = capsys.readouterr().out
    assert "WRONG" in said
    assert "install another release" in said


def test_not_a_number_is_wrong():
    assert not selfcheck.CheckResult("cpu:0", "forward, compiled", float("nan")).right


def test_a_release_that_is_known_is_named(monkeypatch):
    monkeypatch.setattr(jax, "__version__", "0.10.2")
    assert "39103" in selfcheck.report([selfcheck.CheckResult("cpu:0", "forward, compiled", 1e-6)])


def test_what_is_avoided_is_named_and_no_error(monkeypatch):
    monkeypatch.setattr(jax, "__version__", "0.12.0.1")
    said = selfcheck.report([selfcheck.CheckResult("cpu:0", "forward, compiled", 1e-6)])
    assert "NaN" in said and said.endswith("bfloat16 within 3e-02")
    monkeypatch.setattr(jax, "__version__", "0.11.0")
    assert "NaN" not in selfcheck.report(
        [selfcheck.CheckResult("cpu:0", "forward, compiled", 1e-6)]
    )


def test_numpys_net_is_pytorchs():
    torch = pytest.importorskip("torch", reason="needs torch: pip install torch")
    rng = np.random.default_rng(0)
    channels = {"conv1_1": (3, 8), "conv2_1": (8, 16), "conv2_2": (16, 16)}
    params = {
        name: {"kernel": rng.normal(size=(3, 3, c, k)) / 5, "bias": rng.normal(size=k)}
        for name, (c, k) in channels.items()
    }
    params |= {
        name: {"kernel": rng.normal(size=(c, k)) / 9, "bias": rng.normal(size=k)}
        for name, c, k in (("fc6", 256, 16), ("fc7", 16, 16), ("fc8", 16, 5))
    }
    images, labels = rng.normal(size=(4, 16, 16, 3)), rng.integers(5, size=4)
    tensors = jax.tree.map(lambda x: torch.tensor(x, requires_grad=True), params)
    x = torch.from_numpy(images).permute(0, 3, 1, 2)
    for name in channels:
        x = torch.relu(
            torch.nn.functional.conv2d(
                x, tensors[name]["kernel"].permute(3, 2, 0, 1), tensors[name]["bias"], padding=1
            )
        )
        x = torch.nn.functional.max_pool2d(x, 2) if name != "conv2_1" else x
    x = x.permute(0, 2, 3, 1).flatten(1)
    for name in ("fc6", "fc7", "fc8"):
        x = x @ tensors[name]["kernel"] + tensors[name]["bias"]
        x = torch.relu(x) if name != "fc8" else x
    np.testing.assert_allclose(
        selfcheck.numpy_logits(params, images), x.detach().numpy(), rtol=1e-10
    )
    torch.nn.functional.cross_entropy(x, torch.from_numpy(labels)).backward()
    directions = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), params)
    expected = [
        float((t.grad.numpy() * d).sum())
        for t, d in zip(*map(jax.tree.leaves, (tensors, directions)), strict=True)
    ]
    np.testing.assert_allclose(
        selfcheck.numpy_slopes(params, directions, images, labels), expected, rtol=1e-5, atol=1e-7
    )
