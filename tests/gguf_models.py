"""Small GGUF models for tests: random weights, any type."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from recompile.formats.gguf_types import TYPES
from recompile.gguf.container import NewTensor, encode_key, write_gguf

HIDDEN, HEADS, KV, LAYERS, INNER, VOCAB = 64, 4, 2, 2, 128, 40


def new_tensor(name: str, values: torch.Tensor, kind: str = "F32") -> NewTensor:
    """The values as they are for F32; bytes drawn by the name for quantized types, the same in every file."""
    raw = values.float().contiguous().numpy().tobytes()
    if kind != "F32":
        count = TYPES[kind].row_bytes(values.shape[-1]) * values[..., 0].numel()
        raw = np.random.default_rng(len(name)).integers(0, 60, count, dtype=np.uint8).tobytes()
    return NewTensor(name, TYPES[kind], tuple(reversed(values.shape)), lambda: [raw])


def write_model(
    path: Path, arch: str = "llama", kind: str = "Q8_0", seed: int = 0, experts: int = 0, head: bool = False
) -> Path:
    """A small model; linear weights in `kind`, all else F32. `head`: with a head of its own."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    records = [
        encode_key("general.architecture", arch),
        encode_key("general.file_type", 7, "u32"),
        encode_key(f"{arch}.block_count", LAYERS),
        encode_key(f"{arch}.context_length", 128),
        encode_key(f"{arch}.embedding_length", HIDDEN),
        encode_key(f"{arch}.feed_forward_length", INNER),
        encode_key(f"{arch}.attention.head_count", HEADS),
        encode_key(f"{arch}.attention.head_count_kv", KV),
        encode_key(f"{arch}.attention.layer_norm_rms_epsilon", 1e-5),
        encode_key("tokenizer.ggml.tokens", [f"t{i}" for i in range(VOCAB)]),
    ]
    if experts:
        records += [encode_key(f"{arch}.expert_count", experts), encode_key(f"{arch}.expert_used_count", 2)]
    tensors = [new_tensor("token_embd.weight", random(VOCAB, HIDDEN)), new_tensor("output_norm.weight", random(HIDDEN))]
    if head:
        tensors.append(new_tensor("output.weight", random(VOCAB, HIDDEN), kind))
    for layer in range(LAYERS):
        blk = f"blk.{layer}"
        tensors += [
            new_tensor(f"{blk}.attn_norm.weight", random(HIDDEN)),
            new_tensor(f"{blk}.ffn_norm.weight", random(HIDDEN)),
            new_tensor(f"{blk}.attn_q.weight", random(HIDDEN, HIDDEN), kind),
            new_tensor(f"{blk}.attn_k.weight", random(HIDDEN // 2, HIDDEN)),
            new_tensor(f"{blk}.attn_v.weight", random(HIDDEN // 2, HIDDEN), kind),
            new_tensor(f"{blk}.attn_output.weight", random(HIDDEN, HIDDEN), kind),
        ]
        if experts:
            tensors += [
                new_tensor(f"{blk}.ffn_gate_inp.weight", random(experts, HIDDEN)),
                new_tensor(f"{blk}.ffn_gate_exps.weight", random(experts, INNER, HIDDEN), kind),
                new_tensor(f"{blk}.ffn_up_exps.weight", random(experts, INNER, HIDDEN), kind),
                new_tensor(f"{blk}.ffn_down_exps.weight", random(experts, HIDDEN, INNER), kind),
            ]
        else:
            tensors += [
                new_tensor(f"{blk}.ffn_gate.weight", random(INNER, HIDDEN), kind),
                new_tensor(f"{blk}.ffn_up.weight", random(INNER, HIDDEN), kind),
                new_tensor(f"{blk}.ffn_down.weight", random(HIDDEN, INNER), kind),
            ]
    write_gguf(path, records, tensors)
    return path
