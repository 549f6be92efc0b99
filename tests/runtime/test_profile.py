"""A trace of some steps, as Perfetto reads it."""

import errno
import gzip
import json
import logging

import jax
import jax.numpy as jnp
import pytest

from vgg_jax import InputError
from vgg_jax.runtime.profile import StepProfile


@pytest.fixture(autouse=True)
def log_info(caplog):
    caplog.set_level(logging.INFO, "vgg_jax")


def run_steps(profile, num_steps):
    x = jnp.ones((64, 64))
    for _ in range(num_steps):
        with profile.annotate_step():
            x = x @ x / 64
        profile.count_step(x)
    profile.close()


def messages(caplog):
    return [r.getMessage() for r in caplog.records if r.name == "vgg_jax.runtime.profile"]


def traced_steps(folder):
    """The numbers of the steps in the trace, which TensorBoard and Perfetto read."""
    [session] = (folder / "plugins" / "profile").iterdir()
    assert len(list(session.glob("*.xplane.pb"))) == 1
    with gzip.open(session / "perfetto_trace.json.gz") as file:
        trace = json.load(file)
    assert "metadata" not in trace  # Perfetto does not read it
    steps = [event for event in trace["traceEvents"] if event.get("name") == "train"]
    assert all(event["ph"] == "X" and event["dur"] > 0 for event in steps)
    return sorted(int(event["args"]["step_num"]) for event in steps)


@pytest.mark.parametrize(
    ("steps", "traced", "text"),
    [((2, 4), [2, 3, 4], "3 steps, 2 to 4,"), ((6, 9), [6], "1 step, 6 to 6,")],
    ids=["whole", "training_ends_earlier"],
)
def test_trace_has_the_steps(steps, traced, text, tmp_path, caplog):
    run_steps(StepProfile(steps, tmp_path), 6)
    assert traced_steps(tmp_path) == traced
    [path] = tmp_path.glob("plugins/profile/*/perfetto_trace.json.gz")
    assert messages(caplog) == [
        f"the trace of {text} is {path}: open it at https://ui.perfetto.dev"
    ]


def test_training_ends_before_the_trace(tmp_path, caplog):
    run_steps(StepProfile((4, 6), tmp_path), 3)
    assert not list(tmp_path.iterdir())
    [message] = messages(caplog)
    assert "training ended after 3 steps, and the trace would have begun at step 4" in message
    StepProfile((4, 6), tmp_path).close()  # nothing was trained, which another message says
    assert len(messages(caplog)) == 1


def test_trace_without_a_folder_is_a_warning(tmp_path, caplog):
    (tmp_path / "tensorboard").write_text("a file")
    run_steps(StepProfile((1, 2), tmp_path / "tensorboard"), 4)
    [message] = messages(caplog)
    assert message.startswith(f"cannot write a trace to {tmp_path / 'tensorboard'} (")


def test_trace_that_cannot_be_written_is_a_warning(tmp_path, caplog, monkeypatch):
    stop_trace = jax.profiler.stop_trace

    def fail():
        stop_trace()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(jax.profiler, "stop_trace", fail)
    run_steps(StepProfile((1, 2), tmp_path), 4)
    assert messages(caplog) == [
        f"cannot write a trace to {tmp_path} ([Errno {errno.ENOSPC}] No space left on device): "
        "training goes on without one"
    ]


def test_second_trace_in_a_process_is_a_warning(tmp_path, caplog):
    """As when a program that calls `fit` traces itself."""
    with jax.profiler.trace(tmp_path / "other"):
        run_steps(StepProfile((1, 2), tmp_path), 4)
    [message] = messages(caplog)
    assert message.startswith(f"cannot write a trace to {tmp_path} (")


@pytest.mark.parametrize("steps", [(20, 10), (0, 5), (-2, 3)])
def test_steps_that_are_no_range_are_refused(steps, tmp_path):
    with pytest.raises(
        InputError, match=r"^profile is \(.*\): expected the first and the last step"
    ):
        StepProfile(steps, tmp_path)
