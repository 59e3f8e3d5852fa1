"""A float32 GGUF file alone against the Hugging Face checkpoint that it was made of: the same logits in torch, for
every architecture of the table; and the same KL of a mix in llama.cpp."""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from eval.engines.builds import Installed
from eval.engines.engine_diff import EngineOptions, EngineReport, compare_with_engine
from recompile.checkpoint.checkpoint import Checkpoint, open_checkpoint
from recompile.gguf.container import encode_key, open_gguf, write_gguf
from recompile.model.decoded import as_dense
from recompile.model.stream import LayeredModel
from recompile.quantize.gguf import Mix, base_tensors, plan_variants
from recompile.quantize.gguf_build import build_variants
from tests import gguf_tiny
from tests.engine_models import installed
from tests.gguf.ling import ling_logits

KINDS = ("Q8_0", "Q4_0", "Q5_1", "Q4_1")
RELATIVE, ABSOLUTE = 1e-2, 3e-3  # engines round activations to 8 bits
JUDGED = ("llama", "qwen3moe", "glm4moe", "gpt-oss", "deepseek2")
# What the pinned build of the engine has not, or computes otherwise than transformers.
NOT_IN_ENGINE = {
    "deepseek32": "not known to it",
    "cohere2moe": "not known to it",
    "mellum": "not known to it",
    "glm-dsa": "computed without its sparse attention",
    "deepseek2 of version 2": "wants 27 or 60 layers",
    "dots1": "wants as many heads of keys as of queries",
    "olmoe": "wants as many heads of keys as of queries",
}
ENGINE_ERROR = {
    "gpt-oss": 2e-2,  # it rounds the bounds of YaRN's ramp, which these models do not
    "mimo2": 2e-3,  # as the next; without that token 6e-8 nats
    "qwen3vlmoe": 2e-3,  # one token lies so near the border between two experts that rounding takes it across
}
ALL = bool(os.environ.get("RECOMPILE_TEST_ALL"))


@cache
def golden() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(gguf_tiny.GOLDEN.read_text())
    return found


def write_files(folder: Path, entry: str | dict[str, Any], *, mixed: bool) -> tuple[Any, ...]:
    """The checkpoint of an entry, its float32 file, and, if asked for, one with weights of several types."""
    entry = golden()[entry] if isinstance(entry, str) else entry
    base = open_checkpoint(gguf_tiny.write_tiny(folder / "base", entry, gguf_tiny.sound_values))
    tokens = [f"t{number}" for number in range(gguf_tiny.VOCAB)]
    records = [
        encode_key("tokenizer.ggml.model", "gpt2"),
        encode_key("tokenizer.ggml.pre", "gpt-2"),
        encode_key("tokenizer.ggml.tokens", tokens),
        encode_key("tokenizer.ggml.token_type", [1] * len(tokens), "i32"),
        encode_key("tokenizer.ggml.merges", ["t 1"]),
        encode_key("tokenizer.ggml.bos_token_id", 1, "u32"),
        encode_key("tokenizer.ggml.eos_token_id", 2, "u32"),
    ]
    write_gguf(folder / "tokens.gguf", records, [])
    weighty = [tensor for tensor in base_tensors(base) if not tensor.plain]
    mix = Mix("mix.gguf", {tensor.name: KINDS[number % len(KINDS)] for number, tensor in enumerate(weighty)})
    names = ["F32", mix] if mixed else ["F32"]
    plan = plan_variants(base, folder, names, tokenizer_from=open_gguf(folder / "tokens.gguf"))
    for _ in build_variants(plan):
        pass
    return (base, *(variant.path for variant in plan.variants))


def logits(checkpoint: Checkpoint) -> torch.Tensor:
    ids = torch.arange(24).reshape(1, 24) * 7 % gguf_tiny.VOCAB
    if checkpoint.config["model_type"] == "bailing_moe":
        return ling_logits(checkpoint, ids[0])[None]
    model = LayeredModel.of(checkpoint, dtype=torch.float32)
    with torch.inference_mode():
        (state,) = list(model.embed(ids, 1))
        for number in range(model.depth):
            with model.layer(number):
                state = model.run_layer(number, state)
        with model.norm_loaded() as norm:
            state = norm(state)
        with model.head_loaded():
            return model.logits(state)


@pytest.mark.parametrize("name", gguf_tiny.BUILDS)
def test_the_file_alone_is_the_same_model(name: str, tmp_path: Path) -> None:
    base, made = write_files(tmp_path, name, mixed=False)
    file = open_checkpoint(made)
    want, have = logits(base), logits(file)
    assert torch.allclose(have, want, atol=1e-4 * float(want.std()))
    assert torch.allclose(logits(as_dense(file)), want, atol=1e-4 * float(want.std()))


@pytest.mark.parametrize("name", [n for n in gguf_tiny.BUILDS if (ALL or n in JUDGED) and n not in NOT_IN_ENGINE])
def test_kl_in_the_engine(name: str, tmp_path: Path) -> None:
    """The engine's logits of the float32 file are ours, and its KL of the mix is ours up to what its 8-bit activations
    do to the mix itself."""
    judge(installed("llama.cpp"), write_files(tmp_path, name, mixed=True), ENGINE_ERROR.get(name, 0))


def test_a_norm_for_every_head(tmp_path: Path) -> None:
    """StableLM 2: norms of heads are rows of one tensor, and nothing between attention and feed-forward. The converter
    that the others are compared with fails on these models."""
    entry = json.loads(json.dumps(golden()["stablelm"]))
    entry["config"] |= {"qk_layernorm": True, "use_parallel_residual": True}
    for layer in range(2):
        del entry["hf"][f"model.layers.{layer}.post_attention_layernorm.weight"]
        del entry["hf"][f"model.layers.{layer}.post_attention_layernorm.bias"]
        for leaf, heads in (("q", 4), ("k", 2)):
            entry["hf"][f"model.layers.{layer}.self_attn.{leaf}_layernorm.norms.{{}}.weight"] = [heads, 16]
    base, reference, _ = files = write_files(tmp_path, entry, mixed=True)
    want = logits(base)
    assert torch.allclose(logits(open_checkpoint(reference)), want, atol=1e-4 * float(want.std()))
    assert open_gguf(reference).tensors["blk.1.attn_q_norm.weight"].shape == (4, 16)
    judge(installed("llama.cpp"), files)


def judge(found: Installed, files: tuple[Any, ...], allowed: float = 0) -> None:
    """allowed: nats that the engine computes otherwise"""
    _, reference, mixed = files
    cut = np.random.default_rng(0).integers(3, gguf_tiny.VOCAB, (2, 64)).astype(np.int32)
    sources = open_checkpoint(mixed), open_checkpoint(reference)
    *_, report = compare_with_engine(found, mixed, reference, cut, EngineOptions(sources=sources, threads=1))
    assert isinstance(report, EngineReport)
    assert report.torch is not None
    assert report.torch.engine_reference is not None
    ours, theirs, itself = report.torch.kl.kl.mean, report.kl.kl.mean, report.torch.engine_candidate.kl.mean
    assert report.torch.engine_reference.kl.mean < (allowed or 1e-4)
    assert ours > 1e-6
    assert itself < 0.6 * ours + allowed
    assert abs(theirs - ours) <= RELATIVE * ours + min(ABSOLUTE, ours / 10) + 3 * itself
