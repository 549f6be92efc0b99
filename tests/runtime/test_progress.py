"""Progress as a bar on a terminal, and as lines of a log."""

import io
import logging
import sys

import pytest

from vgg_jax.runtime import progress
from vgg_jax.runtime.progress import ProgressBar


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test moves."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_log_has_a_line_each_minute(clock, caplog):
    caplog.set_level(logging.INFO, "vgg_jax")
    with ProgressBar("epoch 3", 50_000, initial=10_000) as bar:
        for _ in range(40):
            clock[0] += 10
            bar.update(100, "loss 1.234")
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 400 // 60
    assert lines[0] == (
        "epoch 3: 10,600 of 50,000 images (21%), loss 1.234, 10.0 images/s, 66 min left"
    )


def test_short_or_quiet_loops_log_nothing(clock, caplog):
    caplog.set_level(logging.INFO, "vgg_jax")
    with ProgressBar("epoch 1", 100) as bar, ProgressBar("epoch 1", 100, quiet=True) as quiet:
        bar.update(50)
        clock[0] += 59
        bar.update(50)
        clock[0] += 100
        quiet.update(100)
    assert not caplog.records


def test_terminal_has_a_bar_and_no_lines(clock, caplog, monkeypatch):
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(progress, "BAR_DELAY", 0)
    caplog.set_level(logging.INFO, "vgg_jax")
    with ProgressBar("validation", 100) as bar:
        clock[0] += 100
        bar.update(50, "loss 1.234")
    assert "validation" in terminal.getvalue()
    assert not caplog.records
