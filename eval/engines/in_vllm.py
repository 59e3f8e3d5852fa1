"""vLLM's side, run by serve.py: the most probable tokens of every position of a row, by `prompt_logprobs`."""

from __future__ import annotations

import array
import os
from collections.abc import Iterator
from typing import Any

BLOCK = 64  # positions in one answer
INT8_INPUTS = "VLLM_CPU_INT4_W4A8"


def load(request: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """request: path, dtype, tokens (of the longest row), top_k (0: all)."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; one row alone is in it
    # On a CPU with AMX vLLM would round the inputs of 4-bit maps to 8 bits, whatever their scheme says.
    os.environ.setdefault(INT8_INPUTS, "0")
    import torch
    import vllm

    if hasattr(torch.cpu, "_init_amx"):
        torch.cpu._init_amx()  # else its 4-bit kernel dies where nothing before it asked the system for AMX
    engine = vllm.LLM(
        model=request["path"],
        dtype=request["dtype"],
        enforce_eager=True,
        max_model_len=request["tokens"] + 1,
        max_num_seqs=1,
        max_logprobs=-1,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        gpu_memory_utilization=0.45,  # candidate and reference are loaded side by side
        disable_log_stats=True,
    )
    config = engine.llm_engine.model_config
    vocab = config.get_vocab_size()
    top_k = min(request["top_k"] or vocab, vocab)
    sampling = vllm.SamplingParams(
        max_tokens=1,
        temperature=0.0,
        prompt_logprobs=top_k if top_k < vocab else -1,
        detokenize=False,
        flat_logprobs=True,
    )
    about = {"version": f"vllm {vllm.__version__}", "vocab": vocab, "top_k": top_k, "notes": _notes()}
    return (engine, sampling), about


def _notes() -> list[str]:
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return []
    if os.environ[INT8_INPUTS] == "0":
        return [f"4-bit maps see their inputs as they are; on processors with AMX {INT8_INPUTS}=1, vLLM's own default, "
                f"rounds them to int8"]  # fmt: skip
    return [f"{INT8_INPUTS} is on: on processors with AMX the inputs of 4-bit maps are rounded to int8"]


def score(model: tuple[Any, Any], ids: list[int]) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Of every position but the last: the next token's log-probability, then (token, log-probability) of the first K.

    Bytes: float32 [positions], int32 [positions, K], float32 [positions, K]
    """
    engine, sampling = model
    (answer,) = engine.generate([{"prompt_token_ids": ids}], sampling, use_tqdm=False)
    found = answer.prompt_logprobs  # of position 0 nothing, of position i what stands before it says
    places = list(zip(found.start_indices[1:], found.end_indices[1:], strict=True))
    for first in range(0, len(places), BLOCK):
        labels, tokens, values = array.array("f"), array.array("i"), array.array("f")
        block = places[first : first + BLOCK]
        for start, stop in block:  # the text's own token comes first
            labels.append(found.logprobs[start])
            tokens.extend(found.token_ids[start + 1 : stop])
            values.extend(found.logprobs[start + 1 : stop])
        head = {"positions": len(block), "width": len(tokens) // len(block)}
        yield head, labels.tobytes() + tokens.tobytes() + values.tobytes()
