"""Tiny models of many architectures with every stored tensor random, buffers too, made by transformers' own classes.

A row names a type and the fields that make it small and still use all of it. Types that a user quantizes and types that
do something of their own around or between layers: other embeddings, per-layer inputs, keys shared between layers, a
head with multipliers, pairs as results, streams beside each other, towers.
"""

from __future__ import annotations

import copy
import functools
import math
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests import tiny

VOCAB = 96
COMMON = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "tie_word_embeddings": False,
    "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
NO_HEAD_DIM = {key: value for key, value in COMMON.items() if key != "head_dim"}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
ROUTED = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_shared_experts": 1, "n_group": 2,
    "topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 1.5,
}  # fmt: skip
MLA = {
    **NO_HEAD_DIM, **ROUTED, "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 4,
    "v_head_dim": 8, "qk_nope_head_dim": 8,
}  # fmt: skip
SLIDING = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
LINEAR = {
    "linear_conv_kernel_dim": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
          "image_size": 16, "patch_size": 8}  # fmt: skip
GEMMA = {**COMMON, **SLIDING, "tie_word_embeddings": True, "query_pre_attn_scalar": 8}
TYPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", COMMON),
    "gpt2": ("gpt2", {"vocab_size": VOCAB, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}),
    "bloom": ("bloom", {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "camembert": ("camembert", {
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 64, "is_decoder": True,
    }),
    "opt-projected": ("opt", {
        **NO_HEAD_DIM, "ffn_dim": 48, "word_embed_proj_dim": 16, "do_layer_norm_before": True, "pad_token_id": 1,
    }),
    "falcon": ("falcon", {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}),
    "granite": ("granite", {**NO_HEAD_DIM, "embedding_multiplier": 6.0, "logits_scaling": 2.0}),
    "falcon-h1": ("falcon_h1", {
        **COMMON, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8,
        "mamba_n_groups": 1, "lm_head_multiplier": 0.5, "embedding_multiplier": 2.0,
    }),
    "glm4-moe": ("glm4_moe", {**COMMON, **ROUTED, "first_k_dense_replace": 1, "use_qk_norm": True}),
    "deepseek-v3": ("deepseek_v3", {**MLA, "first_k_dense_replace": 1}),
    "glm-5": ("glm_moe_dsa", {
        **MLA, "mlp_layer_types": ["dense", "sparse"], "index_topk": 6, "index_head_dim": 8, "index_n_heads": 2,
    }),
    "minimax-m2": ("minimax_m2", {**COMMON, "num_local_experts": 4, "num_experts_per_tok": 2, "rotary_dim": 8}),
    "gpt-oss": ("gpt_oss", {
        **COMMON, **SLIDING, "intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2,
    }),
    "qwen3-next": ("qwen3_next", {**COMMON, **MOE, **LINEAR, "shared_expert_intermediate_size": 16}),
    "granitemoe": ("granitemoe", {**NO_HEAD_DIM, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "dbrx": ("dbrx", {
        "vocab_size": VOCAB, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "ffn_act_fn": {"name": "silu"}},
    }),
    "mamba2": ("mamba2", {
        "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 4, "head_dim": 16, "state_size": 8,
        "n_groups": 1, "expand": 2, "chunk_size": 8, "tie_word_embeddings": False, "pad_token_id": None,
        "bos_token_id": None, "eos_token_id": None,
    }),
    "jetmoe": ("jetmoe", {
        **{key: NO_HEAD_DIM[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                                             "max_position_embeddings", "tie_word_embeddings", "pad_token_id",
                                             "bos_token_id", "eos_token_id")},
        "num_key_value_heads": 2, "kv_channels": 8, "num_local_experts": 4, "num_experts_per_tok": 2,
    }),
    "llama4-text": ("llama4_text", {
        **COMMON, "intermediate_size_mlp": 48, "num_local_experts": 4, "interleave_moe_layer_step": 2,
        "attention_chunk_size": 8,
    }),
    "lfm2": ("lfm2", {
        **NO_HEAD_DIM, "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False,
    }),
    "nemotron-h": ("nemotron_h", {
        **COMMON, "layers_block_type": ["mamba", "moe", "attention", "mlp"], "ssm_state_size": 8, "mamba_num_heads": 4,
        "mamba_head_dim": 8, "n_groups": 1, "chunk_size": 8, "moe_shared_expert_intermediate_size": 16,
        **{key: ROUTED[key] for key in ("n_routed_experts", "n_shared_experts", "moe_intermediate_size")},
        "num_experts_per_tok": 2,
    }),
    "gemma3n": ("gemma3n_text", {
        **GEMMA, "num_hidden_layers": 4, "layer_types": SLIDING["layer_types"] * 2, "vocab_size_per_layer_input": VOCAB,
        "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 2, "altup_num_inputs": 2, "laurel_rank": 4,
        "activation_sparsity_pattern": [0.0] * 4, "intermediate_size": 48,
    }),
    "gemma4": ("gemma4_text", {
        **GEMMA, "num_hidden_layers": 4, "layer_types": SLIDING["layer_types"] * 2, "vocab_size_per_layer_input": VOCAB,
        "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 2,
    }),
    "gemma3-vision": ("gemma3", {
        "text_config": {**GEMMA, "model_type": "gemma3_text"}, "mm_tokens_per_image": 4,
        "vision_config": {"model_type": "siglip_vision_model", **VISION},
    }),
    "qwen2-vl": ("qwen2_vl", {
        "text_config": {
            **NO_HEAD_DIM,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
        },
        "vision_config": {
            "depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "patch_size": 8, "mlp_ratio": 1,
        },
    }),
    # no sequence of layers, each run once: rounds of layers, of two stacks in turn, a head that reads several layers, a
    # state with places that are no tokens
    "dory": ("dory", {
        **COMMON, "num_hidden_layers": 6, "n_input_layers": 2, "n_recurrent_layers": 2, "n_output_layers": 2,
        "layer_types": ["sliding_attention", "mlp", "full_attention", "mlp", "full_attention", "mlp"],
    }),
    "hrm-text": ("hrm_text", {
        **COMMON, "num_key_value_heads": 4, "num_layers_per_stack": 1, "num_hidden_layers": 8, "L_cycles": 3,
        "embedding_scale": 2.0,
    }),
    "inkling2": ("inkling2_text", {
        **COMMON, "unpadded_vocab_size": VOCAB, "num_hidden_layers": 3, "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2, "swa_head_dim": 8, "sliding_window_size": 6, "d_rel": 4, "rel_extent": 32,
        "layer_types": ["hybrid_sliding", "hybrid", "hybrid"], "moe_intermediate_size": 16, "n_routed_experts": 4,
        "num_experts_per_tok": 2, "n_layers_per_attn_res_block": 1,
    }),
    "cpm-ant": ("cpmant", {
        "vocab_size": VOCAB, "hidden_size": 32, "num_attention_heads": 4, "dim_head": 8, "dim_ff": 48,
        "num_hidden_layers": 2, "prompt_length": 3, "prompt_types": 4, "segment_types": 4,
        "position_bias_num_buckets": 32, "position_bias_max_distance": 64, "init_std": 0.1,
    }),
}  # fmt: skip
_made: list[Any] = []


@torch.no_grad()
def randomize(model: Any) -> None:
    """Every stored tensor, parameters and buffers, so large that it matters and so small that nothing overflows."""
    generator = torch.Generator().manual_seed(0)
    embedding = model.get_input_embeddings().weight
    for value in {id(value): value for value in model.state_dict(keep_vars=True).values()}.values():
        if not value.is_floating_point():
            continue
        noise = torch.randn(value.shape, generator=generator)
        if value is embedding:
            value.copy_(noise * 0.5)
        elif value.dim() < 2 or value.shape[-1] == 1:
            value.add_(noise * 0.1)
        else:
            value.copy_(noise / math.sqrt(max(value.shape[-1], 16)))


@functools.cache
def checkpoint(name: str) -> Path:
    """The directory of one of TYPES, its weights float32."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

    if not _made:
        _made.append(tempfile.TemporaryDirectory())
    model_type, fields = TYPES[name]
    torch.manual_seed(0)
    config = CONFIG_MAPPING[model_type](**copy.deepcopy(fields))
    kind = AutoModelForImageTextToText if "vision_config" in fields else AutoModelForCausalLM
    model = kind.from_config(config, dtype=torch.float32)
    randomize(model)
    directory = Path(_made[0].name) / name
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    model.save_pretrained(directory)
    tiny.write_tokenizer(directory)
    return directory


def rows(count: int, tokens: int) -> Tensor:
    """int64 [count, tokens]"""
    return torch.randint(2, VOCAB, (count, tokens), generator=torch.Generator().manual_seed(1))


def plain_model(directory: Path, **arguments: Any) -> Any:
    """What transformers loads, float32."""
    import json

    import transformers

    name = json.loads((directory / "config.json").read_text())["architectures"][0]
    return getattr(transformers, name).from_pretrained(directory, dtype=torch.float32, **arguments).eval()
