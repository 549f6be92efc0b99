"""A file with the state of a training after an epoch, for `scan_training.train`."""

import dataclasses
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vgg_jax.errors import InputError
from vgg_jax.runs.files import atomic_write
from vgg_jax.training.step import TrainState


def save_state(
    path: Path, state: TrainState, epochs: list[dict[str, Any]], losses: list[float]
) -> None:
    """Writes a state and its curves. The earlier file is replaced once the new one is whole."""
    state = dataclasses.replace(state, key=jax.random.key_data(state.key))
    leaves = jax.device_get(jax.tree.leaves(state))
    file = io.BytesIO()
    np.savez(file, *leaves, curves=np.array(json.dumps([epochs, losses])))
    atomic_write(path, file.getvalue())


def load_state(
    path: Path, state: TrainState
) -> tuple[TrainState, list[dict[str, Any]], list[float]]:
    """Reads what `save_state` wrote.

    Args:
        path: The file.
        state: A state of the same net and optimizer. Only its structure is used.

    Returns:
        The state, and the epochs and losses of its curves.

    Raises:
        InputError: The file is damaged.
    """
    old_leaves, structure = jax.tree.flatten(state)
    try:
        with path.open("rb") as opened, np.load(opened) as file:
            epochs, losses = json.loads(str(file["curves"]))
            leaves = [jnp.asarray(file[f"arr_{i}"]) for i in range(len(old_leaves))]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(
            f"{path} is damaged: expected the state after an epoch; delete it to train this net "
            "from its first epoch"
        ) from error
    state = jax.tree.unflatten(structure, leaves)
    return dataclasses.replace(state, key=jax.random.wrap_key_data(state.key)), epochs, losses
