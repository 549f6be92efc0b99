"""Weights of VGGs: read from runs and files of several libraries, written to files."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vgg_jax.weights.reader import load, load_file, read
    from vgg_jax.weights.weights import Weights, from_loaded
    from vgg_jax.weights.writer import save

__all__ = ["Weights", "from_loaded", "load", "load_file", "read", "save"]

# Imported on first use: `vgg-jax weights` and `vgg-jax fetch` should not wait for jax.
_LAZY = {
    "Weights": "weights",
    "from_loaded": "weights",
    "load": "reader",
    "load_file": "reader",
    "read": "reader",
    "save": "writer",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_LAZY[name]}")
    globals()[name] = getattr(module, name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
