"""transformers' side, run by serve.py: the logits of every position of a row."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

BLOCK_BYTES = 1 << 26


def load(request: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """request: path, dtype."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    kinds = (transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText)
    dtype = getattr(torch, request["dtype"])
    kind = next((kind for kind in kinds if _knows(kind, request["path"])), kinds[0])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = kind.from_pretrained(request["path"], dtype=dtype).eval().to(device)
    vocab = model.get_output_embeddings().weight.shape[0]
    return model, {"version": f"transformers {transformers.__version__}", "vocab": vocab, "top_k": vocab}


def _knows(kind: Any, path: str) -> bool:
    import transformers

    return type(transformers.AutoConfig.from_pretrained(path)) in kind._model_mapping


def score(model: Any, ids: list[int]) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Of every position but the last: float32 [positions, vocab] logits."""
    import torch

    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0, :-1]
        for block in logits.split(max(1, BLOCK_BYTES // (4 * logits.shape[-1]))):
            yield {"positions": len(block), "width": 0}, block.float().cpu().numpy().tobytes()
