"""What tests of written checkpoints share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import mixes


@pytest.fixture
def mix(tmp_path: Path) -> tuple[Path, Path]:
    """A 3-bit base and a recipe that takes modules with other parts: asymmetric with a bias, symmetric, dense."""
    base = mixes.packed(tmp_path / "3bpw", 3, symmetric=False)
    mixes.packed(tmp_path / "4bpw", 4, bias=True)
    mixes.packed(tmp_path / "5bpw", 5, symmetric=False, group=None)
    mixes.dense(tmp_path / "dense")
    taken = {
        "model.layers.0.mlp.down_proj.*": tmp_path / "4bpw",
        "*.self_attn.v_proj.*": tmp_path / "4bpw",
        "model.layers.1.mlp.*": tmp_path / "5bpw",
        "model.layers.2.mlp.down_proj.*": tmp_path / "dense",
    }
    return base, mixes.recipe(tmp_path / "mix.yaml", taken)
