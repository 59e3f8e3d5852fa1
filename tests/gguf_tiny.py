"""Tiny models of every architecture that has names in GGUF: config fields that make it small and still exercise all of
it, and values that follow from a tensor's name, so that files of two programs can be compared without either.

    BUILDS["glm4moe"]             -> (model_type, fields of its config)
    write_tiny(folder, entry)     a Hugging Face directory of an entry of tests/data/gguf_architectures.json
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

GOLDEN = Path(__file__).parent / "data" / "gguf_architectures.json"
VOCAB = 48
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "tie_word_embeddings": False, "pad_token_id": None,
    "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
HEAD = {"head_dim": 16}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LOCAL_MOE = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32}
SHARED = {"shared_expert_intermediate_size": 32}
GROUPED = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_shared_experts": 1, "n_group": 2,
    "topk_group": 1, "first_k_dense_replace": 1, "routed_scaling_factor": 2.5, "norm_topk_prob": True,
    "scoring_func": "sigmoid", "num_nextn_predict_layers": 0,
}  # fmt: skip
LATENT = {
    **GROUPED, "num_key_value_heads": 4, "kv_lora_rank": 24, "q_lora_rank": 32, "qk_rope_head_dim": 8, "v_head_dim": 16,
    "qk_nope_head_dim": 12,
}  # fmt: skip
SPARSE = {"mlp_layer_types": ["dense", "sparse"], "index_topk": 16, "index_head_dim": 16, "index_n_heads": 4}
LINEAR = {
    "linear_conv_kernel_dim": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2,
    "linear_num_value_heads": 6, "layer_types": ["linear_attention", "full_attention"], "full_attention_interval": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
}  # fmt: skip
WINDOW = {"sliding_window": 8}
FOURTH = {"num_hidden_layers": 4, "layer_types": ["sliding_attention"] * 3 + ["full_attention"]}
GEMMA4 = {
    "tie_word_embeddings": True, "layer_types": ["sliding_attention", "full_attention"], "global_head_dim": 32,
    "vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 0, "final_logit_softcapping": 30.0,
}  # fmt: skip
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "original_max_position_embeddings": 64,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}
TYPED = {**YARN, "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1, "type": "yarn"}
GRANITE = {"embedding_multiplier": 6.0, "logits_scaling": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2}
STATE = {
    "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_n_groups": 2, "mamba_d_conv": 4,
    "mamba_expand": 2, "shared_intermediate_size": 48, "position_embedding_type": "nope",
    "layer_types": ["mamba", "attention"],
}  # fmt: skip
NO_EXPERTS = {"num_local_experts": 0, "num_experts_per_tok": 0, "shared_intermediate_size": 96}
NEMOTRON_H = {
    **HEAD, "ssm_state_size": 16, "mamba_num_heads": 4, "mamba_head_dim": 32, "n_groups": 2, "conv_kernel": 4,
    "num_hidden_layers": None, "use_mamba_kernels": False,
}  # fmt: skip
SHORT_CONV = {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3, "tie_word_embeddings": True}
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
SIGLIP = {**VISION, "model_type": "siglip_vision_model", "image_size": 32, "patch_size": 8}
TOKENS = {"image_token_index": 40, "boi_token_index": 41, "eoi_token_index": 42, "mm_tokens_per_image": 4}
GEMMA3 = {**COMMON, **HEAD, **WINDOW, "tie_word_embeddings": True, "query_pre_attn_scalar": 16}
QUARTER = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}
SECTIONS = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
OLD = {"num_key_value_heads": None, "intermediate_size": None, "tie_word_embeddings": True}
QWEN_IMAGES = {
    "image_token_id": 40,
    "video_token_id": 41,
    "vision_start_token_id": 42,
    "vision_end_token_id": 43,
    "tie_word_embeddings": False,
}
GLM_SECTIONS = {
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5,
    },
}  # fmt: skip
GLM_VISION = {
    "depth": 1, "hidden_size": 32, "num_heads": 2, "image_size": 32, "patch_size": 8, "out_hidden_size": 64,
    "intermediate_size": 64,
}  # fmt: skip
GLM_IMAGES = {
    "image_token_id": 40, "video_token_id": 41, "image_start_token_id": 42, "image_end_token_id": 43,
    "video_start_token_id": 44, "video_end_token_id": 45, "tie_word_embeddings": False,
}  # fmt: skip
QWEN2_VISION = {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "patch_size": 8, "mlp_ratio": 2}
QWEN3_VISION = {
    "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 8, "out_hidden_size": 64,
    "deepstack_visual_indexes": [0],
}  # fmt: skip

BUILDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", HEAD),
    "mistral": ("mistral", HEAD),
    "mixtral": ("mixtral", {**HEAD, **LOCAL_MOE}),
    "llama of internlm 3": ("internlm3", HEAD),
    "llama of iquestcoder": ("iquestcoder", HEAD),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", HEAD),
    "qwen2moe": ("qwen2_moe", {**MOE, **SHARED, "norm_topk_prob": False}),
    "qwen3moe": ("qwen3_moe", {**HEAD, **MOE, "norm_topk_prob": True}),
    "qwen3next": ("qwen3_next", {**HEAD, **MOE, **SHARED, **LINEAR}),
    "qwen35": ("qwen3_5_text", {**LINEAR, "head_dim": 32}),
    "qwen35moe": ("qwen3_5_moe_text", {"head_dim": 32, **MOE, **SHARED, **LINEAR}),
    "gemma": ("gemma", {**HEAD, "tie_word_embeddings": True}),
    "gemma2": ("gemma2", {**HEAD, **WINDOW, "tie_word_embeddings": True, "query_pre_attn_scalar": 16}),
    "gemma3": ("gemma3_text", GEMMA3),
    "gemma3 wrapped": ("gemma3", {"text_config": GEMMA3, "vision_config": SIGLIP, **TOKENS}),
    "gemma4": (
        "gemma4_text",
        {
            **HEAD,
            **WINDOW,
            **GEMMA4,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "hidden_size_per_layer_input": 32,
            "num_kv_shared_layers": 2,
        },
    ),
    "gemma4 experts": (
        "gemma4_text",
        {
            **HEAD,
            **WINDOW,
            **GEMMA4,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 32,
        },
    ),
    "glm4": ("glm4", HEAD),
    "chatglm": ("glm", {**HEAD, "rms_norm_eps": 1e-5, "rope_parameters": {**QUARTER, "partial_rotary_factor": 0.5}}),
    "glm4 in glm4v": (
        "glm4v",
        {"text_config": {**COMMON, **GLM_SECTIONS}, "vision_config": GLM_VISION, **GLM_IMAGES},
    ),
    "glm4 in glm-ocr": (
        "glm_ocr",
        {"text_config": {**COMMON, **HEAD, **GLM_SECTIONS}, "vision_config": GLM_VISION, **GLM_IMAGES},
    ),
    "glm4moe of solar": (
        "solar_open",
        {**HEAD, **GROUPED, "first_k_dense_replace": 0, "rope_parameters": {**QUARTER, "partial_rotary_factor": 1.0}},
    ),
    "glm4moe": ("glm4_moe", {**HEAD, **GROUPED, "use_qk_norm": True, "attention_bias": True}),
    "gpt-oss": (
        "gpt_oss",
        {
            **HEAD,
            **LOCAL_MOE,
            **WINDOW,
            "rope_parameters": {**YARN, "factor": 4.0, "truncate": False},
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "deepseek2": ("deepseek_v3", LATENT),
    "deepseek2 yarn": (
        "deepseek_v3",
        {**LATENT, "rope_parameters": {**YARN, "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0}},
    ),
    "deepseek2 of version 2": (
        "deepseek_v2",
        {**LATENT, "n_group": 1, "topk_method": "greedy", "q_lora_rank": None, "scoring_func": "softmax"},
    ),
    "deepseek2 of glm": ("glm4_moe_lite", {**LATENT, "mlp_layer_types": ["dense", "sparse"]}),
    "deepseek32": ("deepseek_v32", {**LATENT, **SPARSE}),
    "glm-dsa": ("glm_moe_dsa", {**LATENT, **SPARSE}),
    "dots1": ("dots1", {**HEAD, **GROUPED, "n_group": 1}),
    "llama4": (
        "llama4_text",
        {
            **HEAD,
            **LOCAL_MOE,
            "num_hidden_layers": 4,
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": 96,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": 8192,
        },
    ),
    "mistral3": ("ministral3", {**HEAD, "rope_parameters": TYPED}),
    "mistral3 wrapped": (
        "mistral3",
        {
            "text_config": {**COMMON, **HEAD, "model_type": "ministral3", "rope_parameters": TYPED},
            "vision_config": {**VISION, "model_type": "pixtral", "image_size": 32, "patch_size": 8, "head_dim": 16},
            "image_token_index": 40,
            "tie_word_embeddings": False,
        },
    ),
    "phi3": ("phi3", {}),
    "minimax-m2": ("minimax_m2", {**HEAD, **LOCAL_MOE, "rotary_dim": 8, "scoring_func": "sigmoid"}),
    "granite": ("granite", GRANITE),
    "granitemoe": ("granitemoe", {**GRANITE, **LOCAL_MOE}),
    "granitemoe shared": ("granitemoeshared", {**GRANITE, **LOCAL_MOE, "shared_intermediate_size": 48}),
    "granitehybrid": ("granitemoehybrid", {**GRANITE, **STATE, **LOCAL_MOE}),
    "granitehybrid dense": ("granitemoehybrid", {**GRANITE, **STATE, **NO_EXPERTS}),
    "granite of a hybrid": (
        "granitemoehybrid",
        {
            **GRANITE,
            **STATE,
            **NO_EXPERTS,
            "position_embedding_type": "rope",
            "layer_types": ["attention"] * 2,
        },
    ),
    "granitemoe of a hybrid": (
        "granitemoehybrid",
        {**GRANITE, **STATE, **LOCAL_MOE, "position_embedding_type": "rope", "layer_types": ["attention"] * 2},
    ),
    "nemotron_h": ("nemotron_h", {**NEMOTRON_H, "layers_block_type": ["mamba", "attention", "mlp"]}),
    "nemotron_h_moe": (
        "nemotron_h",
        {
            **NEMOTRON_H,
            **GROUPED,
            "n_group": 1,
            "moe_shared_expert_intermediate_size": 48,
            "layers_block_type": ["mamba", "moe", "attention", "moe"],
        },
    ),
    "jamba": (
        "jamba",
        {
            "num_hidden_layers": 4,
            "attn_layer_period": 4,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "mamba_dt_rank": 32,
        },
    ),
    "kimi-linear": (
        "kimi_linear",
        {
            **LATENT,
            "q_lora_rank": None,
            "n_group": 1,
            "first_k_dense_replace": 1,
            "linear_attn_config": {
                "head_dim": 16,
                "num_heads": 4,
                "short_conv_kernel_size": 4,
                "full_attn_layers": [2],
                "kda_layers": [1, 3],
            },
            "num_hidden_layers": 3,
            "num_local_experts": 4,
        },
    ),
    "mimo2": (
        "mimo_v2_flash",
        {
            **WINDOW,
            **GROUPED,
            "n_group": 1,
            "head_dim": 24,
            "v_head_dim": 16,
            "num_key_value_heads": 1,
            "num_hidden_layers": 3,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
            "routed_scaling_factor": 1.0,
            "rms_norm_eps": 1e-5,
        },
    ),
    "jais2": ("jais2", {**HEAD, "num_key_value_heads": 4}),
    "mellum": (
        "mellum",
        {
            **HEAD,
            **WINDOW,
            **FOURTH,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "norm_topk_prob": True,
            "mlp_layer_types": ["sparse"] * 4,
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 500000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
    ),
    "command-r": ("cohere", {"tie_word_embeddings": True, "logit_scale": 0.25}),
    "cohere2": ("cohere2", {**WINDOW, **FOURTH, "tie_word_embeddings": True, "logit_scale": 0.25, "rotary_pct": 1.0}),
    "cohere2moe": (
        "cohere2_moe",
        {
            **HEAD,
            **WINDOW,
            "num_hidden_layers": 4,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
            "mlp_layer_types": ["dense"] + ["sparse"] * 3,
            "tie_word_embeddings": True,
            "logit_scale": 0.25,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "intermediate_size": 32,
            "prefix_dense_intermediate_size": 96,
            "num_shared_experts": 1,
            "expert_selection_fn": "sigmoid",
        },
    ),
    "ernie4_5": ("ernie4_5", HEAD),
    "ernie4_5-moe": (
        "ernie4_5_moe",
        {
            **HEAD,
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_intermediate_size": 48,
            "moe_layer_start_index": 1,
            "moe_layer_interval": 1,
            "moe_num_shared_experts": 1,
            "use_bias": False,
        },
    ),
    "olmo2": ("olmo2", {}),
    "olmo2 of version 3": ("olmo3", {**WINDOW, **FOURTH}),
    "olmoe": ("olmoe", {**LOCAL_MOE, "num_experts": 4}),
    "smollm3": ("smollm3", {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0]}),
    "seed_oss": ("seed_oss", HEAD),
    "exaone-moe": (
        "exaone_moe",
        {
            **HEAD,
            **MOE,
            **WINDOW,
            **FOURTH,
            "num_shared_experts": 1,
            "first_k_dense_replace": 1,
            "mlp_layer_types": ["dense"] + ["sparse"] * 3,
            "routed_scaling_factor": 2.5,
            "norm_topk_prob": True,
        },
    ),
    "exaone4": ("exaone4", {**HEAD, "sliding_window": None, "layer_types": ["full_attention"] * 2}),
    "hunyuan-dense": ("hunyuan_v1_dense", HEAD),
    "hunyuan-moe": ("hunyuan_v1_moe", {**HEAD, "num_experts": 4, "moe_topk": 2, "intermediate_size": 32}),
    "lfm2": ("lfm2", {**SHORT_CONV, "block_auto_adjust_ff_dim": False}),
    "lfm2moe": ("lfm2_moe", {**SHORT_CONV, **MOE, "num_dense_layers": 1}),
    "arcee": ("arcee", HEAD),
    "nemotron": ("nemotron", HEAD),
    "starcoder2": ("starcoder2", {"use_bias": True}),
    "stablelm": ("stablelm", {"use_qkv_bias": True, "rope_parameters": QUARTER}),
    "olmo": ("olmo", {"clip_qkv": 2.0}),
    "phi2": ("phi", {"num_key_value_heads": 4, "intermediate_size": 256, "rope_parameters": QUARTER}),
    "qwen2vl": ("qwen2_vl", {"text_config": {**COMMON, **SECTIONS}, "vision_config": QWEN2_VISION, **QWEN_IMAGES}),
    "qwen2vl of version 2.5": (
        "qwen2_5_vl",
        {
            "text_config": {**COMMON, **SECTIONS},
            "vision_config": {
                "depth": 1,
                "hidden_size": 32,
                "intermediate_size": 64,
                "out_hidden_size": 64,
                "num_heads": 2,
                "patch_size": 8,
            },
            **QWEN_IMAGES,
        },
    ),
    "qwen3vl": (
        "qwen3_vl",
        {"text_config": {**COMMON, **HEAD, **SECTIONS}, "vision_config": QWEN3_VISION, **QWEN_IMAGES},
    ),
    "qwen3vlmoe": (
        "qwen3_vl_moe",
        {
            "text_config": {**COMMON, **HEAD, **MOE, **SECTIONS, "moe_intermediate_size": 48},
            "vision_config": QWEN3_VISION,
            **QWEN_IMAGES,
        },
    ),
    "bailingmoe": (
        "bailing_moe",
        {
            **HEAD,
            **MOE,
            "num_shared_experts": 2,
            "first_k_dense_replace": 0,
            "norm_topk_prob": True,
            "rope_theta": 600000,
            "rms_norm_eps": 1e-5,
            "norm_head": False,
            "norm_softmax": False,
            "use_bias": False,
            "use_qkv_bias": False,
            "hidden_act": "silu",
        },
    ),
    "bailingmoe2": ("sarvam_moe", {**HEAD, **GROUPED, "rope_parameters": {**QUARTER, "partial_rotary_factor": 0.5}}),
    "gpt2": ("gpt2", {**OLD, "n_positions": 256, "n_ctx": 256, "n_embd": 64, "n_layer": 2, "n_head": 4}),
    "bloom": ("bloom", {**OLD, "n_layer": 2, "n_head": 4, "seq_length": 256}),
    "gptneox": ("gpt_neox", {"num_key_value_heads": None, "rotary_pct": 0.25}),
    "falcon": ("falcon", {**OLD, "max_position_embeddings": 2048, "num_kv_heads": 1}),
    "falcon of groups": (
        "falcon",
        {
            **OLD,
            "max_position_embeddings": 2048,
            "num_kv_heads": 2,
            "new_decoder_architecture": True,
            "num_ln_in_parallel_attn": 1,
        },
    ),
    "falcon of two norms": (
        "falcon",
        {**OLD, "max_position_embeddings": 2048, "num_kv_heads": 2, "new_decoder_architecture": True},
    ),
    "llama in llava": (
        "llava",
        {
            "text_config": {**COMMON, **HEAD, "model_type": "llama"},
            "vision_config": {**VISION, "model_type": "clip_vision_model", "image_size": 32, "patch_size": 8},
            "image_token_index": 40,
        },
    ),
    "llama in smolvlm": (
        "smolvlm",
        {
            "text_config": {**COMMON, **HEAD, "model_type": "llama"},
            "vision_config": {**VISION, "model_type": "smolvlm_vision", "image_size": 32, "patch_size": 8},
            "image_token_id": 40,
            "scale_factor": 2,
        },
    ),
    "lfm2 in lfm2-vl": (
        "lfm2_vl",
        {
            "text_config": {**COMMON, **SHORT_CONV, "block_auto_adjust_ff_dim": False, "model_type": "lfm2"},
            "vision_config": {**VISION, "model_type": "siglip2_vision_model", "num_patches": 16, "patch_size": 8},
            "image_token_id": 40,
            "projector_hidden_size": 64,
        },
    ),
    "afmoe": (
        "afmoe",
        {**HEAD, **MOE, **WINDOW, **FOURTH, "num_shared_experts": 1, "num_dense_layers": 1, "mup_enabled": True},
    ),
}
_LING = {
    "input_layernorm": [64],
    "attention.query_key_value": [128, 64],
    "attention.dense": [64, 64],
    "post_attention_layernorm": [64],
    "mlp.gate": [4, 64],
    "mlp.experts.{}.gate_proj": [4, 32, 64],
    "mlp.experts.{}.up_proj": [4, 32, 64],
    "mlp.experts.{}.down_proj": [4, 64, 32],
    "mlp.shared_experts.gate_proj": [64, 64],
    "mlp.shared_experts.up_proj": [64, 64],
    "mlp.shared_experts.down_proj": [64, 64],
}
SHAPES: dict[str, dict[str, list[int]]] = {  # of what transformers has no class for
    "bailingmoe": {f"model.layers.{n}.{leaf}.weight": shape for n in range(2) for leaf, shape in _LING.items()}
    | {"model.word_embeddings.weight": [VOCAB, 64], "model.norm.weight": [64], "lm_head.weight": [VOCAB, 64]},
}
EXTRA = (
    "seq_length",
    "n_ctx",
    "scoring_func",
    "rotary_pct",
    "full_attention_interval",
    "global_head_dim",
)  # transformers drops them
STORED: dict[str, dict[str, Any]] = {  # as the published config.json says it (None: does not)
    "exaone-moe": {
        "architectures": ["ExaoneMoEForCausalLM"],
        "num_nextn_predict_layers": 0,
    },
    "bailingmoe2": {  # Sarvam's: of its router's bias the converter takes the mean away, which chooses the same experts
        "architectures": ["BailingMoeV2ForCausalLM"],
        "num_experts": 4,
        "num_shared_experts": 1,
        "score_function": "sigmoid",
    },
    "mimo2": {
        "hybrid_layer_pattern": [0, 1, 1],
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 24,
        "swa_v_head_dim": 16,
        "topk_method": "noaux_tc",
        "layernorm_epsilon": 1e-5,
        "partial_rotary_factor": 0.334,
        "rope_theta": 5000000.0,
        "swa_rope_theta": 10000.0,
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
    }
    | dict.fromkeys(("rope_parameters", "rms_norm_eps")),
    "kimi-linear": {
        "num_experts": 4,
        "num_experts_per_token": 2,
        "num_shared_experts": 1,
        "num_expert_group": 1,
        "moe_renormalize": True,
        "moe_router_activation_func": "sigmoid",
        "model_max_length": 256,
        "first_k_dense_replace": 1,
        "linear_attn_config": {
            "head_dim": 16,
            "num_heads": 4,
            "short_conv_kernel_size": 4,
            "full_attn_layers": [2],
            "kda_layers": [1, 3],
        },
    }
    | dict.fromkeys(("mlp_layer_types", "layer_types")),
    "chatglm": {"seq_length": 256},  # the converter takes the width of the states for it otherwise
    "bailingmoe": {"architectures": ["BailingMoeForCausalLM"]},
    "llama of internlm 3": {"architectures": ["InternLM3ForCausalLM"]},
    "llama of iquestcoder": {"architectures": ["IQuestCoderForCausalLM"]},
    "llama in llava": {"text_config": {"architectures": ["LlamaForCausalLM"]}},
    "llama in smolvlm": {"text_config": {"architectures": ["VLlama3ForCausalLM"]}},
    "lfm2 in lfm2-vl": {"text_config": {"architectures": ["Lfm2ForCausalLM"]}},
    "granitehybrid": {"layer_types": ["mamba", "attention"], "position_embedding_type": "nope"},
    "granitehybrid dense": {"layer_types": ["mamba", "attention"], "position_embedding_type": "nope"},
    "granite of a hybrid": {"layer_types": ["attention"] * 2},
    "granitemoe of a hybrid": {"layer_types": ["attention"] * 2},
    "nemotron_h": {
        "hybrid_override_pattern": "M*-",
        "layers_block_type": None,
        "num_hidden_layers": 3,
        "rms_norm_eps": 1e-5,
    }
    | dict.fromkeys(
        (
            "num_experts_per_tok",
            "n_routed_experts",
            "n_shared_experts",
            "moe_intermediate_size",
            "n_group",
            "topk_group",
        )
    ),
    "nemotron_h_moe": {
        "hybrid_override_pattern": "ME*E",
        "layers_block_type": None,
        "num_hidden_layers": 4,
        "rms_norm_eps": 1e-5,
        "scoring_func": None,
    },
    "hunyuan-moe": {"moe_intermediate_size": [32, 32], "num_shared_expert": [1, 1], "moe_topk": [2, 2]},
    "afmoe": {"route_norm": True, "score_func": "sigmoid"},
    "mistral3": {"rope_parameters": TYPED},
    "mistral3 wrapped": {"text_config": {"rope_parameters": TYPED}},
}

TURNED = {
    "qwen3vlmoe": ("experts.gate_up_proj", "experts.down_proj")
}  # in published files, not in those of transformers 5

RENAMED = {  # transformers writes the first layer's maps, which are no experts, under the name of the others
    "kimi-linear": ("layers.0.block_sparse_moe.", "layers.0.mlp.")
}


def fields_of(name: str) -> tuple[str, dict[str, Any]]:
    """The model type and the whole config of an entry of BUILDS."""
    model_type, fields = BUILDS[name]
    return model_type, fields if "text_config" in fields else {**COMMON, **fields}


def values_of(name: str, shape: tuple[int, ...] | list[int]) -> Tensor:
    """Numbers between -1 and 1 that bfloat16 holds exactly; they follow from the name and the place alone."""
    count = 1
    for size in shape:
        count *= size
    numbers = (torch.arange(count, dtype=torch.int64) * 37 + zlib.crc32(name.encode())) % 251
    return ((numbers - 125).float() / 128).reshape(tuple(shape))


def spelled_out(shapes: Mapping[str, list[int]]) -> dict[str, list[int]]:
    """`x.{}.y: [3, 4, 5]`, three tensors [4, 5], under names of their own."""
    found = {}
    for name, shape in shapes.items():
        if "{}" in name:
            found |= {name.format(number): shape[1:] for number in range(shape[0])}
        else:
            found[name] = shape
    return found


def sound_values(name: str, shape: tuple[int, ...] | list[int]) -> Tensor:
    """Seeded numbers with which a model's states stay of one size: norms near one, maps by their width."""
    drawn = torch.randn(tuple(shape), generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    if "norm" in name and name.endswith("weight"):
        return 1 + 0.1 * drawn
    if len(shape) < 2 or name.endswith("bias"):
        return 0.1 * drawn
    return drawn / 4 if "embed" in name else drawn / 8  # widths are 32 to 96


def write_tiny(
    folder: Path,
    entry: Mapping[str, Any],
    values: Callable[[str, list[int]], Tensor] = values_of,
) -> Path:
    folder.mkdir()
    config = {**entry["config"], "pad_token_id": None}  # not transformers' own, which this vocabulary has not
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {name: values(name, shape) for name, shape in spelled_out(entry["hf"]).items()}
    save_file({name: value.bfloat16() for name, value in tensors.items()}, folder / "model.safetensors")
    return folder
