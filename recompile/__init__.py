"""recompile: build mixed-bitrate checkpoints from quantized variants of one model, and measure them.

    import recompile

    recompile.quantize("base", "variants", bits=[2, 3, 4, 6])
    recompile.profile("base", "variants/3bpw", ["variants/2bpw", "variants/4bpw", "variants/6bpw"], mode="sketch")
    recompile.optimize("profile.jsonl", bits=3.5)
    recompile.merge("variants/3bpw", "mix", recipe="overrides.yaml")

docs/python-api.md shows the whole way. All names are loaded when they are first used.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

__version__ = "0.3.0"

# torch then asks Linux for huge pages for its large blocks. Weights that come and go, layer by layer, cost a page fault
# for every 4 KiB otherwise: a third of the time of a run under a memory cap. torch reads it at its first large block.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

API = (
    "auto",
    "auto_plan",
    "check",
    "diff",
    "diff_many",
    "emit",
    "engine_diff",
    "engines",
    "frontier",
    "heal",
    "install_engine",
    "load_recipe",
    "merge",
    "open_checkpoint",
    "optimize",
    "profile",
    "quantize",
    "report",
    "trace",
)
__all__ = [*API, "__version__"]


def __getattr__(name: str) -> Any:
    if name in API:
        return load_verb(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def load_verb(name: str) -> Any:
    """A function of the API by its name."""
    return getattr(import_module("recompile.auto" if name in ("auto", "auto_plan") else "recompile.api"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *API})
