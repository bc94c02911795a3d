# SPDX-License-Identifier: Apache-2.0
"""Prunes transformer blocks of Hugging Face causal language models.

The public names load on first use, so that importing the package starts neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import Any


__version__ = version("optimum-blockprune")

_HOMES = {
    "BlockPruner": "pruner",
    "BlockPruningConfig": "config",
    "BlockPruningError": "errors",
    "PruningPlan": "plan",
    "PruningReport": "report",
    "PruningStrategy": "strategies.base",
    "UnsupportedModelError": "errors",
    "available_strategies": "registry",
    "get_strategy": "registry",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    """Imports a public name from its module and keeps it (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    """Lists the names that are not loaded yet, too."""
    return sorted({*globals(), *__all__})
