"""The predicted memory of a training step."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from vgg_jax import TrainConfig, summary
from vgg_jax.training import memory_estimate
from vgg_jax.training.memory_estimate import (
    XLA_RUNTIME_BYTES,
    describe_remedy,
    estimate_step_memory,
    largest_microbatch,
)

CONFIG = TrainConfig(image_size=32, scale=(32,), batch_size=8, learning_rate=1e-3)
RUNTIME_BYTES = XLA_RUNTIME_BYTES if jax.default_backend() == "cpu" else 0
IS_LINUX = Path("/proc/self/clear_refs").exists()


@pytest.mark.slow
def test_estimate_counts_state_and_activations():
    """A step holds the state, the gradients and conv1_1's output; micro-batches save the last."""
    config = dataclasses.replace(
        CONFIG, net="A", fc=(16, 16), image_size=64, scale=(64,), batch_size=128
    )
    whole = estimate_step_memory(config, 5)
    micro = estimate_step_memory(dataclasses.replace(config, microbatch=8), 5)
    num_params = summary.totals(summary.summarize(config.vgg, 5, image_size=64))["params"]
    # The state also holds the learning rate and a count of steps.
    assert whole["state"] == micro["state"] == pytest.approx(2 * 4 * num_params, abs=100)
    adamw = estimate_step_memory(dataclasses.replace(config, optimizer="adamw"), 5)
    assert adamw["state"] == pytest.approx(3 * 4 * num_params, abs=100)
    assert adamw["total"] - whole["total"] > 3.5 * num_params
    conv1_1_bytes = 128 * 64 * 64 * 64 * 4
    assert whole["total"] > whole["state"] + 4 * num_params + conv1_1_bytes
    assert whole["total"] - micro["total"] > conv1_1_bytes


@pytest.mark.slow
@pytest.mark.skipif(
    jax.default_backend() != "cpu" or not IS_LINUX, reason="measured on a CPU under Linux"
)
def test_estimate_equals_measured_memory():
    """XLA's runtime takes the largest share of this small step."""
    flags = ["--net", "A", "--image-size", "32", "--batch", "8"]
    command = [sys.executable, "-m", "experiments.benchmarks.check_memory", *flags]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(process.stdout)["ratio"] == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize(
    ("free", "num_devices", "expected"),
    [(1000, 1, 32), (164, 1, 32), (163, 1, 16), (105, 1, 2), (104, 1, None), (120, 2, 16)],
)
def test_largest_microbatch(free, num_devices, expected, monkeypatch):
    """A step takes 100 bytes, and 2 more for each image that a device holds at once, or 5."""

    def estimate(config, num_classes):
        assert config.batch_size == 64 // num_devices
        return {"total": 100 + max(2 * config.microbatch, 5)}

    monkeypatch.setattr(memory_estimate, "estimate_step_memory", estimate)
    config = dataclasses.replace(CONFIG, batch_size=64, microbatch=None)
    assert largest_microbatch(config, 5, num_devices, free) == expected
    remedy = describe_remedy(config, 5, num_devices, free)
    assert remedy.startswith(f"--microbatch {expected} fits" if expected else "no --microbatch")


def test_estimate_of_a_cosine_schedule():
    """It compiles, although the number of steps is unknown, and the state counts them."""
    config = dataclasses.replace(CONFIG, net="A", fc=(16, 16), schedule="cosine")
    cosine, plateau = (
        estimate_step_memory(changed, 5)["state"]
        for changed in (config, dataclasses.replace(config, schedule="plateau"))
    )
    assert cosine == plateau + 4


def test_remedy_of_adamw_is_sgd(monkeypatch):
    monkeypatch.setattr(memory_estimate, "estimate_step_memory", lambda *_: {"total": 9})
    remedies = [
        describe_remedy(dataclasses.replace(CONFIG, optimizer=optimizer), 5, 1, 8)
        for optimizer in ("sgd", "adamw")
    ]
    assert ["--optimizer sgd" in remedy for remedy in remedies] == [False, True]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_remedy_does_not_name_the_dtype_of_the_run(dtype, monkeypatch):
    monkeypatch.setattr(memory_estimate, "estimate_step_memory", lambda *_: {"total": 9})
    remedy = describe_remedy(dataclasses.replace(CONFIG, dtype=dtype), 5, 1, 8)
    assert remedy.startswith("no --microbatch fits: pass a smaller --batch-size than")
    assert ("--dtype bfloat16" in remedy) == (dtype == "float32")


def test_largest_microbatch_is_smaller_than_the_runs(monkeypatch):
    monkeypatch.setattr(memory_estimate, "estimate_step_memory", lambda *_: {"total": 0})
    config = dataclasses.replace(CONFIG, batch_size=64, microbatch=16)
    assert largest_microbatch(config, 5, 1, 0) == 8


@pytest.mark.slow
@pytest.mark.usefixtures("small_nets")
def test_estimate_counts_initialisation():
    """Drawing fc6, nearly all of this net's parameters, takes more memory than a step."""
    config = dataclasses.replace(
        CONFIG, net="shallow", fc=(4096, 16), image_size=128, scale=(128,), batch_size=1
    )
    memory = estimate_step_memory(config, 5)
    # A step alone would take 1.5 times the state.
    assert memory["total"] - RUNTIME_BYTES == pytest.approx(2 * memory["state"], rel=0.1)
