"""The Hugging Face config that the keys of a GGUF file amount to, so that transformers can build the model.

Covers the architectures of `recompile.gguf.architectures`, by the table in `recompile.gguf.fields`.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from recompile.errors import CheckpointError
from recompile.gguf.container import GgufFile
from recompile.gguf.fields import (
    EPSILON,
    EXPERT_SIZES,
    FIELDS,
    FIXED_EPSILON,
    MAVERICK_EXPERTS,
    PARTIAL_ROTARY,
    REQUIRED,
    RMS_EPSILON,
    SIGMOID,
    constants,
)
from recompile.gguf.keys import llama3_factors
from recompile.gguf.names import ARCHITECTURES

# Gemma's largest models scale attention by hidden size / heads, all others by the head size; told apart by depth.
GEMMA_27B_LAYERS = {"gemma2": 46, "gemma3": 62}
GEMMA3_LOCAL_ROPE = 10000.0
SMALLEST_UNTURNED = 1e20  # a frequency that is divided by more does not turn at all

MOST_LAYERS = 2000
HEADS_BY_LAYER = ("gemma4", "mimo2")  # whose config has numbers of key heads by kind of layer


@dataclass(frozen=True)
class _Keys:
    """The keys of one architecture in a file, and its tensors."""

    file: GgufFile
    arch: str

    def get(self, key: str, default: Any = None) -> Any:
        return _short(self.file.value(f"{self.arch}.{key}", default))

    def need(self, key: str) -> Any:
        return _short(self.file.require(f"{self.arch}.{key}"))

    def has(self, tensor: str) -> bool:
        return tensor in self.file.tensors

    def in_any_layer(self, leaf: str, layers: int) -> bool:
        return any(self.has(f"blk.{number}.{leaf}") for number in range(layers))

    def layer_types(self, layers: int, leaf: str, there: str, absent: str) -> list[str]:
        """Which layers have a tensor and which do not."""
        return [there if self.has(f"blk.{number}.{leaf}") else absent for number in range(layers)]


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
    keys = _Keys(file, known.name)
    layers = keys.need("block_count")
    if type(layers) is not int or not 1 <= layers <= MOST_LAYERS:
        raise CheckpointError(
            f"{file.label}: key {known.name}.block_count is {str(layers)[:60]}, wanted a whole number from 1 to "
            f"{MOST_LAYERS}"
        )
    query, hidden = _heads(keys, "attention.head_count", layers), keys.need("embedding_length")
    epsilon_key, epsilon = EPSILON.get(known.name, RMS_EPSILON)
    config: dict[str, Any] = {
        "model_type": known.read_as or known.model_types[0],
        "hidden_size": hidden,
        "num_hidden_layers": keys.need("block_count") - keys.get("nextn_predict_layers", 0),
        "num_attention_heads": query,
        "num_key_value_heads": _heads(keys, "attention.head_count_kv", layers, query),
        "head_dim": keys.get("attention.key_length", hidden // max(1, query)),
        "intermediate_size": _one(keys.get("feed_forward_length") or keys.need("expert_feed_forward_length")),
        "max_position_embeddings": keys.need("context_length"),
        "rope_theta": keys.get("rope.freq_base", 10000.0),
        "vocab_size": file.tensors["token_embd.weight"].ne[1],
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }
    if known.name not in FIXED_EPSILON:
        config[epsilon] = keys.need(epsilon_key)
    layers = config["num_hidden_layers"]
    for there, name in (("bos", "bos_token_id"), ("eos", "eos_token_id"), ("padding", "pad_token_id")):
        config[name] = file.value(f"tokenizer.ggml.{there}_token_id")  # None, not the default of another vocabulary
    config["attention_bias"] = any(keys.in_any_layer(f"{leaf}.bias", layers) for leaf in ("attn_q", "attn_qkv"))
    config["mlp_bias"] = keys.in_any_layer("ffn_down.bias", layers)
    experts = keys.get("expert_count")
    for entry in FIELDS.get(known.name, ()):
        absent = entry.default
        if absent is REQUIRED and entry.key in EXPERT_SIZES:
            absent = config["intermediate_size"]
        # None is written as well: transformers' own default would be another model's
        config[entry.name] = keys.need(entry.key) if absent is REQUIRED else keys.get(entry.key, absent)
    config |= constants(known.name, layers)
    if known.name in PARTIAL_ROTARY:
        turned = keys.get("rope.dimension_count", config["head_dim"])
        config["partial_rotary_factor"] = turned / config["head_dim"]
    notes = _add_rope_scaling(keys, config)
    if known.name.startswith("gemma"):
        _add_gemma(keys, config)
    elif known.name == "llama" and experts:
        config |= {
            "model_type": "mixtral",
            "num_local_experts": experts,
            "num_experts_per_tok": keys.need("expert_used_count"),
        }
    elif known.name == "bailingmoe":
        notes += _add_first_ling(keys, config)
    elif known.name == "jamba":
        notes += _add_jamba(keys, config, layers)
    else:
        _add_special(keys, config, layers)
    return config, notes


def _short(value: Any) -> Any:
    """A float32 in its shortest decimal spelling: 1e-05, not 9.999999747378752e-06."""
    return float(f"{value:.7g}") if isinstance(value, float) else value


def _heads(keys: _Keys, key: str, layers: int, absent: int | None = None) -> int:
    """A number of heads: one for all layers, or a list with one a layer, 0 where there is no attention. Raises
    CheckpointError for a list of another length, and where layers differ that the model's config has one number for."""
    value = keys.need(key) if absent is None else keys.get(key, absent)
    if not isinstance(value, list):
        return value
    where = f"{keys.file.label}: key {keys.arch}.{key}"
    if len(value) not in (layers, layers - keys.get("nextn_predict_layers", 0)):
        raise CheckpointError(f"{where} has {len(value)} numbers, wanted one for each of the {layers} layers")
    if len({*value} - {0}) > 1 and keys.arch not in HEADS_BY_LAYER:
        raise CheckpointError(f"{where} differs from layer to layer, wanted one number ({str(value)[:60]})")
    return max(value)


def _one(value: Any) -> int:
    """A number, or the largest of a list with one a layer (layers without attention have none)."""
    return max(value) if isinstance(value, list) and value else value


def _add_special(keys: _Keys, config: dict[str, Any], layers: int) -> None:
    """What is particular to one architecture, and is more than a key's value."""
    arch = keys.arch
    if arch in ("qwen2moe", "qwen3moe"):
        config["num_local_experts"] = config["num_experts"]
    elif arch in ("qwen3next", "qwen35", "qwen35moe"):
        config["linear_value_head_dim"] = keys.need("ssm.inner_size") // config["linear_num_value_heads"]
        config["layer_types"] = keys.layer_types(layers, "attn_q.weight", "full_attention", "linear_attention")
    elif arch == "glm4" and keys.get("rope.dimension_sections"):  # of images; they tell the order of rows
        rope = {"rope_type": "default", "mrope_section": keys.get("rope.dimension_sections")[:3]}
        rope |= {"rope_theta": config["rope_theta"], "partial_rotary_factor": config["partial_rotary_factor"]}
        config["rope_parameters"] = rope
    elif arch == "glm4moe":
        config["use_qk_norm"] = keys.in_any_layer("attn_q_norm.weight", layers)
    elif arch in ("deepseek2", "deepseek32", "glm-dsa"):
        _add_latent(keys, config, layers)
    elif arch == "llama4":
        step = config["interleave_moe_layer_step"]
        config["moe_layers"] = list(range(step - 1, layers, step))
        config["use_qk_norm"] = config["num_local_experts"] != MAVERICK_EXPERTS  # the engine's rule
    elif arch == "gpt-oss" and "rope_scaling" not in config:  # which transformers would take for the published one
        config["rope_parameters"] = {"rope_type": "default", "rope_theta": config.pop("rope_theta")}
    elif arch == "mistral3":
        scale = keys.get("attention.temperature_scale")
        if scale is None:
            config["model_type"] = "mistral"
        else:
            config["rope_scaling"] = {**config.get("rope_scaling", {}), "llama_4_scaling_beta": scale}
    elif arch == "minimax-m2":
        config["rotary_dim"] = keys.get("rope.dimension_count", config["head_dim"])
    elif arch == "granitemoe" and config.get("shared_intermediate_size"):
        config["model_type"] = "granitemoeshared"
    elif arch in ("granitehybrid", "nemotron_h", "nemotron_h_moe"):
        _add_state_space(keys, config, layers)
    elif arch == "kimi-linear":
        _add_kimi(keys, config, layers)
    elif arch == "mimo2":
        _add_mimo(keys, config, layers)
    elif arch == "cohere2moe":
        _add_cohere2_moe(keys, config, layers)
    elif arch == "command-r":
        config["use_qk_norm"] = keys.in_any_layer("attn_q_norm.weight", layers)
    elif arch == "ernie4_5-moe":
        config["moe_layer_end_index"] = layers - 1
    elif arch in ("olmo2", "mellum") and config.get("sliding_window"):
        _add_olmo3(keys, config, layers)
    elif arch == "exaone4":
        windowed = config.get("sliding_window") is not None
        config["layer_types"] = _pattern(keys, layers, 4) if windowed else ["full_attention"] * layers
    elif arch == "seed_oss":
        config["attention_out_bias"] = keys.in_any_layer("attn_output.bias", layers)
    elif arch in ("lfm2", "lfm2moe"):
        config["layer_types"] = keys.layer_types(layers, "attn_q.weight", "full_attention", "conv")
        config["block_auto_adjust_ff_dim"] = False
        if arch == "lfm2moe":
            config["use_expert_bias"] = keys.in_any_layer("exp_probs_b.bias", layers)
    elif arch == "stablelm":
        config |= {
            "use_qkv_bias": config["attention_bias"],
            "qk_layernorm": keys.in_any_layer("attn_q_norm.weight", layers),
            "use_parallel_residual": not keys.in_any_layer("ffn_norm.weight", layers),  # the engine's rule
        }
    elif arch == "bailingmoe2":
        config["use_qk_norm"] = True
    elif arch == "gpt2":
        config["n_inner"] = config["intermediate_size"]
    elif arch == "falcon":
        _add_falcon(keys, config, layers)
    elif arch == "starcoder2":
        config |= {"use_bias": config["attention_bias"], "sliding_window": None}
    elif arch == "phi3":
        config["sliding_window"] = keys.get("attention.sliding_window") or None
        config["original_max_position_embeddings"] = (
            config["original_max_position_embeddings"] or config["max_position_embeddings"]
        )


def _add_first_ling(keys: _Keys, config: dict[str, Any]) -> list[str]:
    """As Granite's class with shared experts, whose softmax over the chosen experts is Ling's normalized one; notes
    where it computes something else."""
    count = config["num_shared_experts"]
    if not config["norm_topk_prob"] or config["first_k_dense_replace"] or not count:
        config.pop("model_type", None)
        said = "normalizes the weights of experts, has shared ones, and no layers without"
        return [f"{keys.file.label}: transformers computes a Ling only that {said}; this one cannot be run"]
    config |= {
        "num_local_experts": config["num_experts"],
        "intermediate_size": config["moe_intermediate_size"],
        "shared_intermediate_size": config["moe_intermediate_size"] * count,
        "attention_multiplier": config["head_dim"] ** -0.5,
    }
    return []


def _add_jamba(keys: _Keys, config: dict[str, Any], layers: int) -> list[str]:
    """Mamba 1 beside attention; which layers have attention and experts, as transformers' config says it."""
    config |= {
        "mamba_expand": keys.need("ssm.inner_size") // config["hidden_size"],
        "mamba_conv_bias": keys.in_any_layer("ssm_conv1d.bias", layers),
        "mamba_proj_bias": keys.in_any_layer("ssm_in.bias", layers),
    }
    for name, leaf in (("attn", "attn_q.weight"), ("expert", "ffn_gate_inp.weight")):
        there = [number for number in range(layers) if keys.has(f"blk.{number}.{leaf}")]
        offset = there[0] if there else 0
        period = there[1] - offset if len(there) > 1 else layers
        if (there or name == "attn") and there != [n for n in range(layers) if n % period == offset]:
            config.pop("model_type", None)
            return [f"{keys.file.label}: has {leaf} in no regular layers, as transformers' Jamba wants them"]
        config |= {f"{name}_layer_period": period, f"{name}_layer_offset": offset}
        if not there:
            config["num_experts"] = 1
    return []


def _add_kimi(keys: _Keys, config: dict[str, Any], layers: int) -> None:
    """Delta attention beside latent attention."""
    turned, dense = keys.need("rope.dimension_count"), config["first_k_dense_replace"]
    config |= {
        "qk_rope_head_dim": turned,
        "qk_nope_head_dim": keys.need("attention.key_length_mla") - turned,
        "v_head_dim": keys.need("attention.value_length_mla"),
        "num_key_value_heads": config["num_attention_heads"],
        "q_lora_rank": config.get("q_lora_rank"),
        "model_max_length": config["max_position_embeddings"],
        "linear_head_dim": keys.need("kda.head_dim"),
        "linear_num_heads": config["num_attention_heads"],
        "linear_conv_kernel_dim": keys.need("ssm.conv_kernel"),
        "layer_types": keys.layer_types(layers, "attn_kv_a_mqa.weight", "full_attention", "linear_attention"),
        "mlp_layer_types": ["dense" if number < dense else "sparse" for number in range(layers)],
    }
    del config["head_dim"]


def _add_mimo(keys: _Keys, config: dict[str, Any], layers: int) -> None:
    types, heads = _pattern(keys, layers, 6), keys.need("attention.head_count_kv")
    whole = [number for kind, number in zip(types, heads, strict=False) if kind == "full_attention"]
    turned = {"rope_type": "default", "partial_rotary_factor": config.pop("partial_rotary_factor")}
    theta = config.pop("rope_theta")
    config |= {
        "num_key_value_heads": whole[0] if whole else max(heads) // 2,
        "layer_types": types,
        "mlp_layer_types": keys.layer_types(layers, "ffn_gate_inp.weight", "sparse", "dense"),
        "rope_parameters": {
            "full_attention": {**turned, "rope_theta": theta},
            "sliding_attention": {**turned, "rope_theta": keys.get("rope.freq_base_swa", theta)},
        },
    }


def _add_falcon(keys: _Keys, config: dict[str, Any], layers: int) -> None:
    heads = config["num_key_value_heads"]
    grouped = {"num_kv_heads": heads, "multi_query": heads == 1, "new_decoder_architecture": heads > 1}
    norms = 2 if keys.in_any_layer("attn_norm_2.weight", layers) else 1
    config |= {**grouped, "num_ln_in_parallel_attn": norms, "ffn_hidden_size": config["intermediate_size"]}
    del config["head_dim"]


def _add_cohere2_moe(keys: _Keys, config: dict[str, Any], layers: int) -> None:
    dense = config["first_k_dense_replace"]
    config |= {
        "prefix_dense_intermediate_size": keys.need("feed_forward_length"),
        "layer_types": _pattern(keys, layers, 4),
        "mlp_layer_types": ["dense" if number < dense else "sparse" for number in range(layers)],
        "expert_selection_fn": "sigmoid" if keys.get("expert_gating_func") == SIGMOID else "softmax",
    }


def _add_olmo3(keys: _Keys, config: dict[str, Any], layers: int) -> None:
    """What a file of OLMo 2 with windows holds, and one of Mellum."""
    config["layer_types"] = _pattern(keys, layers, 4)
    if keys.arch == "mellum":
        config["mlp_layer_types"] = keys.layer_types(layers, "ffn_gate_inp.weight", "sparse", "dense")
    else:
        config["model_type"] = "olmo3"
    local = {"rope_type": "default", "rope_theta": keys.get("rope.freq_base_swa", config["rope_theta"])}
    whole = {"rope_type": "default", **config.pop("rope_scaling", {}), "rope_theta": config.pop("rope_theta")}
    config["rope_parameters"] = {"full_attention": whole, "sliding_attention": local}


def _add_state_space(keys: _Keys, config: dict[str, Any], layers: int) -> None:
    """Mamba 2 beside attention."""
    if keys.arch == "granitehybrid":
        config |= {
            "mamba_expand": keys.need("ssm.inner_size") // config["hidden_size"],
            "mamba_d_head": keys.need("ssm.inner_size") // config["mamba_n_heads"],
            "mamba_conv_bias": keys.in_any_layer("ssm_conv1d.bias", layers),
            "mamba_proj_bias": keys.in_any_layer("ssm_in.bias", layers),
            "layer_types": keys.layer_types(layers, "attn_q.weight", "full_attention", "linear_attention"),
            "position_embedding_type": "rope" if keys.get("rope.scaling.finetuned", False) else None,
            "shared_intermediate_size": config["shared_intermediate_size"] or config["intermediate_size"],
        }
        return
    leaves = {"ssm_in.weight": "linear_attention", "attn_q.weight": "full_attention", "ffn_gate_inp.weight": "moe"}
    config |= {
        "layers_block_type": [
            next((kind for leaf, kind in leaves.items() if keys.has(f"blk.{number}.{leaf}")), "mlp")
            for number in range(layers)
        ],
        "mamba_head_dim": keys.need("ssm.inner_size") // config["mamba_num_heads"],
        "use_conv_bias": keys.in_any_layer("ssm_conv1d.bias", layers),
        "use_bias": keys.in_any_layer("ssm_in.bias", layers),
    }


def _add_latent(keys: _Keys, config: dict[str, Any], layers: int) -> None:
    """Multi-head latent attention; what files before its keys and values were split call it is understood."""
    turned = keys.need("rope.dimension_count")
    head = keys.get("attention.key_length_mla") or keys.need("attention.key_length")
    config |= {
        "qk_rope_head_dim": turned,
        "qk_nope_head_dim": head - turned,
        "v_head_dim": keys.get("attention.value_length_mla") or keys.need("attention.value_length"),
        "head_dim": turned,
        "num_key_value_heads": config["num_attention_heads"],
        "q_lora_rank": config.get("q_lora_rank"),  # None: queries are one map
    }
    if keys.arch == "deepseek2":
        sigmoid = keys.get("expert_gating_func") == SIGMOID or keys.in_any_layer("exp_probs_b.bias", layers)
        grouped = config["n_group"] > 1
        if not sigmoid:
            config |= {"model_type": "deepseek_v2", "topk_method": "group_limited_greedy" if grouped else "greedy"}
    else:
        dense = config["first_k_dense_replace"]
        config["mlp_layer_types"] = ["dense" if number < dense else "sparse" for number in range(layers)]
        del config["head_dim"]


def _pattern(keys: _Keys, layers: int, interval: int) -> list[str]:
    """Which layers see a window only: a list in the file, or all but each `interval`-th."""
    found = keys.get("attention.sliding_window_pattern", interval)
    if isinstance(found, list):
        return ["sliding_attention" if local else "full_attention" for local in found[:layers]]
    return ["full_attention" if (i + 1) % found == 0 else "sliding_attention" for i in range(layers)]


# ---- rotary embeddings -----------------------------------------------------------------------------------------------


def _add_rope_scaling(keys: _Keys, config: dict[str, Any]) -> list[str]:
    file = keys.file
    kind, factor = keys.get("rope.scaling.type", "none"), keys.get("rope.scaling.factor", 1.0)
    if "rope_factors_long.weight" in file.tensors or "rope_factors_short.weight" in file.tensors:
        del config["model_type"]
        return [f"{file.label}: rope factors for short and long texts are not read; put its config.json beside it"]
    if "rope_freqs.weight" in file.tensors and keys.arch != "gemma4":
        scaling = _llama3_scaling(file, config)
        if scaling is None:
            del config["model_type"]
            return [
                f"{file.label}: the factors in rope_freqs.weight are not llama3's usual ones, so that the model cannot "
                f"be run from this file alone; put its config.json beside it"
            ]
        config["rope_scaling"] = scaling
    elif kind == "linear" and factor != 1.0:
        config["rope_scaling"] = {"rope_type": "linear", "factor": factor}
    elif kind == "yarn":
        config["rope_scaling"] = _yarn(keys, factor)
    elif kind not in ("none", "linear"):
        del config["model_type"]
        return [f"{file.label}: rope scaling of type {kind!r} is not known here; put its config.json beside it"]
    return []


def _yarn(keys: _Keys, factor: float) -> dict[str, Any]:
    scaling: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": keys.get("rope.scaling.original_context_length"),
    }
    for key in ("beta_fast", "beta_slow"):
        value = keys.get(f"rope.scaling.yarn_{key}")
        if value is not None:
            scaling[key] = value
    multiplier = keys.get("rope.scaling.yarn_log_multiplier")
    if multiplier is not None:  # DeepSeek's is a tenth of the field
        scale = multiplier if keys.arch == "mistral3" else _short(10 * multiplier)
        scaling |= {"mscale": scale, "mscale_all_dim": scale}
    if keys.arch == "gpt-oss":
        scaling["truncate"] = False
    return scaling


def _llama3_scaling(file: GgufFile, config: dict[str, Any]) -> dict[str, Any] | None:
    """The llama3 scaling whose factors are stored, if it has the constants that all Llama 3 models have."""
    stored = _rope_factors(file)
    if stored is None:
        return None
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


def _rope_factors(file: GgufFile) -> tuple[float, ...] | None:
    info = file.tensors["rope_freqs.weight"]
    return struct.unpack(f"<{info.numel}f", file.read(info)) if info.type.name == "F32" else None


# ---- Gemma -----------------------------------------------------------------------------------------------------------


def _add_gemma(keys: _Keys, config: dict[str, Any]) -> None:
    # "gelu_pytorch_tanh" is what every Gemma computes, whatever its config.json calls it
    arch = keys.arch
    config["hidden_activation"] = config["hidden_act"] = "gelu_pytorch_tanh"
    if arch == "gemma4":
        _add_gemma4(keys, config)
    if arch in ("gemma", "gemma4"):
        return
    large = config["num_hidden_layers"] == GEMMA_27B_LAYERS[arch]
    config["query_pre_attn_scalar"] = (
        config["hidden_size"] // config["num_attention_heads"] if large else config["head_dim"]
    )
    if arch == "gemma2":
        config["attn_logit_softcapping"] = keys.get("attn_logit_softcapping", 50.0)
        config["final_logit_softcapping"] = keys.get("final_logit_softcapping", 30.0)
        return
    config["rope_local_base_freq"] = keys.get("rope.freq_base_swa", GEMMA3_LOCAL_ROPE)
    config["final_logit_softcapping"] = keys.get("final_logit_softcapping")
    config["layer_types"] = _pattern(keys, config["num_hidden_layers"], 6)


def _add_gemma4(keys: _Keys, config: dict[str, Any]) -> None:
    """Head sizes, key heads and rotary embeddings of two kinds of layers; whole ones turn a part of their frequencies,
    and those that do not turn are divided by a number beyond all others."""
    layers = config["num_hidden_layers"]
    config["final_logit_softcapping"] = config["final_logit_softcapping"] or None  # 0 turns it off
    config["layer_types"] = types = _pattern(keys, layers, 6)
    config["global_head_dim"] = config["head_dim"]
    config["head_dim"] = keys.get("attention.key_length_swa", config["head_dim"])
    key_heads = keys.get("attention.head_count_kv")
    if isinstance(key_heads, list):
        by_type: Mapping[str, int] = dict(zip(types, key_heads, strict=False))
        config["num_key_value_heads"] = by_type.get("sliding_attention", max(key_heads))
        config["num_global_key_value_heads"] = by_type.get("full_attention", max(key_heads))
    whole = [number for number, kind in enumerate(types) if kind == "full_attention"]
    config["attention_k_eq_v"] = any(
        keys.has(f"blk.{number}.attn_k.weight") and not keys.has(f"blk.{number}.attn_v.weight") for number in whole
    )
    sizes = keys.get("feed_forward_length")
    config["use_double_wide_mlp"] = isinstance(sizes, list) and max(sizes) > min(sizes)
    config["intermediate_size"] = min(sizes) if isinstance(sizes, list) else sizes
    config["enable_moe_block"] = bool(config.get("num_experts"))
    config["vocab_size_per_layer_input"] = config["vocab_size"]
    factors = _rope_factors(keys.file) if keys.has("rope_freqs.weight") else None
    turned = sum(factor < SMALLEST_UNTURNED for factor in factors) / len(factors) if factors else 1.0
    config["rope_parameters"] = {
        "full_attention": {
            "rope_type": "proportional",
            "rope_theta": config.pop("rope_theta"),
            "partial_rotary_factor": turned,
        },
        "sliding_attention": {"rope_type": "default", "rope_theta": keys.get("rope.freq_base_swa", GEMMA3_LOCAL_ROPE)},
    }
