"""The first Ling (bailing_moe), of which transformers has no class: its forward pass, by the definition it is published
with."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from recompile.checkpoint.checkpoint import Checkpoint


def ling_logits(checkpoint: Checkpoint, ids: Tensor) -> Tensor:
    """Of token ids [tokens]: [tokens, vocab], float32."""
    config = checkpoint.config

    def weight(name: str) -> Tensor:
        return checkpoint.load(f"{name}.weight").float()

    def norm(value: Tensor, name: str) -> Tensor:
        return functional.rms_norm(value, value.shape[-1:], weight(name), config["rms_norm_eps"])

    state = weight("model.word_embeddings")[ids]
    for number in range(config["num_hidden_layers"]):
        layer = f"model.layers.{number}"
        normed = norm(state, f"{layer}.input_layernorm")
        fused = normed @ weight(f"{layer}.attention.query_key_value").T
        mixed = _attention(fused, config["num_attention_heads"], config["num_key_value_heads"], config["rope_theta"])
        state = state + mixed @ weight(f"{layer}.attention.dense").T
        normed = norm(state, f"{layer}.post_attention_layernorm")

        def fed(value: Tensor, name: str) -> Tensor:
            gate, up = (value @ weight(f"{name}.{leaf}_proj").T for leaf in ("gate", "up"))
            return functional.silu(gate) * up @ weight(f"{name}.down_proj").T

        shares = torch.softmax(normed @ weight(f"{layer}.mlp.gate").T, -1)
        shares, chosen = shares.topk(config["num_experts_per_tok"], -1)
        shares = shares / shares.sum(-1, keepdim=True)
        state = state + fed(normed, f"{layer}.mlp.shared_experts")
        for expert in range(config["num_experts"]):
            share = torch.where(chosen == expert, shares, 0.0).sum(-1, keepdim=True)
            state = state + share * fed(normed, f"{layer}.mlp.experts.{expert}")
    return norm(state, "model.norm") @ weight("lm_head").T


def _attention(fused: Tensor, query: int, key: int, theta: float) -> Tensor:
    """[tokens, (query + 2 key) * size] -> [tokens, query * size], causal; the halves of a head turn together."""
    tokens = len(fused)
    heads = fused.reshape(tokens, query + 2 * key, -1).transpose(0, 1)  # [heads, tokens, size]
    half = heads.shape[-1] // 2
    angles = torch.arange(tokens)[:, None] * theta ** (-torch.arange(half) / half)
    cos, sin = angles.cos(), angles.sin()
    first, second = heads[..., :half], heads[..., half:]
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
    queries, keys = turned[:query], turned[query : query + key]
    shared = query // key
    keys, values = (one.repeat_interleave(shared, 0) for one in (keys, heads[query + key :]))
    found = functional.scaled_dot_product_attention(queries, keys, values, is_causal=True)
    return found.transpose(0, 1).reshape(tokens, -1)
