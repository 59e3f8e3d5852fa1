"""Hugging Face config -> the hyperparameter keys of a GGUF file: the reverse of `recompile.gguf.config`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from recompile.errors import CheckpointError, UnsupportedError
from recompile.gguf.container import GgufFile, encode_key
from recompile.gguf.names import Architecture, Heads

TOKENIZER = "tokenizer."


def heads_in(config: Mapping[str, Any]) -> Heads:
    """Query and key heads of a config.json."""
    query = int(_need(config, "num_attention_heads"))
    return Heads(query, int(config.get("num_key_value_heads") or query))


def model_records(architecture: Architecture, config: Mapping[str, Any], name: str) -> dict[str, bytes]:
    """The keys that say what the model is, as records by name; those of the tokenizer are not among them.

    Raises CheckpointError for a config without a field that the architecture needs, UnsupportedError for one that
    GGUF's keys cannot express here (a kind of rope scaling, layers that differ otherwise than by a pattern).
    """
    arch = architecture.name
    heads = heads_in(config)
    hidden = int(_need(config, "hidden_size"))
    head_dim = int(config.get("head_dim") or hidden // heads.query)
    rope = _rope(config)
    values: dict[str, tuple[Any, str]] = {
        "block_count": (_need(config, "num_hidden_layers"), "u32"),
        "context_length": (_need(config, "max_position_embeddings"), "u32"),
        "embedding_length": (hidden, "u32"),
        "feed_forward_length": (_need(config, "intermediate_size"), "u32"),
        "attention.head_count": (heads.query, "u32"),
        "attention.head_count_kv": (heads.key, "u32"),
        "attention.key_length": (head_dim, "u32"),
        "attention.value_length": (head_dim, "u32"),
        "attention.layer_norm_rms_epsilon": (_need(config, "rms_norm_eps"), "f32"),
        "rope.freq_base": (rope["rope_theta"], "f32"),
        "rope.dimension_count": (head_dim, "u32"),
        "vocab_size": (_need(config, "vocab_size"), "u32"),
    }
    kind = rope.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        values["rope.scaling.type"] = (kind, "string")
        values["rope.scaling.factor"] = (rope["factor"], "f32")
        if kind == "yarn":
            original = rope.get("original_max_position_embeddings") or config["max_position_embeddings"]
            values["rope.scaling.original_context_length"] = (original, "u32")
    elif kind not in ("default", "llama3"):
        raise UnsupportedError(f"config.json: rope_type {kind!r} has no GGUF keys here; use llama.cpp's own converter")
    if arch in ("gemma2", "gemma3"):
        values["attention.sliding_window"] = (_need(config, "sliding_window"), "u32")
        for key in ("attn_logit_softcapping", "final_logit_softcapping"):
            if config.get(key):
                values[key] = (config[key], "f32")
    experts = config.get("num_experts") or config.get("num_local_experts")
    if experts:
        values["expert_count"] = (experts, "u32")
        values["expert_used_count"] = (_need(config, "num_experts_per_tok"), "u32")
        if arch != "llama":
            values["expert_feed_forward_length"] = (_need(config, "moe_intermediate_size"), "u32")
        if arch == "qwen2moe":
            values["expert_shared_feed_forward_length"] = (_need(config, "shared_expert_intermediate_size"), "u32")
    records = {
        "general.architecture": encode_key("general.architecture", arch),
        "general.type": encode_key("general.type", "model"),
        "general.name": encode_key("general.name", name),
    }
    records |= {f"{arch}.{key}": encode_key(f"{arch}.{key}", value, kind) for key, (value, kind) in values.items()}
    return records


def _need(config: Mapping[str, Any], key: str) -> Any:
    value = config.get(key)
    if value is None:
        raise CheckpointError(f"config.json: has no {key}, which a GGUF file must say")
    return value


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """rope_theta and the scaling, from either generation of transformers' spelling."""
    found = dict(config.get("rope_parameters") or {})
    if "full_attention" in found:  # one for each kind of layer: the engine's keys hold those of the global ones
        found = dict(found["full_attention"])
    scaling = dict(config.get("rope_scaling") or {})
    found |= scaling
    found["rope_type"] = found.get("rope_type") or found.get("type") or "default"
    found.setdefault("rope_theta", config.get("rope_theta") or 10000.0)
    return found


def llama3_factors(config: Mapping[str, Any]) -> list[float] | None:
    """What each rotary frequency is divided by under llama3 scaling (float, head_dim / 2); None without such scaling.

    From the definition in transformers' rope utilities: high frequencies stay, low ones are divided by `factor`, those
    between are blended."""
    import math

    rope = _rope(config)
    if rope["rope_type"] != "llama3":
        return None
    hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
    half = int(config.get("head_dim") or hidden // heads) // 2
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    original = rope["original_max_position_embeddings"]
    factors = []
    for i in range(half):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (i / half)
        if wavelength < original / high:
            factors.append(1.0)
        elif wavelength > original / low:
            factors.append(float(factor))
        else:
            smooth = (original / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return factors


def tokenizer_records(file: GgufFile) -> dict[str, bytes]:
    """The tokenizer's keys of a GGUF file, byte for byte. Raises CheckpointError where it has none."""
    found = {name: file.record(name) for name in file.keys if name.startswith(TOKENIZER)}
    if "tokenizer.ggml.tokens" not in found:
        raise CheckpointError(f"{file.label}: has no tokenizer keys; name another GGUF file of the same model")
    return found
