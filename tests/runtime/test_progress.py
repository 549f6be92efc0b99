"""Progress as a bar on a terminal, and as lines of a log."""

import io
import logging
import sys

import pytest

from vgg_jax.runtime import progress
from vgg_jax.runtime.progress import (
    ERASE_LINE,
    ProgressBar,
    RunTimer,
    format_duration,
    run_seconds_left,
    waiting_line,
)


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


@pytest.mark.parametrize(
    ("epochs_left", "done", "elapsed", "epoch_seconds", "training_seconds", "expected"),
    [
        (10, 0.0, 0, None, None, None),
        (10, 0.5, 30, None, 60, 9.5 * 60),
        (1, 1.0, 80, None, 60, 0),  # in the validation of the last epoch
        (10, 0.5, 30, 100, 60, 9 * 100 + 70),  # a whole epoch counts more
        (10, 0.0, 0, 100, None, 1000),
        (2, 1.0, 130, 100, 60, 100),  # this epoch takes longer
        (1, 1.0, 130, 100, 60, 0),
    ],
)
def test_run_seconds_left(epochs_left, done, elapsed, epoch_seconds, training_seconds, expected):
    seconds = run_seconds_left(
        epochs_left=epochs_left,
        done=done,
        elapsed=elapsed,
        epoch_seconds=epoch_seconds,
        training_seconds=training_seconds,
    )
    assert seconds == expected


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min"),
        (300, "5 min"),
        (3569, "59 min"),
        (3590, "1 h 0 min"),
        (7500, "2 h 5 min"),
        (86_300, "23 h 58 min"),
        (86_380, "1 d 0 h"),
        (273_600, "3 d 4 h"),
    ],
)
def test_format_duration(seconds, text):
    assert format_duration(seconds) == text


def test_run_timer_prefers_whole_epochs(clock):
    """An epoch of ten steps, which take 10 s and the first of them 70 s; validation takes 20 s."""
    timer = RunTimer(4, may_end_early=False)
    notes = []
    for epoch in (1, 2):
        timer.start_epoch(epoch, 0.0)
        for step in range(1, 11):
            clock[0] += 70 if (epoch, step) == (1, 1) else 10
            timer.update(step / 10)
            notes.append(timer.note())
        clock[0] += 20
        timer.finish_epoch()
    # The first step compiles, and does not count. Ten steps take 100 s, and an epoch 180 s.
    assert notes[:3] == ["", "run: 6 min left", "run: 6 min left"]
    assert notes[9] == "run: 5 min left"
    assert notes[10] == "run: 9 min left"  # 3 epochs of 180 s
    timer.start_epoch(3, 0.0)
    assert timer.note() == "run: 4 min left"  # 2 epochs of 120 s


def test_run_timer_of_resumed_epoch(clock):
    """Nine tenths were done before, so that the epoch measures no whole one."""
    timer = RunTimer(3, may_end_early=True)
    timer.start_epoch(2, 0.9)
    assert timer.note() == ""
    for step in range(1, 3):
        clock[0] += 3
        timer.update(0.9 + step / 20)
    assert timer.note() == "run: at most 1 min left"  # one epoch of 60 s
    timer.finish_epoch()
    timer.start_epoch(3, 0.0)
    assert timer.note() == ""


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_waiting_line_is_erased(monkeypatch):
    monkeypatch.setattr("sys.stderr", Terminal())
    with pytest.raises(KeyError), waiting_line("compiling the network"):
        assert sys.stderr.getvalue() == "compiling the network …"
        raise KeyError
    assert sys.stderr.getvalue().endswith(f" …{ERASE_LINE}")


def test_quiet_process_shows_no_waiting_line(monkeypatch):
    monkeypatch.setattr("sys.stderr", Terminal())
    with waiting_line("compiling the network", quiet=True):
        pass
    assert sys.stderr.getvalue() == ""


def test_waiting_line_is_for_terminals_only(capsys):
    with waiting_line("compiling the network"):
        pass
    assert capsys.readouterr().err == ""
