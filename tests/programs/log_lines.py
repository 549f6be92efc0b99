"""Logs as a command does, after orbax has added its handler to the root logger."""

import logging

from vgg_jax.cli.logs import configure_logging

configure_logging()
import orbax.checkpoint  # noqa: E402, F401

configure_logging()
logger = logging.getLogger("vgg_jax.training.loop")
logger.debug("not shown")
logger.info("epoch 1")
logger.warning("cannot save")
