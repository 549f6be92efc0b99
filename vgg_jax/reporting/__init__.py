"""Figures and reports of runs and of data, which need the extra `report`.

The functions return matplotlib figures, which a notebook shows and `figure.savefig` writes.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vgg_jax.reporting.contact_sheet import preview
    from vgg_jax.reporting.run_figures import confusion, curves

__all__ = ["confusion", "curves", "preview"]

# Imported on first use: training needs `vgg_jax.reporting.events` only.
_LAZY = {"confusion": "run_figures", "curves": "run_figures", "preview": "contact_sheet"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_LAZY[name]}")
    globals()[name] = getattr(module, name)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
