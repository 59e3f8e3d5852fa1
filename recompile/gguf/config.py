"""The Hugging Face config that the keys of a GGUF file amount to, so that transformers can build the model.

Covers the architectures of `recompile.gguf.names`. What a GGUF file does not say is a constant of the architecture,
named where it is used.
"""

from __future__ import annotations

import struct
from typing import Any

from recompile.errors import CheckpointError
from recompile.gguf.container import GgufFile
from recompile.gguf.keys import llama3_factors
from recompile.gguf.names import ARCHITECTURES, Heads

# Gemma's largest models scale attention by hidden size / heads, all others by the head size; told apart by depth.
GEMMA_27B_LAYERS = {"gemma2": 46, "gemma3": 62}
GEMMA3_LOCAL_ROPE = 10000.0


def heads_of(file: GgufFile) -> Heads:
    """Query and key heads. Raises CheckpointError where a file has no such keys, or other numbers a layer."""
    arch = file.value("general.architecture")
    query = file.require(f"{arch}.attention.head_count")
    key = file.value(f"{arch}.attention.head_count_kv", query)
    if not isinstance(query, int) or not isinstance(key, int):
        raise CheckpointError(
            f"{file.label}: {arch}.attention.head_count is a list; layers with other numbers of heads"
        )
    return Heads(query, key)


def config_of(file: GgufFile) -> tuple[dict[str, Any], list[str]]:
    """A config.json as a dict, and notes. `model_type` is missing where transformers cannot run the file from its keys.

    Raises CheckpointError for a file of a known architecture that lacks a key.
    """
    arch = file.value("general.architecture")
    known = ARCHITECTURES.get(arch) if isinstance(arch, str) else None
    if known is None:
        return {"gguf_architecture": arch}, []
    if "token_embd.weight" not in file.tensors:
        raise CheckpointError(f"{file.label}: has no tensor token_embd.weight; it is not a whole {arch} model")

    def get(key: str, default: Any = None) -> Any:
        return _short(file.value(f"{arch}.{key}", default))

    def need(key: str) -> Any:
        return _short(file.require(f"{arch}.{key}"))

    heads = heads_of(file)
    hidden = need("embedding_length")
    config: dict[str, Any] = {
        "model_type": known.model_types[0],
        "hidden_size": hidden,
        "num_hidden_layers": need("block_count"),
        "num_attention_heads": heads.query,
        "num_key_value_heads": heads.key,
        "head_dim": get("attention.key_length", hidden // heads.query),
        "intermediate_size": need("feed_forward_length"),
        "max_position_embeddings": need("context_length"),
        "rms_norm_eps": need("attention.layer_norm_rms_epsilon"),
        "rope_theta": get("rope.freq_base", 10000.0),
        "vocab_size": file.tensors["token_embd.weight"].ne[1],
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }
    for key, there in (("bos", "bos_token_id"), ("eos", "eos_token_id"), ("padding", "pad_token_id")):
        token = file.value(f"tokenizer.ggml.{key}_token_id")
        if token is not None:
            config[there] = token
    config["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
    notes = _add_rope_scaling(file, arch, config)
    if arch.startswith("gemma"):
        _add_gemma(arch, get, config)
    if get("expert_count"):
        _add_experts(arch, get, need, config)
    return config, notes


def _short(value: Any) -> Any:
    """A float32 in its shortest decimal spelling: 1e-05, not 9.999999747378752e-06."""
    return float(f"{value:.7g}") if isinstance(value, float) else value


def _add_rope_scaling(file: GgufFile, arch: str, config: dict[str, Any]) -> list[str]:
    kind = file.value(f"{arch}.rope.scaling.type", "none")
    factor = file.value(f"{arch}.rope.scaling.factor", 1.0)
    if "rope_freqs.weight" in file.tensors:
        scaling = _llama3_scaling(file, config)
        if scaling is None:
            del config["model_type"]
            return [
                f"{file.label}: the factors in rope_freqs.weight are not llama3's usual ones, so that the model cannot "
                f"be run from this file alone; put its config.json beside it"
            ]
        config["rope_scaling"] = scaling
    elif kind == "linear" and factor != 1.0:
        config["rope_scaling"] = {"rope_type": "linear", "factor": _short(factor)}
    elif kind == "yarn":
        original = file.value(f"{arch}.rope.scaling.original_context_length")
        config["rope_scaling"] = {
            "rope_type": "yarn",
            "factor": _short(factor),
            "original_max_position_embeddings": original,
        }
    elif kind not in ("none", "linear"):
        del config["model_type"]
        return [f"{file.label}: rope scaling of type {kind!r} is not known here; put its config.json beside it"]
    return []


def _llama3_scaling(file: GgufFile, config: dict[str, Any]) -> dict[str, Any] | None:
    """The llama3 scaling whose factors are stored, if it has the constants that all Llama 3 models have."""
    info = file.tensors["rope_freqs.weight"]
    if info.type.name != "F32":
        return None
    stored = struct.unpack(f"<{info.numel}f", file.read(info))
    scaling = {
        "rope_type": "llama3",
        "factor": _short(max(stored)),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    wanted = llama3_factors({**config, "rope_scaling": scaling}) or []
    same = len(wanted) == len(stored) and all(
        abs(have - want) <= 1e-4 * want for have, want in zip(stored, wanted, strict=True)
    )
    return scaling if same else None


def _add_gemma(arch: str, get: Any, config: dict[str, Any]) -> None:
    # "gelu_pytorch_tanh" is what every Gemma computes, whatever its config.json calls it
    config["hidden_activation"] = config["hidden_act"] = "gelu_pytorch_tanh"
    if arch == "gemma":
        return
    large = config["num_hidden_layers"] == GEMMA_27B_LAYERS[arch]
    config["query_pre_attn_scalar"] = (
        config["hidden_size"] // config["num_attention_heads"] if large else config["head_dim"]
    )
    config["sliding_window"] = get("attention.sliding_window", 4096)
    if arch == "gemma2":
        config["attn_logit_softcapping"] = get("attn_logit_softcapping", 50.0)
        config["final_logit_softcapping"] = get("final_logit_softcapping", 30.0)
        return
    config["rope_local_base_freq"] = get("rope.freq_base_swa", GEMMA3_LOCAL_ROPE)
    config["final_logit_softcapping"] = get("final_logit_softcapping")
    pattern = get("attention.sliding_window_pattern", 6)
    if isinstance(pattern, list):
        config["layer_types"] = ["sliding_attention" if local else "full_attention" for local in pattern]
    else:
        config["layer_types"] = [
            "full_attention" if (i + 1) % pattern == 0 else "sliding_attention"
            for i in range(config["num_hidden_layers"])
        ]


def _add_experts(arch: str, get: Any, need: Any, config: dict[str, Any]) -> None:
    count, used = get("expert_count"), need("expert_used_count")
    config["num_experts_per_tok"] = used
    if arch == "llama":
        config |= {"model_type": "mixtral", "num_local_experts": count}
        return
    config["num_experts"] = config["num_local_experts"] = count
    config["moe_intermediate_size"] = get("expert_feed_forward_length", config["intermediate_size"])
    config["norm_topk_prob"] = arch == "qwen3moe"  # the engine's rule: Qwen3 normalizes the chosen experts' weights
    if arch == "qwen2moe":
        config["shared_expert_intermediate_size"] = get(
            "expert_shared_feed_forward_length", config["intermediate_size"]
        )
