"""mlx-lm's side, run by serve.py: the logits of every position of a row."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK_BYTES = 1 << 26


def load(request: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """request: path, dtype."""
    from importlib.metadata import version

    import mlx.core as mx
    from mlx_lm.utils import load_model

    if not mx.metal.is_available():
        mx.set_default_device(mx.cpu)
    model, _ = load_model(Path(request["path"]))
    model.set_dtype(getattr(mx, request["dtype"]))
    vocab = model(mx.array([[0]])).shape[-1]
    return model, {"version": f"mlx-lm {version('mlx-lm')}", "vocab": vocab, "top_k": vocab}


def score(model: Any, ids: list[int]) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Of every position but the last: float32 [positions, vocab] logits."""
    import mlx.core as mx

    logits = model(mx.array([ids]))[0, :-1].astype(mx.float32)
    step = max(1, BLOCK_BYTES // (4 * logits.shape[-1]))
    for start in range(0, logits.shape[0], step):
        block = logits[start : start + step]
        yield {"positions": block.shape[0], "width": 0}, bytes(memoryview(block))
