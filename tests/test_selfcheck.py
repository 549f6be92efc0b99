"""The self-check finds a wrong operation, and nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vgg_jax import selfcheck
from vgg_jax.cli import main
from vgg_jax.configs.models import Conv, VGGConfig
from vgg_jax.ops.pooling import relu
from vgg_jax.selfcheck import CheckResult


@pytest.mark.slow
def test_selfcheck_passes(monkeypatch, capsys):
    device = jax.local_devices()[:1]
    monkeypatch.setattr(jax, "local_devices", lambda: device)
    assert main(["selfcheck"]) == 0
    out = capsys.readouterr().out
    assert out.count("forward, compiled") == 1
    assert "computes correctly on these devices" in out


@pytest.mark.slow
def test_selfcheck_names_wrong_operation(monkeypatch, capsys):
    """The ReLU is right op by op. Compiled, it lets a little below zero through."""
    small_net = VGGConfig(((Conv(8),),), fc=(16, 16))  # compiles faster, op by op
    monkeypatch.setattr(selfcheck, "NET", small_net)
    monkeypatch.setattr(
        "vgg_jax.model.relu",
        lambda x: jnp.maximum(x, -0.5) if isinstance(x, jax.core.Tracer) else relu(x),
    )
    results = selfcheck.run_checks(jax.local_devices()[:1])
    failed = {result.name for result in results if not result.ok}
    assert failed >= {"forward, compiled", "gradient, compiled"}
    assert not failed & {"forward, op by op", "square of a product, compiled"}
    assert len(results) == 8
    monkeypatch.setattr(selfcheck, "run_checks", lambda: results)
    assert main(["selfcheck"]) == 1
    out = capsys.readouterr().out
    assert "WRONG" in out
    assert "install another release" in out


def test_check_result_with_nan_fails():
    assert not CheckResult("cpu:0", "forward, compiled", float("nan")).ok


def test_report_names_broken_release(monkeypatch):
    monkeypatch.setattr(jax, "__version__", "0.10.2")
    assert "39103" in selfcheck.report([CheckResult("cpu:0", "forward, compiled", 1e-6)])


def test_report_names_worked_around_fault(monkeypatch):
    """Such a fault is no failure."""
    results = [CheckResult("cpu:0", "forward, compiled", 1e-6)]
    monkeypatch.setattr(jax, "__version__", "0.12.0.1")
    text = selfcheck.report(results)
    assert "NaN" in text
    assert text.endswith("bfloat16 within 3e-02")
    monkeypatch.setattr(jax, "__version__", "0.11.0")
    assert "NaN" not in selfcheck.report(results)


def test_numpy_net_matches_pytorch():
    torch = pytest.importorskip("torch", reason="needs torch: pip install torch")
    rng = np.random.default_rng(0)
    convolutions = {"conv1_1": (3, 8), "conv2_1": (8, 16), "conv2_2": (16, 16)}
    params = {
        name: {"kernel": rng.normal(size=(3, 3, c, k)) / 5, "bias": rng.normal(size=k)}
        for name, (c, k) in convolutions.items()
    }
    params |= {
        name: {"kernel": rng.normal(size=(c, k)) / 9, "bias": rng.normal(size=k)}
        for name, c, k in (("fc6", 256, 16), ("fc7", 16, 16), ("fc8", 16, 5))
    }
    images, labels = rng.normal(size=(4, 16, 16, 3)), rng.integers(5, size=4)

    tensors = jax.tree.map(lambda x: torch.tensor(x, requires_grad=True), params)
    x = torch.from_numpy(images).permute(0, 3, 1, 2)
    for name in convolutions:
        kernel = tensors[name]["kernel"].permute(3, 2, 0, 1)
        x = torch.nn.functional.conv2d(x, kernel, tensors[name]["bias"], padding=1)
        x = torch.relu(x)
        x = torch.nn.functional.max_pool2d(x, 2) if name != "conv2_1" else x
    x = x.permute(0, 2, 3, 1).flatten(1)
    for name in ("fc6", "fc7", "fc8"):
        x = x @ tensors[name]["kernel"] + tensors[name]["bias"]
        x = torch.relu(x) if name != "fc8" else x
    logits = selfcheck.numpy_logits(params, images)
    np.testing.assert_allclose(logits, x.detach().numpy(), rtol=1e-10)

    torch.nn.functional.cross_entropy(x, torch.from_numpy(labels)).backward()
    directions = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), params)
    pairs = zip(*map(jax.tree.leaves, (tensors, directions)), strict=True)
    expected = [float((t.grad.numpy() * d).sum()) for t, d in pairs]
    derivatives = selfcheck.numpy_directional_derivatives(params, directions, images, labels)
    np.testing.assert_allclose(derivatives, expected, rtol=1e-5, atol=1e-7)
