"""A tiny model of any type that transformers lists, made from its default configuration by shrinking every size.

    python scripts/tiny_configs.py MODEL_TYPE DIR        writes DIR with random weights, every stored tensor random

Sizes are recognised by the words of a field's name (hidden, layers, heads, experts ...), not by model type, so that a
type that transformers lists tomorrow is made as well. Where a default configuration cannot be shrunk so, the message of
transformers says why and the type counts as not made.
"""

from __future__ import annotations

import copy
import math
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

VOCAB = 384
HIDDEN = 64
LAYERS = 2

# The first pattern that a field's name matches in full gives its size.
SIZES: tuple[tuple[str, int], ...] = (
    (r".*vocab_size.*", VOCAB),
    (
        r"(text_|encoder_|decoder_)?(max_position_embeddings|n_positions|max_target_positions|max_source_positions|n_ctx"
        r"|max_seq_len|max_sequence_length|seq_length|context_length|original_max_position_embeddings)",
        256,
    ),
    (r"num_key_value_heads|num_kv_heads|n_kv_heads|multi_query_group_num|num_query_groups|swa_num_key_value_heads", 2),
    (
        r".*(num|n)_group|n_groups|topk_group|mamba_n_groups|num_nextn_predict_layers|num_mtp_layers|n_shared_experts"
        r"|num_shared_experts|.*num_shared_expert.*|expert_group_size",
        1,
    ),
    (
        r"(num_experts_per_tok(en)?|moe_top_?k|top_k_experts|.*experts_per_tok.*|num_selected_experts|top_k|moe_k"
        r"|num_activated_experts|router_top_k)",
        2,
    ),
    (r".*(num|n)_(local_|routed_)?experts|moe_num_experts|.*num_experts|zero_expert_num", 4),
    (r".*(num|n)_(.*_)?heads|n_head|.*attention_heads|num_v_heads|num_head|heads", 4),
    (r".*(num|n)_(.*_)?layers?|n_layer|depth|.*_layers_num|num_blocks|num_layers|layers", LAYERS),
    (r"qk_rope_head_dim|rotary_dim|rope_dim|rope_head_dim", 8),
    (
        r"(.*_)?head_dim.*|.*_head_size|v_head_dim|qk_nope_head_dim|attention_key_size|d_kv|head_size|d_head|.*key_head_dim"
        r"|.*value_head_dim|mamba_d_head|mamba_headdim|kv_channels",
        16,
    ),
    (r".*lora_rank|.*_rank", 32),
    (r".*(state_size|d_state)|ssm_state_size|n_state", 16),
    (r".*(conv_kernel|d_conv|conv_kernel_size|conv_l_cache|conv_kernel_dim).*", 4),
    (r".*chunk_size", 16),
    (r".*(intermediate_size|ffn_dim|d_ff|dff|ffn_hidden_size|inner_dim|n_inner|dim_ff|expert_dim|mlp_hidden).*", 128),
    (
        r"(hidden_size|d_model|n_embd|dim|embed_dim|emb_dim|codebook_dim|adapter_in_dim|adapter_out_dim|adapter_input_size|adapter_output_size|embedding_size|word_embed_proj_dim|hidden_dim|encoder_hidden_size"
        r"|projection_dim|projector_.*dim|out_hidden_size|vision_output_dim|output_dim|lru_width|proj_dim|mm_hidden_size"
        r"|attention_hidden_size|residual_dim|model_dim|text_hidden_size|vision_hidden_size|output_proj_dims)",
        HIDDEN,
    ),
    (r"hidden_size_per_layer_input", 16),
    (r"base_channels", 32),
    (r"(.*sliding_window.*|attention_window|.*window_size|attention_chunk_size|index_topk)", 8),
    (r"image_size|input_size|force_image_size", 32),
    (r".*patch_size", 8),
)
WHOLE = re.compile("|".join(f"(?:{pattern})" for pattern, _ in SIZES))
# What the words of a name cannot say: sizes that have to fit each other.
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_expand": 2, "mamba_d_state": 16}
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
FACTS: dict[str, Mapping[str, Any]] = {
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 128},
    "granitemoehybrid": {**_MAMBA, "layer_types": ["mamba", "attention"], "shared_intermediate_size": 128},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "dots1": {"num_experts_per_tok": 2, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "gemma3n_text": {"num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"]},
    "gemma4_text": {"num_kv_shared_layers": 0},
    "nemotron": {"num_key_value_heads": 2},
    "muse_spark_audio": {"num_hidden_layers": 4, "depths": [1, 1, 1, 1]},
    "qwen4_exp_text": {
        "head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "ngram_vocab_size_base": 64,
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "bailing_hybrid": {"num_expert_group": 1},
    "apertus1p5": {
        "image_token_offset": VOCAB - 64,
        "audio_token_offset": VOCAB - 32,
        "vision_config": {"codebook_size": 32},
        "audio_config": {"codebook_size": 32},
    },
    "blt_local_encoder": {"hidden_size_global": HIDDEN},
    "blt_local_decoder": {"hidden_size_global": HIDDEN},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "chameleon": {"vocabulary_map": {"<image>": 330}},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "dbrx": {"n_heads": 4, "n_layers": 2, "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32},
    "dory": {
        "n_input_layers": 2,
        "n_recurrent_layers": 2,
        "n_output_layers": 2,
        "layer_types": ["sliding_attention", "mlp", "full_attention", "mlp", "full_attention", "mlp"],
    },
    "dots3_note_text": {"head_dim": 24},
    "emu3": {"vocabulary_map": {"<image>": 330, "<|extra_200|>": 331}},
    "ernie4_5_vl_moe_text": {"rope_parameters": {"mrope_section": [3, 3, 2]}},
    "glm5_next_text": {"index_kpool": 4},
    "granite4_vision": {"deepstack_layer_map": [[-1, 0]], "downsample_rate": "1/1"},
    "mistral_large4_text": {"kv_source_layers": [0, 1]},
    "molmo2_adapter": {"vision_feature_layer": [1, 0]},
    "reformer": {
        "is_decoder": True,
        "attn_layers": ["local", "lsh"],
        "axial_pos_shape": [16, 16],
        "num_buckets": 4,
        "axial_pos_embds_dim": [32, 32],
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
        "feed_forward_size": 128,
        "hash_seed": 1,  # else no two runs agree
    },
    "step3p5": {"sliding_window": 8},
    "xlstm": {"embedding_dim": HIDDEN},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "n_mamba_heads": 2,
        "mamba_dt_rank": 8,
        "attention_hidden_size": 2 * HIDDEN,
        "attention_head_dim": HIDDEN // 2,
        "num_key_value_heads": 4,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "n_mamba_heads": 8,
        "hybrid_layer_ids": [1, 3],
        "mamba_headdim": 16,
        "mamba_ngroups": 1,
        "adapter_rank": 8,
        "attention_hidden_size": 2 * HIDDEN,
        "attention_head_dim": HIDDEN // 2,
        "num_key_value_heads": 4,
        "num_query_groups": 4,
    },
}
_SECTIONS = {"rope_parameters": {"mrope_section": [0, 0, 0]}}  # where a class has sections that its config lacks
for _name in (
    *("glm4v_text", "glm4v_moe_text", "glm_ocr_text", "paddleocr_vl_text", "qwen2_vl_text", "qwen2_5_vl_text"),
    *("qwen2_5_omni_text", "hunyuan_vl_text", "glmga_text", "glm46v_text"),
):
    FACTS[_name] = _SECTIONS
TOKEN_ID = re.compile(r"(?!num_).*(token_id|token_index|_token|_ids?|_id_.*)$")


def _size(name: str, value: int) -> int:
    for pattern, size in SIZES:
        if re.fullmatch(pattern, name):
            return min(size, value) if value > 0 else value
    return value


def shrink(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a configuration, every size small; lists a layer cut to as many layers, each kind kept."""
    made: dict[str, Any] = {}
    depth = next(
        (value for name, value in fields.items() if name in ("num_hidden_layers", "n_layer", "num_layers")), None
    )
    ids = iter(range(VOCAB - 60, VOCAB))
    for name, value in fields.items():
        if name == "per_layer_config" and isinstance(value, dict):  # of layers that are not there any more
            made[name] = {}
        elif isinstance(value, dict):
            made[name] = shrink(value) if all(isinstance(key, str) for key in value) else value
        elif name == "head_dim" and value is None:
            made[name] = 16
        elif isinstance(value, bool) or name in ("transformers_version", "model_type", "architectures"):
            made[name] = value
        elif isinstance(value, int) and TOKEN_ID.fullmatch(name):
            made[name] = value if 0 <= value < VOCAB - 60 else next(ids, VOCAB - 1)
        elif isinstance(value, int):
            made[name] = _size(name, value)
        elif isinstance(value, list) and depth is not None and len(value) == depth and depth > LAYERS:
            made[name] = _each_kind(value)
            if WHOLE.fullmatch(name) and all(type(v) is int for v in value):
                made[name] = [_size(name, v) for v in made[name]]
        elif (
            isinstance(value, (list, tuple))
            and value
            and all(isinstance(v, int) and not isinstance(v, bool) for v in value)
        ):
            made[name] = (
                value if max(value) < LAYERS or not WHOLE.fullmatch(name) else [_size(name, v) for v in value][:LAYERS]
            )
        else:
            made[name] = value
    _keep_relations(fields, made)
    _update(made, FACTS.get(str(fields.get("model_type")), {}))
    _rotate_in_sections(made)
    return made


def _keep_relations(fields: Mapping[str, Any], made: dict[str, Any]) -> None:
    """Widths of multi-head latent attention that are the same, or a sum, stay so."""
    if fields.get("kv_lora_rank") is not None and made.get("num_key_value_heads") is not None:
        made["num_key_value_heads"] = made["num_attention_heads"]
    plain, rotated = fields.get("qk_nope_head_dim"), fields.get("qk_rope_head_dim")
    if plain is None or rotated is None:
        return
    if plain == rotated:
        made["qk_nope_head_dim"] = made["qk_rope_head_dim"]
    for name in ("head_dim", "qk_head_dim", "swa_head_dim"):
        if fields.get(name) in (rotated, plain + rotated):
            made[name] = made["qk_rope_head_dim"] + (made["qk_nope_head_dim"] if fields[name] != rotated else 0)


def _update(made: dict[str, Any], facts: Mapping[str, Any]) -> None:
    for name, value in facts.items():
        if isinstance(value, dict) and isinstance(made.get(name), dict):
            _update(made[name], value)
        else:
            made[name] = copy.deepcopy(value)


def _rotate_in_sections(made: dict[str, Any]) -> None:
    """Sections of positions (time, height, width) that add up to half of what is rotated."""
    rope = made.get("rope_parameters")
    if not isinstance(rope, dict) or not isinstance(rope.get("mrope_section"), list):
        return
    width = made.get("qk_rope_head_dim") or made.get("head_dim")
    width = width or made.get("hidden_size", HIDDEN) // made.get("num_attention_heads", 4)
    half = int(width * rope.get("partial_rotary_factor", 1)) // 2
    if sum(rope["mrope_section"]) == half:
        return
    rope["mrope_section"] = [half - 2 * (half * 3 // 8), half * 3 // 8, half * 3 // 8]


def _each_kind(values: list[Any]) -> list[Any]:
    """LAYERS entries (more if there are more kinds), the kinds in order of first mention."""
    kinds = list(dict.fromkeys(map(str, values)))
    chosen = [next(v for v in values if str(v) == kind) for kind in kinds]
    while len(chosen) < LAYERS:
        chosen.append(values[-1])
    return chosen


def tiny_config(model_type: str) -> Any:
    """The shrunk configuration. Raises what transformers raises where it does not fit together."""
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[model_type]
    small = shrink(copy.deepcopy(kind().to_dict()))
    _match_layers(small)
    for name in ("transformers_version", "torch_dtype", "dtype"):
        small.pop(name, None)
    try:
        return kind.from_dict(copy.deepcopy(small))
    except Exception as error:  # validators of every type raise classes of their own
        if "num_key_value_heads" not in str(error):
            raise
        return kind.from_dict(_as_many_kv_heads(small))


def _as_many_kv_heads(fields: Mapping[str, Any]) -> dict[str, Any]:
    """For types that refuse grouped queries: as many heads of keys as of queries."""
    made = {name: _as_many_kv_heads(value) if isinstance(value, dict) else value for name, value in fields.items()}
    if "num_attention_heads" in made and "num_key_value_heads" in made:
        made["num_key_value_heads"] = made["num_attention_heads"]
    return made


def _match_layers(fields: dict[str, Any]) -> None:
    """Where a list a layer needs more layers than LAYERS to keep every kind, there are as many layers."""
    for value in fields.values():
        if isinstance(value, dict):
            _match_layers(value)
    lists = [
        v
        for k, v in fields.items()
        if isinstance(v, list) and k in ("layer_types", "mlp_layer_types", "layers_block_type")
    ]
    if not lists:
        return
    longest = max(map(len, lists))
    for name in ("num_hidden_layers", "n_layer", "num_layers"):
        if isinstance(fields.get(name), int):
            fields[name] = longest
    for name in ("layer_types", "mlp_layer_types", "layers_block_type"):
        if isinstance(fields.get(name), list):
            fields[name] += [fields[name][-1]] * (longest - len(fields[name]))


def model_of(config: Any) -> Any:
    """A model of the class that its checkpoints are loaded with, random weights."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    multimodal = config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return (AutoModelForImageTextToText if multimodal else AutoModelForCausalLM).from_config(config)


def randomize(model: Any, seed: int = 0) -> None:
    """Every stored tensor random: maps by their fan-in, norms around what they were, buffers that are saved as well."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    stored = model.state_dict()
    with torch.no_grad():
        for name, value in stored.items():
            if not value.is_floating_point() or value.numel() == 0:
                continue
            noise = torch.randn(value.shape, generator=generator).to(value.dtype)
            if "A_log" in name or "dt_bias" in name or value.dim() < 2:
                value.add_(noise * 0.1)
            else:
                value.copy_(noise / math.sqrt(max(1, value.shape[-1])))


def write(model_type: str, directory: Path) -> str:
    """Write a tiny model with a tokenizer; the name of its class."""
    import torch

    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from tests import tiny

    torch.manual_seed(0)
    model = model_of(tiny_config(model_type))
    randomize(model)
    directory.mkdir(parents=True)
    model.to(torch.bfloat16).save_pretrained(directory)
    tiny.write_tokenizer(directory)
    return type(model).__name__


if __name__ == "__main__":
    print(write(sys.argv[1], Path(sys.argv[2])))
