"""The versions and the devices that a run uses."""

import platform
from importlib import metadata

import jax

from vgg_jax import __version__

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "tensorflow-cpu")


def describe_environment() -> dict[str, str]:
    """Names the versions and the devices of this process.

    Returns:
        Text by name: "vgg_jax", "python", the installed packages that a run depends on, "system"
        and "devices", such as "8 x NVIDIA H200".
    """
    versions = {"vgg_jax": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # as TensorFlow, if the data are arrays
            continue
    devices = jax.devices()
    return versions | {
        "system": f"{platform.system()} {platform.machine()}",
        "devices": f"{len(devices)} x {devices[0].device_kind}",
    }
