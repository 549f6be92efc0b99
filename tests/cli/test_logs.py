"""The handler that prints the package's log messages."""

import logging
import subprocess
import sys
import warnings

import pytest

from vgg_jax.cli.logs import configure_logging, log_python_warnings

logger = logging.getLogger("vgg_jax.training.loop")


def test_configure_logging_prints_once(capsys, caplog):
    configure_logging()
    configure_logging()
    logger.debug("not shown")
    logger.info("epoch 1")
    logger.warning("cannot save")
    out, err = capsys.readouterr()
    assert out == "epoch 1\n"
    assert err == "warning: cannot save\n"
    assert caplog.messages == ["epoch 1", "cannot save"]


def test_configure_logging_restores_level(capsys):
    """A second command in one process prints its lines, whatever happened to the logger before."""
    configure_logging()
    logging.getLogger("vgg_jax").setLevel(logging.NOTSET)
    configure_logging()
    logger.info("epoch 1")
    assert capsys.readouterr().out == "epoch 1\n"


def test_notes_on_data_are_printed_once(capsys):
    """A command opens its data for training, for validation and for class weights."""
    data_logger = logging.getLogger("vgg_jax.data.folder")
    configure_logging()
    for _ in range(2):
        data_logger.info("ignored: masks")
        logger.info("saved")
    configure_logging()  # the next command
    data_logger.info("ignored: masks")
    assert capsys.readouterr().out == "ignored: masks\nsaved\nsaved\nignored: masks\n"


def test_python_warnings_are_one_line(capsys):
    configure_logging()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        log_python_warnings()
        warnings.warn("two\n  lines", stacklevel=1)
    assert capsys.readouterr().err == "warning: two lines\n"


@pytest.mark.integration
def test_configure_logging_with_orbax():
    """The root handler that orbax adds prints nothing a second time."""
    program = [sys.executable, "-m", "tests.programs.log_lines"]
    result = subprocess.run(program, capture_output=True, text=True, check=True)
    assert result.stdout == "epoch 1\n"
    assert result.stderr.count("cannot save") == 1
    assert "warning: cannot save\n" in result.stderr
    assert "epoch 1" not in result.stderr
