"""Parts of runs that tests compare."""

import jax
import numpy as np

from vgg_jax import TrainConfig

# The values of a record that depend on the clock.
TIME_FIELDS = (
    *("time", "seconds", "images_per_second", "input_wait_seconds", "validation_seconds"),
)


def make_config(data, **changes):
    """Three epochs of the net "shallow", with all that is random."""
    values = {
        "data": data,
        "net": "shallow",
        "fc": (24, 16),
        "batch_norm": True,
        "image_size": 16,
        "scale": (18, 22),
        "batch_size": 8,
        "epochs": 3,
        "learning_rate": 1e-2,
        "schedule": "step",
        "drop_epochs": (1,),
    }
    return TrainConfig(**values | changes)


def without_times(history):
    """The records of a history without the values that depend on the clock."""
    return [
        {name: value for name, value in record.items() if name not in TIME_FIELDS}
        for record in history
    ]


def load_last_arrays(workdir):
    """All arrays of a run's last checkpoint, but the random key."""
    import orbax.checkpoint as ocp

    with ocp.CheckpointManager(workdir / "last") as manager:
        args = ocp.args.Composite(arrays=ocp.args.StandardRestore())
        arrays = manager.restore(manager.latest_step(), args=args).arrays
    return {name: jax.tree.map(np.asarray, leaf) for name, leaf in arrays.items() if name != "key"}
