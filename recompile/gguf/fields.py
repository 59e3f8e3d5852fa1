"""Which key of a GGUF file is which field of a config.json, for each architecture: one table for both directions.

Facts of llama.cpp's loader and converter; what the engine computes without a key is a constant here, which a
config.json has to agree with. `recompile.gguf.config` and `recompile.gguf.keys` read and write by this table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

REQUIRED: Any = object()


@dataclass(frozen=True)
class Field:
    """One hyperparameter.

    key:     below the architecture's name; name: in config.json; kind: of the key's value
    default: what config.json gets where a file lacks the key; None: the field is left out; REQUIRED: an error
    """

    key: str
    name: str
    kind: str = "u32"
    default: Any = REQUIRED


def _experts(count: str = "num_experts", used: str = "num_experts_per_tok") -> tuple[Field, ...]:
    return (Field("expert_count", count), Field("expert_used_count", used))


_EXPERT_SIZE = Field("expert_feed_forward_length", "moe_intermediate_size")
_SHARED_SIZE = Field("expert_shared_feed_forward_length", "shared_expert_intermediate_size")
_WINDOW = Field("attention.sliding_window", "sliding_window")
_GROUPED = (  # DeepSeek's router and its descendants
    *_experts("n_routed_experts"),
    _EXPERT_SIZE,
    Field("leading_dense_block_count", "first_k_dense_replace", default=0),
    Field("expert_shared_count", "n_shared_experts", default=None),
    Field("expert_group_count", "n_group", default=1),
    Field("expert_group_used_count", "topk_group", default=1),
    Field("expert_weights_scale", "routed_scaling_factor", "f32", 1.0),
    Field("expert_weights_norm", "norm_topk_prob", "bool", False),
)
_NEXTN = Field("nextn_predict_layers", "num_nextn_predict_layers", default=0)
_LATENT = (
    Field("attention.q_lora_rank", "q_lora_rank", default=None),
    Field("attention.kv_lora_rank", "kv_lora_rank"),
)
_INDEXER = (
    Field("attention.indexer.head_count", "index_n_heads"),
    Field("attention.indexer.key_length", "index_head_dim"),
    Field("attention.indexer.top_k", "index_topk"),
)
_LINEAR = (
    Field("ssm.conv_kernel", "linear_conv_kernel_dim"),
    Field("ssm.state_size", "linear_key_head_dim"),
    Field("ssm.group_count", "linear_num_key_heads"),
    Field("ssm.time_step_rank", "linear_num_value_heads"),
)
_GRANITE = (
    Field("attention.scale", "attention_multiplier", "f32", 1.0),
    Field("embedding_scale", "embedding_multiplier", "f32", 1.0),
    Field("residual_scale", "residual_multiplier", "f32", 1.0),
    Field("logit_scale", "logits_scaling", "f32", 1.0),
)
_STATE = (
    Field("ssm.conv_kernel", "mamba_d_conv"),
    Field("ssm.state_size", "mamba_d_state"),
    Field("ssm.group_count", "mamba_n_groups"),
    Field("ssm.time_step_rank", "mamba_n_heads"),
)
_NEMOTRON_H = (
    Field("ssm.conv_kernel", "conv_kernel"),
    Field("ssm.state_size", "ssm_state_size"),
    Field("ssm.group_count", "n_groups"),
    Field("ssm.time_step_rank", "mamba_num_heads"),
)
_LOGIT_SCALE = Field("logit_scale", "logit_scale", "f32")

FIELDS: dict[str, tuple[Field, ...]] = {
    "qwen2moe": (*_experts(), _EXPERT_SIZE, _SHARED_SIZE),
    "qwen3moe": (*_experts(), _EXPERT_SIZE),
    "qwen3next": (*_experts(), _EXPERT_SIZE, _SHARED_SIZE, *_LINEAR),
    "qwen35": _LINEAR,
    "qwen35moe": (*_experts(), _EXPERT_SIZE, _SHARED_SIZE, *_LINEAR),
    "gemma2": (_WINDOW,),
    "gemma3": (_WINDOW,),
    "gemma4": (
        _WINDOW,
        Field("embedding_length_per_layer_input", "hidden_size_per_layer_input", default=0),
        Field("attention.shared_kv_layers", "num_kv_shared_layers", default=0),
        Field("final_logit_softcapping", "final_logit_softcapping", "f32", 30.0),
        Field("expert_count", "num_experts", default=None),
        Field("expert_used_count", "top_k_experts", default=None),
        Field("expert_feed_forward_length", "moe_intermediate_size", default=None),
    ),
    "glm4": (_NEXTN,),
    "glm4moe": (*_GROUPED, _NEXTN),
    "gpt-oss": (
        *_experts("num_local_experts"),
        Field("expert_feed_forward_length", "intermediate_size"),
        _WINDOW,
    ),
    "deepseek2": (*_GROUPED, *_LATENT),
    "deepseek32": (*_GROUPED, *_LATENT, *_INDEXER),
    "glm-dsa": (*_GROUPED, *_LATENT, *_INDEXER, _NEXTN),
    "dots1": _GROUPED,
    "bailingmoe2": (*_GROUPED, _NEXTN),
    "bailingmoe": (
        *_experts(),
        _EXPERT_SIZE,
        Field("leading_dense_block_count", "first_k_dense_replace", default=0),
        Field("expert_shared_count", "num_shared_experts", default=0),
        Field("expert_weights_norm", "norm_topk_prob", "bool", False),
    ),
    "llama4": (
        *_experts("num_local_experts"),
        Field("interleave_moe_layer_step", "interleave_moe_layer_step"),
        Field("feed_forward_length", "intermediate_size_mlp"),
        Field("expert_feed_forward_length", "intermediate_size"),
    ),
    "minimax-m2": (
        *_experts("num_local_experts"),
        Field("expert_feed_forward_length", "intermediate_size"),
    ),
    "granite": _GRANITE,
    "granitemoe": (
        *_GRANITE,
        *_experts("num_local_experts"),
        Field("expert_shared_feed_forward_length", "shared_intermediate_size", default=None),
    ),
    "granitehybrid": (
        *_GRANITE,
        *_STATE,
        Field("expert_count", "num_local_experts", default=0),
        Field("expert_used_count", "num_experts_per_tok", default=0),
        Field("expert_shared_feed_forward_length", "shared_intermediate_size", default=None),
    ),
    "nemotron_h": _NEMOTRON_H,
    "nemotron_h_moe": (
        *_NEMOTRON_H,
        *_experts("n_routed_experts"),
        _EXPERT_SIZE,
        Field("expert_shared_count", "n_shared_experts", default=1),
        Field("expert_shared_feed_forward_length", "moe_shared_expert_intermediate_size"),
        Field("expert_weights_norm", "norm_topk_prob", "bool", False),
        Field("expert_weights_scale", "routed_scaling_factor", "f32", 1.0),
        Field("expert_group_count", "n_group", default=1),
        Field("expert_group_used_count", "topk_group", default=1),
        Field("moe_latent_size", "moe_latent_size", default=None),
    ),
    "jamba": (
        *_experts(),
        Field("ssm.conv_kernel", "mamba_d_conv"),
        Field("ssm.state_size", "mamba_d_state"),
        Field("ssm.time_step_rank", "mamba_dt_rank"),
    ),
    "kimi-linear": (
        *_experts(used="num_experts_per_token"),
        _EXPERT_SIZE,
        *_LATENT,
        Field("leading_dense_block_count", "first_k_dense_replace", default=1),
        Field("expert_shared_count", "num_shared_experts"),
        Field("expert_group_used_count", "topk_group", default=1),
        Field("expert_weights_scale", "routed_scaling_factor", "f32", 1.0),
    ),
    "mimo2": (
        *_experts("n_routed_experts"),
        _EXPERT_SIZE,
        _WINDOW,
        Field("attention.value_length", "v_head_dim"),
        Field("attention.value_scale", "attention_value_scale", "f32", 1.0),
        Field("expert_group_count", "n_group", default=1),
        Field("expert_group_used_count", "topk_group", default=1),
    ),
    "mellum": (
        *_experts(),
        _EXPERT_SIZE,
        Field("attention.sliding_window", "sliding_window", default=None),
    ),
    "command-r": (_LOGIT_SCALE,),
    "cohere2": (_LOGIT_SCALE, _WINDOW),
    "cohere2moe": (
        _LOGIT_SCALE,
        _WINDOW,
        *_experts(),
        Field("expert_feed_forward_length", "intermediate_size"),
        Field("leading_dense_block_count", "first_k_dense_replace", default=0),
        Field("expert_shared_count", "num_shared_experts", default=0),
        Field("expert_weights_norm", "norm_topk_prob", "bool", False),
    ),
    "ernie4_5-moe": (
        *_experts("moe_num_experts", "moe_k"),
        _EXPERT_SIZE,
        Field("interleave_moe_layer_step", "moe_layer_interval"),
        Field("leading_dense_block_count", "moe_layer_start_index"),
        Field("expert_shared_count", "moe_num_shared_experts", default=0),
    ),
    "olmo2": (Field("attention.sliding_window", "sliding_window", default=None),),
    "phi3": (Field("rope.scaling.original_context_length", "original_max_position_embeddings", default=None),),
    "olmoe": (*_experts(), Field("attention.clamp_kqv", "clip_qkv", "f32", None)),
    "exaone4": (Field("attention.sliding_window", "sliding_window", default=None),),
    "exaone-moe": (
        *_experts(),
        _EXPERT_SIZE,
        _WINDOW,
        Field("leading_dense_block_count", "first_k_dense_replace", default=0),
        Field("expert_shared_count", "num_shared_experts"),
        Field("expert_group_count", "n_group", default=1),
        Field("expert_group_used_count", "topk_group", default=1),
        Field("expert_weights_scale", "routed_scaling_factor", "f32", 1.0),
        Field("expert_weights_norm", "norm_topk_prob", "bool", True),
    ),
    "hunyuan-moe": (
        *_experts("num_experts", "moe_topk"),
        Field("expert_feed_forward_length", "intermediate_size"),
        Field("expert_shared_count", "num_shared_expert", default=1),
    ),
    "lfm2": (Field("shortconv.l_cache", "conv_L_cache"),),
    "lfm2moe": (
        *_experts(),
        _EXPERT_SIZE,
        Field("shortconv.l_cache", "conv_L_cache"),
        Field("leading_dense_block_count", "num_dense_layers"),
    ),
    "olmo": (Field("attention.clamp_kqv", "clip_qkv", "f32", None),),
    "stablelm": (Field("use_parallel_residual", "use_parallel_residual", "bool", True),),
    "gptneox": (Field("use_parallel_residual", "use_parallel_residual", "bool", True),),
    "qwen3vlmoe": (*_experts(), _EXPERT_SIZE),
    "afmoe": (
        *_experts(),
        _EXPERT_SIZE,
        _WINDOW,
        Field("expert_shared_count", "num_shared_experts"),
        Field("leading_dense_block_count", "num_dense_layers"),
        Field("expert_weights_scale", "route_scale", "f32", 1.0),
        Field("expert_weights_norm", "route_norm", "bool", True),
    ),
}

# What other configs call a field, by its usual name; the first that is there counts.
OTHER_NAMES: dict[str, tuple[str, ...]] = {
    "hidden_size": ("n_embd", "n_embed"),
    "num_attention_heads": ("n_head",),
    "num_hidden_layers": ("n_layer",),
    "num_key_value_heads": ("num_kv_heads", "n_head_kv"),
    "max_position_embeddings": ("n_positions", "n_ctx", "seq_length", "model_max_length"),
    "intermediate_size": ("ffn_hidden_size", "n_inner"),
    "rms_norm_eps": ("layernorm_epsilon",),
}

# Types with as many heads of keys as of queries, whatever number of them a config.json carries along.
UNGROUPED = frozenset({"gpt2", "bloom", "gpt_neox"})

# The norms' epsilon where it is not `rms_norm_eps`.
EPSILON: dict[str, tuple[str, str]] = {
    "command-r": ("attention.layer_norm_epsilon", "layer_norm_eps"),
    "cohere2": ("attention.layer_norm_epsilon", "layer_norm_eps"),
    "cohere2moe": ("attention.layer_norm_epsilon", "layer_norm_eps"),
    "jais2": ("attention.layer_norm_epsilon", "layer_norm_eps"),
    "starcoder2": ("attention.layer_norm_epsilon", "norm_epsilon"),
    "stablelm": ("attention.layer_norm_epsilon", "layer_norm_eps"),
    "phi2": ("attention.layer_norm_epsilon", "layer_norm_eps"),
    "gptneox": ("attention.layer_norm_epsilon", "layer_norm_eps"),
    "gpt2": ("attention.layer_norm_epsilon", "layer_norm_epsilon"),
    "bloom": ("attention.layer_norm_epsilon", "layer_norm_epsilon"),
    "falcon": ("attention.layer_norm_epsilon", "layer_norm_epsilon"),
    "olmo": ("attention.layer_norm_epsilon", ""),
    "nemotron": ("attention.layer_norm_epsilon", "norm_eps"),
    "nemotron_h": ("attention.layer_norm_rms_epsilon", "layer_norm_epsilon"),
    "nemotron_h_moe": ("attention.layer_norm_rms_epsilon", "layer_norm_epsilon"),
    "lfm2": ("attention.layer_norm_rms_epsilon", "norm_eps"),
    "lfm2moe": ("attention.layer_norm_rms_epsilon", "norm_eps"),
}
FIXED_EPSILON = {"olmo": 1e-5}  # of models whose config does not have it
RMS_EPSILON = ("attention.layer_norm_rms_epsilon", "rms_norm_eps")

# Architectures that turn only some columns of a head; how many is in `rope.dimension_count`.
PARTIAL_ROTARY = frozenset(
    (
        "chatglm",
        "glm4",
        "glm4moe",
        "mimo2",
        "minimax-m2",
        "qwen3next",
        "qwen35",
        "qwen35moe",
        "nemotron",
        "phi3",
        "phi2",
        "stablelm",
        "gptneox",
        "bailingmoe2",
    )
)
EXPERT_SIZES = frozenset({"expert_feed_forward_length", "expert_shared_feed_forward_length"})  # old files lack them
SOFTMAX, SIGMOID = 1, 2  # expert_gating_func
SIGMOID_ROUTERS = frozenset(
    {
        "dots1",
        "glm4moe",
        "glm-dsa",
        "deepseek32",
        "lfm2moe",
        "afmoe",
        "bailingmoe2",
        "exaone-moe",
        "kimi-linear",
        "mimo2",
    }
)
LLAMA4_CHUNK = 8192
MAVERICK_EXPERTS = 128  # Llama 4 normalizes queries and keys, but for the model of 128 experts
NO_ROPE_INTERVAL = 4
EXAONE4_LAYERS = 64  # of the one EXAONE 4 with windows


FIXED: dict[str, dict[str, Any]] = {
    "phi2": {"qk_layernorm": False},
    "gpt2": {
        "activation_function": "gelu_new",
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    },
    "bloom": {"apply_residual_connection_post_layernorm": False},
    "gptneox": {"attention_bias": True},
    "falcon": {"parallel_attn": True, "alibi": False, "bias": False},
    "ernie4_5-moe": {"use_bias": False},
    "cohere2moe": {
        "rms_norm_eps": None,
        "shared_expert_combination_strategy": "average",
        "prefix_dense_sliding_window_pattern": 1,  # the first layers, without experts, turn whatever they see
    },
    "kimi-linear": {
        "moe_renormalize": True,
        "moe_router_activation_func": "sigmoid",
        "num_expert_group": 1,
        "attention_bias": False,
    },
    "mimo2": {
        "n_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "attention_bias": False,
        "add_full_attention_sink_bias": False,
    },
    "bailingmoe": {"norm_head": False, "norm_softmax": False},
    "deepseek2": {"attention_bias": False},
    "deepseek32": {"attention_bias": False},
    "glm-dsa": {"attention_bias": False},
}


def every(layers: int, interval: int, special: str, usual: str) -> list[str]:
    """`usual` for all layers but each `interval`-th."""
    return [special if (i + 1) % interval == 0 else usual for i in range(layers)]


def constants(arch: str, layers: int) -> Mapping[str, Any]:
    """What the engine computes of an architecture without being told, as fields of config.json."""
    if arch in FIXED:
        return FIXED[arch]
    if arch in ("qwen3moe", "qwen3vlmoe", "mellum"):
        return {"norm_topk_prob": True}
    if arch in ("qwen2moe", "olmoe"):
        return {"norm_topk_prob": False}
    if arch == "qwen3next":
        return {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}
    if arch == "gpt-oss":
        return {
            "layer_types": every(layers, 2, "full_attention", "sliding_attention"),
            "swiglu_limit": 7.0,
            "swiglu_alpha": 1.702,
        }
    if arch == "gemma2":
        return {"layer_types": every(layers, 2, "full_attention", "sliding_attention")}
    if arch == "gemma3":
        types = {"layer_types": every(layers, 6, "full_attention", "sliding_attention")}
        return types | {"attn_logit_softcapping": None}
    if arch in ("cohere2", "afmoe", "exaone-moe"):
        types = {"layer_types": every(layers, 4, "full_attention", "sliding_attention")}
        return types | ({"mup_enabled": True} if arch == "afmoe" else {})
    if arch == "llama4":
        return {
            "attention_chunk_size": LLAMA4_CHUNK,
            "floor_scale": LLAMA4_CHUNK,
            "attn_scale": 0.1,
            "no_rope_layers": [int((i + 1) % NO_ROPE_INTERVAL != 0) for i in range(layers)],
        }
    if arch == "smollm3":
        return {"no_rope_layers": [int((i + 1) % NO_ROPE_INTERVAL != 0) for i in range(layers)]}
    if arch == "lfm2moe":
        return {"norm_topk_prob": True}
    return {}
