"""The table of GGUF architectures: how each is named beside its Hugging Face checkpoint, and what conversion changes.

One row of `ARCHITECTURES` is all that is known of it. Names are those of the `gguf` package's own maps, rows what
llama.cpp's converter writes: tests compare every row with both. Architectures that are converted in other ways (with
activation parameters in keys, computed rope factors that are needed, state spaces) have no row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}

_ATTENTION = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
_QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_PRE_NORM = {"ffn_norm": "post_attention_layernorm"}
_POST_ATTENTION_NORM = {"post_attention_norm": "post_attention_layernorm"}
_SANDWICH_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_POST_NORMS = {  # a norm after each half of a layer and none before; no input_layernorm
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


def _experts(prefix: str, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj") -> dict[str, str]:
    return {
        "ffn_gate_exps": f"{prefix}.{{}}.{gate}",
        "ffn_up_exps": f"{prefix}.{{}}.{up}",
        "ffn_down_exps": f"{prefix}.{{}}.{down}",
    }


def _shared(prefix: str) -> dict[str, str]:
    return {
        "ffn_gate_shexp": f"{prefix}.gate_proj",
        "ffn_up_shexp": f"{prefix}.up_proj",
        "ffn_down_shexp": f"{prefix}.down_proj",
    }


_ROUTER = {"ffn_gate_inp": "mlp.gate"}
_EXPERTS = _experts("mlp.experts")
_SHARED_EXPERT = {"ffn_gate_inp_shexp": "mlp.shared_expert_gate"} | _shared("mlp.shared_expert")
_SHARED_EXPERTS = _shared("mlp.shared_experts")
_W123 = {"ffn_gate_inp": "block_sparse_moe.gate"} | _experts("block_sparse_moe.experts", "w1", "w3", "w2")
_BIAS_OF_ROUTER = {"exp_probs_b.bias": "mlp.gate.e_score_correction_bias"}
_NEXTN = {
    "nextn.eh_proj": "eh_proj",
    "nextn.enorm": "enorm",
    "nextn.hnorm": "hnorm",
    "nextn.embed_tokens": "embed_tokens",
    "nextn.shared_head_head": "shared_head.head",
    "nextn.shared_head_norm": "shared_head.norm",
}
_LATENT = {  # multi-head latent attention
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_b": "self_attn.kv_b_proj",  # in older files; newer ones have the two that follow
    "attn_k_b": "self_attn.k_b_proj",
    "attn_v_b": "self_attn.v_b_proj",
    "attn_output": "self_attn.o_proj",
}
_INDEXER = {
    "indexer.k_norm": "self_attn.indexer.k_norm",
    "indexer.proj": "self_attn.indexer.weights_proj",
    "indexer.attn_k": "self_attn.indexer.wk",
    "indexer.attn_q_b": "self_attn.indexer.wq_b",
}
_LINEAR_ATTENTION = {
    "attn_norm": "input_layernorm",
    "ssm_conv1d": "linear_attn.conv1d",
    "ssm_norm": "linear_attn.norm",
    "ssm_out": "linear_attn.out_proj",
}
_LINEAR_TENSORS = {"ssm_a": "linear_attn.A_log", "ssm_dt.bias": "linear_attn.dt_bias"}
_SHORT_CONV = {
    "attn_norm": "operator_norm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.out_proj",
    "attn_q_norm": "self_attn.q_layernorm",
    "attn_k_norm": "self_attn.k_layernorm",
    "shortconv.conv": "conv.conv",
    "shortconv.in_proj": "conv.in_proj",
    "shortconv.out_proj": "conv.out_proj",
    "ffn_norm": "ffn_norm",
    "ffn_gate": "feed_forward.w1",
    "ffn_up": "feed_forward.w3",
    "ffn_down": "feed_forward.w2",
}
_SHORT_CONV_OUTER = {"token_embd": "model.embed_tokens", "token_embd_norm": "model.embedding_norm", "output": "lm_head"}
_GRANITE_STATE = {  # Mamba 2 beside attention
    "ssm_in": "mamba.in_proj",
    "ssm_conv1d": "mamba.conv1d",
    "ssm_norm": "mamba.norm",
    "ssm_out": "mamba.out_proj",
}
_GRANITE_STATE_TENSORS = {"ssm_a": "mamba.A_log", "ssm_d": "mamba.D", "ssm_dt.bias": "mamba.dt_bias"}
_JAMBA = {  # Mamba 1 beside attention
    **_ATTENTION,
    "ssm_in": "mamba.in_proj",
    "ssm_conv1d": "mamba.conv1d",
    "ssm_x": "mamba.x_proj",
    "ssm_dt": "mamba.dt_proj",
    "ssm_dt_norm": "mamba.dt_layernorm",
    "ssm_b_norm": "mamba.b_layernorm",
    "ssm_c_norm": "mamba.c_layernorm",
    "ssm_out": "mamba.out_proj",
    "ffn_norm": "pre_ff_layernorm",
    "ffn_gate": "feed_forward.gate_proj",
    "ffn_up": "feed_forward.up_proj",
    "ffn_down": "feed_forward.down_proj",
    "ffn_gate_inp": "feed_forward.router",
    **_experts("feed_forward.experts"),
}
_KIMI = {  # delta attention beside latent attention
    **_ATTENTION,
    **_LATENT,
    "ssm_conv1d_q": "self_attn.q_conv1d",
    "ssm_conv1d_k": "self_attn.k_conv1d",
    "ssm_conv1d_v": "self_attn.v_conv1d",
    "ssm_f_a": "self_attn.f_a_proj",
    "ssm_f_b": "self_attn.f_b_proj",
    "ssm_g_a": "self_attn.g_a_proj",
    "ssm_g_b": "self_attn.g_b_proj",
    "ssm_beta": "self_attn.b_proj",
    "ssm_norm": "self_attn.o_norm",
}
_NEMOTRON_H = {  # every layer is one block, called a mixer whatever it is
    "attn_norm": "norm",
    "attn_q": "mixer.q_proj",
    "attn_k": "mixer.k_proj",
    "attn_v": "mixer.v_proj",
    "attn_output": "mixer.o_proj",
    "ffn_up": "mixer.up_proj",
    "ffn_down": "mixer.down_proj",
    **{leaf: there.replace("mamba", "mixer") for leaf, there in _GRANITE_STATE.items()},
}
_NEMOTRON_H_TENSORS = {leaf: there.replace("mamba", "mixer") for leaf, there in _GRANITE_STATE_TENSORS.items()}
_NEMOTRON_H_OUTER = {"token_embd": "backbone.embeddings", "output_norm": "backbone.norm_f", "output": "lm_head"}
_POST_NORM_LAYER = {leaf: there for leaf, there in _ATTENTION.items() if leaf != "attn_norm"} | _QK_NORMS | _POST_NORMS
_HUNYUAN_NORMS = {"attn_q_norm": "self_attn.query_layernorm", "attn_k_norm": "self_attn.key_layernorm"}
_FALCON = {"token_embd": "transformer.word_embeddings", "output_norm": "transformer.ln_f", "output": "lm_head"}
_GPT_NEOX = {
    "attn_norm": "input_layernorm",
    "attn_output": "attention.dense",
    "ffn_norm": "post_attention_layernorm",
    "ffn_up": "mlp.dense_h_to_4h",
    "ffn_down": "mlp.dense_4h_to_h",
}
_FALCON_LAYER = {leaf: there for leaf, there in _GPT_NEOX.items() if leaf != "ffn_norm"} | {
    "attn_qkv": "self_attention.query_key_value",
    "attn_output": "self_attention.dense",
}
_BAILING_OUTER = OUTER | {"token_embd": "model.word_embeddings"}
_QKV = {"attn_qkv.weight": ("qkv_groups",), "attn_qkv.bias": ("qkv_groups",)}


@dataclass(frozen=True)
class Fused:
    """One tensor of a Hugging Face layer that is several in GGUF, or one that is turned there.

    hf:    its name within the layer, with its part where it has one
    parts: the GGUF tensors within the layer, in order
    how:   "rows" one after another, "alternate" row by row, both also "_turned" ([in, out] in Hugging Face); "wide_in",
           "wide_out": rows, turned or not; "qkv", "kv_b", "qkvz": see `recompile.gguf.values`. Tensors of experts are
           split expert by expert
    """

    hf: str
    parts: tuple[str, ...]
    how: str


@dataclass(frozen=True)
class Architecture:
    """How one `general.architecture` is named and changed.

    name:        in the GGUF file
    model_types: in config.json; the first is what a GGUF file is read as, where its keys do not say otherwise
    read_as:     that model type where it is one of another architecture: the text model of a multimodal one
    layer:       leaf in GGUF ("attn_q") -> leaf in a Hugging Face layer; "{}" is the number of an expert
    tensors:     the same for tensors whose part differs ("ssm_a" -> "linear_attn.A_log")
    outer:       the same outside of layers
    layers:      the name of the list of layers in Hugging Face
    permuted:    whether the rows of attn_q and attn_k are reordered head by head
    norm_offset: what was added to every norm weight but those of `plain_norms`
    steps:       other changes, by tensor in GGUF
    fused:       what Hugging Face has in one tensor and GGUF does not
    runnable:    whether a config.json can be made of its keys; else such a file can be merged and quantized, not run
    aliases:     other Hugging Face leaves that some checkpoints have -> leaf in GGUF
    cuts_vocabulary: whether rows of the embedding beyond the tokenizer's tokens are left out of the file
    """

    name: str
    model_types: tuple[str, ...]
    layer: Mapping[str, str] = field(repr=False)
    tensors: Mapping[str, str] = field(default_factory=dict, repr=False)
    outer: Mapping[str, str] = field(default_factory=lambda: OUTER, repr=False)
    layers: str = "model.layers"
    permuted: bool = False
    norm_offset: float = 0.0
    plain_norms: tuple[str, ...] = ()
    steps: Mapping[str, tuple[str, ...]] = field(default_factory=dict, repr=False)
    fused: tuple[Fused, ...] = ()
    read_as: str = ""
    runnable: bool = True
    cuts_vocabulary: bool = False
    aliases: Mapping[str, str] = field(default_factory=dict, repr=False)

    @cached_property
    def reverse(self) -> tuple[dict[str, str], dict[str, str], dict[str, str], dict[str, Fused]]:
        """Hugging Face leaf -> GGUF leaf for modules and tensors of a layer and for modules outside of layers, and what
        is fused."""
        return (
            {**self.aliases, **{there: here for here, there in self.layer.items()}},
            {there: here for here, there in self.tensors.items()},
            {there: here for here, there in self.outer.items()},
            {fused.hf: fused for fused in self.fused},
        )


def _kv_b() -> Fused:
    return Fused("self_attn.kv_b_proj.weight", ("attn_k_b.weight", "attn_v_b.weight"), "kv_b")


def _turned_experts(experts: str, how: str) -> tuple[Fused, ...]:
    return (
        Fused(f"{experts}.gate_up_proj", ("ffn_gate_exps.weight", "ffn_up_exps.weight"), f"{how}_turned"),
        Fused(f"{experts}.down_proj", ("ffn_down_exps.weight",), "rows_turned"),
    )


_LINEAR_STEPS = {"ssm_a": ("neg_exp",), "ssm_conv1d.weight": ("conv",), "ffn_gate_inp_shexp.weight": ("column",)}
_STATE_STEPS = {
    "ssm_a": ("neg_exp", "upright"),
    "ssm_d": ("upright",),
    "ssm_conv1d.weight": ("conv",),
    "ssm_norm.weight": ("groups",),
}
# Qwen3.5 also reorders the heads of values: those of one key head are together in Hugging Face's files
_VALUE_HEADS = {
    "ssm_a": ("neg_exp", "value_heads"),
    "ssm_dt.bias": ("value_heads",),
    "ssm_alpha.weight": ("value_heads",),
    "ssm_beta.weight": ("value_heads",),
    "attn_qkv.weight": ("value_rows",),
    "attn_gate.weight": ("value_rows",),
    "ssm_conv1d.weight": ("conv", "value_rows"),
    "ssm_out.weight": ("value_columns",),
    "ffn_gate_inp_shexp.weight": ("column",),
}
_QWEN35 = (
    _ATTENTION
    | _QK_NORMS
    | _LINEAR_ATTENTION
    | {
        "attn_qkv": "linear_attn.in_proj_qkv",
        "attn_gate": "linear_attn.in_proj_z",
        "ssm_alpha": "linear_attn.in_proj_a",
        "ssm_beta": "linear_attn.in_proj_b",
    }
    | _POST_ATTENTION_NORM
)
_GRANITE_MOE = {
    "ffn_gate_inp": "block_sparse_moe.router.layer",
    **_experts("block_sparse_moe.experts"),
    **_shared("shared_mlp"),
}
_GRANITE_FUSED = (
    Fused("block_sparse_moe.input_linear.weight", ("ffn_gate_exps.weight", "ffn_up_exps.weight"), "rows"),
    Fused("block_sparse_moe.output_linear.weight", ("ffn_down_exps.weight",), "rows"),
    Fused("shared_mlp.input_linear.weight", ("ffn_gate_shexp.weight", "ffn_up_shexp.weight"), "rows"),
    Fused("shared_mlp.output_linear.weight", ("ffn_down_shexp.weight",), "rows"),
)
_GRANITE_SHARED = {  # the shared expert where there are no others
    "ffn_gate": "shared_mlp.gate_proj",
    "ffn_up": "shared_mlp.up_proj",
    "ffn_down": "shared_mlp.output_linear",
}
_GRANITE_SHARED_FUSED = (Fused("shared_mlp.input_linear.weight", ("ffn_gate.weight", "ffn_up.weight"), "rows"),)

ARCHITECTURES: dict[str, Architecture] = {
    row.name: row
    for row in (
        Architecture(
            "llama",
            ("llama", "mistral", "mixtral", "internlm3", "iquestcoder"),
            _ATTENTION | _PRE_NORM | _MLP | _W123,
            permuted=True,
        ),
        Architecture("qwen2", ("qwen2",), _ATTENTION | _PRE_NORM | _MLP),
        Architecture("qwen3", ("qwen3",), _ATTENTION | _QK_NORMS | _PRE_NORM | _MLP),
        Architecture(
            "qwen2moe",
            ("qwen2_moe",),
            _ATTENTION | _PRE_NORM | _MLP | _EXPERTS | _SHARED_EXPERT | _ROUTER,
            steps={"ffn_gate_inp_shexp.weight": ("one_row",)},
        ),
        Architecture("qwen3moe", ("qwen3_moe",), _ATTENTION | _QK_NORMS | _PRE_NORM | _MLP | _EXPERTS | _ROUTER),
        Architecture(
            "qwen3next",
            ("qwen3_next",),
            _ATTENTION
            | _QK_NORMS
            | _LINEAR_ATTENTION
            | {
                "attn_qkv": "linear_attn.in_proj_qkv",
                "attn_gate": "linear_attn.in_proj_z",
                "ssm_ba": "linear_attn.in_proj_ba",
            }
            | _POST_ATTENTION_NORM
            | _MLP
            | _EXPERTS
            | _SHARED_EXPERT
            | _ROUTER,
            _LINEAR_TENSORS,
            norm_offset=1.0,
            plain_norms=("ssm_norm",),
            steps=_LINEAR_STEPS,
            fused=(Fused("linear_attn.in_proj_qkvz.weight", ("attn_qkv.weight", "attn_gate.weight"), "qkvz"),),
        ),
        Architecture(
            "qwen35",
            ("qwen3_5_text", "qwen3_5"),
            _QWEN35 | _MLP,
            _LINEAR_TENSORS,
            norm_offset=1.0,
            plain_norms=("ssm_norm",),
            steps=_VALUE_HEADS,
        ),
        Architecture(
            "qwen35moe",
            ("qwen3_5_moe_text", "qwen3_5_moe"),
            _QWEN35 | _EXPERTS | _SHARED_EXPERT | _ROUTER,
            _LINEAR_TENSORS,
            norm_offset=1.0,
            plain_norms=("ssm_norm",),
            steps=_VALUE_HEADS,
        ),
        Architecture("gemma", ("gemma",), _ATTENTION | _PRE_NORM | _MLP, norm_offset=1.0),
        Architecture("gemma2", ("gemma2",), _ATTENTION | _SANDWICH_NORMS | _MLP, norm_offset=1.0),
        Architecture(
            "gemma3",
            ("gemma3_text", "gemma3"),
            _ATTENTION | _QK_NORMS | _SANDWICH_NORMS | _MLP,
            norm_offset=1.0,
            cuts_vocabulary=True,
        ),
        Architecture(
            "gemma4",
            ("gemma4_text", "gemma4"),
            _ATTENTION
            | _QK_NORMS
            | _SANDWICH_NORMS
            | _MLP
            | {
                "post_ffw_norm_1": "post_feedforward_layernorm_1",
                "post_ffw_norm_2": "post_feedforward_layernorm_2",
                "pre_ffw_norm_2": "pre_feedforward_layernorm_2",
                "inp_gate": "per_layer_input_gate",
                "proj": "per_layer_projection",
                "post_norm": "post_per_layer_input_norm",
                "ffn_gate_up_exps": "experts.{}.gate_up_proj",
                "ffn_down_exps": "experts.{}.down_proj",
                "ffn_gate_inp": "router.proj",
            },
            {
                "layer_output_scale.weight": "layer_scalar",
                "ffn_gate_inp.scale": "router.scale",
                "ffn_down_exps.scale": "router.per_expert_scale",
            },
            OUTER
            | {
                "per_layer_token_embd": "model.embed_tokens_per_layer",
                "per_layer_model_proj": "model.per_layer_model_projection",
                "per_layer_proj_norm": "model.per_layer_projection_norm",
            },
            fused=(
                Fused("experts.gate_up_proj", ("ffn_gate_up_exps.weight",), "rows"),
                Fused("experts.down_proj", ("ffn_down_exps.weight",), "rows"),
            ),
        ),
        Architecture(
            "glm4",
            ("glm4", "glm4v", "glm4v_text", "glm_ocr", "glm_ocr_text"),
            _ATTENTION
            | _NEXTN
            | {
                "ffn_norm": "post_attention_layernorm",
                "post_attention_norm": "post_self_attn_layernorm",
                "post_ffw_norm": "post_mlp_layernorm",
                "ffn_up": "mlp.gate_up_proj",
                "ffn_down": "mlp.down_proj",
            },
            steps={f"{leaf}.{part}": ("halves",) for leaf in ("attn_q", "attn_k") for part in ("weight", "bias")},
        ),
        Architecture(
            "chatglm",
            ("glm",),
            _ATTENTION | _PRE_NORM | {"ffn_up": "mlp.gate_up_proj", "ffn_down": "mlp.down_proj"},
        ),
        Architecture(
            "glm4moe",
            ("glm4_moe", "glm4v_moe_text", "glm4v_moe", "solar_open"),
            _ATTENTION | _QK_NORMS | _POST_ATTENTION_NORM | _MLP | _EXPERTS | _SHARED_EXPERTS | _ROUTER | _NEXTN,
            _BIAS_OF_ROUTER,
        ),
        Architecture(
            "gpt-oss",
            ("gpt_oss",),
            _ATTENTION | _POST_ATTENTION_NORM | {"ffn_gate_inp": "mlp.router"} | _EXPERTS,
            {"attn_sinks.weight": "self_attn.sinks"},
            fused=(
                *_turned_experts("mlp.experts", "alternate"),
                Fused("mlp.experts.gate_up_proj_bias", ("ffn_gate_exps.bias", "ffn_up_exps.bias"), "alternate"),
                Fused("mlp.experts.down_proj_bias", ("ffn_down_exps.bias",), "rows"),
            ),
        ),
        Architecture(
            "deepseek2",
            ("deepseek_v3", "deepseek_v2", "glm4_moe_lite"),
            _LATENT | _PRE_NORM | _MLP | _EXPERTS | _SHARED_EXPERTS | _ROUTER,
            _BIAS_OF_ROUTER,
            fused=(_kv_b(),),
        ),
        Architecture(
            "deepseek32",
            ("deepseek_v32",),
            _LATENT | _INDEXER | _PRE_NORM | _MLP | _EXPERTS | _SHARED_EXPERTS | _ROUTER,
            _BIAS_OF_ROUTER,
            fused=(_kv_b(),),
        ),
        Architecture(
            "glm-dsa",
            ("glm_moe_dsa",),
            _LATENT | _INDEXER | _PRE_NORM | _MLP | _EXPERTS | _SHARED_EXPERTS | _ROUTER | _NEXTN,
            _BIAS_OF_ROUTER,
            fused=(_kv_b(),),
        ),
        Architecture(
            "dots1",
            ("dots1",),
            _ATTENTION | _QK_NORMS | _PRE_NORM | _MLP | _EXPERTS | _SHARED_EXPERTS | _ROUTER,
            _BIAS_OF_ROUTER,
        ),
        Architecture(
            "llama4",
            ("llama4_text", "llama4"),
            _ATTENTION
            | _PRE_NORM
            | {
                "ffn_gate": "feed_forward.gate_proj",
                "ffn_up": "feed_forward.up_proj",
                "ffn_down": "feed_forward.down_proj",
                "ffn_gate_inp": "feed_forward.router",
            }
            | _experts("feed_forward.experts")
            | _shared("feed_forward.shared_expert"),
            fused=_turned_experts("feed_forward.experts", "rows"),
        ),
        Architecture("mistral3", ("ministral3", "mistral3"), _ATTENTION | _PRE_NORM | _MLP, permuted=True),
        Architecture(
            "phi3",
            ("phi3",),
            {
                "attn_norm": "input_layernorm",
                "attn_qkv": "self_attn.qkv_proj",
                "attn_output": "self_attn.o_proj",
                "ffn_norm": "post_attention_layernorm",
                "ffn_up": "mlp.gate_up_proj",
                "ffn_down": "mlp.down_proj",
            },
        ),
        Architecture(
            "minimax-m2",
            ("minimax_m2",),
            _ATTENTION | _QK_NORMS | _PRE_NORM | _W123,
            {"exp_probs_b.bias": "block_sparse_moe.e_score_correction_bias"},
        ),
        Architecture("granite", ("granite",), _ATTENTION | _PRE_NORM | _MLP, permuted=True),
        Architecture(
            "granitemoe",
            ("granitemoe", "granitemoeshared"),
            _ATTENTION | _PRE_NORM | _GRANITE_MOE,
            permuted=True,
            fused=_GRANITE_FUSED,
        ),
        Architecture(
            "granitehybrid",
            ("granitemoehybrid",),
            _ATTENTION | _GRANITE_STATE | _PRE_NORM | _GRANITE_MOE,
            _GRANITE_STATE_TENSORS,
            permuted=True,
            steps=_STATE_STEPS,
            fused=_GRANITE_FUSED,
        ),
        Architecture(
            "nemotron_h",
            ("nemotron_h",),
            _NEMOTRON_H,
            _NEMOTRON_H_TENSORS,
            outer=_NEMOTRON_H_OUTER,
            layers="backbone.layers",
            permuted=True,
            steps=_STATE_STEPS,
        ),
        Architecture(
            "nemotron_h_moe",
            ("nemotron_h",),
            _NEMOTRON_H
            | {
                "ffn_gate_inp": "mixer.gate",
                "ffn_up_exps": "mixer.experts.{}.up_proj",
                "ffn_down_exps": "mixer.experts.{}.down_proj",
                "ffn_up_shexp": "mixer.shared_experts.up_proj",
                "ffn_down_shexp": "mixer.shared_experts.down_proj",
                "ffn_latent_down": "mixer.fc1_latent_proj",
                "ffn_latent_up": "mixer.fc2_latent_proj",
            },
            _NEMOTRON_H_TENSORS | {"exp_probs_b.bias": "mixer.gate.e_score_correction_bias"},
            outer=_NEMOTRON_H_OUTER,
            layers="backbone.layers",
            permuted=True,
            steps=_STATE_STEPS,
        ),
        Architecture(
            "jamba",
            ("jamba",),
            _JAMBA,
            {"ssm_a": "mamba.A_log", "ssm_d": "mamba.D"},
            outer=OUTER | {"output_norm": "model.final_layernorm"},
            steps={"ssm_a": ("neg_exp",), "ssm_conv1d.weight": ("conv",)},
        ),
        Architecture(
            "kimi-linear",
            ("kimi_linear",),
            _KIMI | _PRE_NORM | _MLP | _W123 | _shared("block_sparse_moe.shared_experts"),
            {
                "ssm_a": "self_attn.A_log",
                "ssm_dt.bias": "self_attn.dt_bias",
                "exp_probs_b.bias": "block_sparse_moe.gate.e_score_correction_bias",
            },
            aliases={f"block_sparse_moe.{leaf}_proj": f"ffn_{leaf}" for leaf in ("gate", "up", "down")},
            steps={"ssm_a": ("neg_exp",)} | {f"ssm_conv1d_{part}.weight": ("conv_3d",) for part in "qkv"},
            fused=(_kv_b(),),
        ),
        Architecture(
            "mimo2",
            ("mimo_v2_flash",),
            _ATTENTION | _PRE_NORM | _MLP | _EXPERTS | _ROUTER,
            _BIAS_OF_ROUTER | {"attn_sinks.weight": "self_attn.attention_sink_bias"},
        ),
        Architecture(
            "jais2", ("jais2",), _ATTENTION | _PRE_NORM | {"ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
        ),
        Architecture("mellum", ("mellum",), _ATTENTION | _QK_NORMS | _PRE_NORM | _MLP | _EXPERTS | _ROUTER),
        Architecture("command-r", ("cohere",), _ATTENTION | _QK_NORMS | _MLP),
        Architecture("cohere2", ("cohere2",), _ATTENTION | _MLP),
        Architecture("cohere2moe", ("cohere2_moe",), _ATTENTION | _MLP | _EXPERTS | _SHARED_EXPERTS | _ROUTER),
        Architecture("ernie4_5", ("ernie4_5",), _ATTENTION | _PRE_NORM | _MLP),
        Architecture(
            "ernie4_5-moe",
            ("ernie4_5_moe",),
            _ATTENTION | _PRE_NORM | _MLP | _EXPERTS | _SHARED_EXPERTS | _ROUTER,
            {"exp_probs_b.bias": "mlp.moe_statics.e_score_correction_bias"},
            steps={"exp_probs_b.bias": ("column",)},
        ),
        Architecture("olmo2", ("olmo2", "olmo3"), _POST_NORM_LAYER | _MLP),
        Architecture("olmoe", ("olmoe",), _ATTENTION | _QK_NORMS | _PRE_NORM | _EXPERTS | _ROUTER),
        Architecture("smollm3", ("smollm3",), _ATTENTION | _PRE_NORM | _MLP, permuted=True),
        Architecture("seed_oss", ("seed_oss",), _ATTENTION | _POST_ATTENTION_NORM | _MLP),
        Architecture("exaone4", ("exaone4",), _POST_NORM_LAYER | _MLP),
        Architecture(
            "exaone-moe",
            ("exaone_moe",),
            _ATTENTION | _QK_NORMS | _PRE_NORM | _MLP | _EXPERTS | _SHARED_EXPERTS | _ROUTER,
            {"exp_probs_b.bias": "mlp.e_score_correction_bias"},
        ),
        Architecture("hunyuan-dense", ("hunyuan_v1_dense",), _ATTENTION | _HUNYUAN_NORMS | _PRE_NORM | _MLP),
        Architecture(
            "hunyuan-moe",
            ("hunyuan_v1_moe",),
            _ATTENTION
            | _HUNYUAN_NORMS
            | _PRE_NORM
            | _EXPERTS
            | {"ffn_gate_inp": "mlp.gate.wg"}
            | _shared("mlp.shared_mlp"),
        ),
        Architecture(
            "lfm2",
            ("lfm2",),
            _SHORT_CONV,
            outer=_SHORT_CONV_OUTER,
            steps={"shortconv.conv.weight": ("conv",)},
        ),
        Architecture(
            "lfm2moe",
            ("lfm2_moe",),
            _SHORT_CONV | {"ffn_gate_inp": "feed_forward.gate"} | _experts("feed_forward.experts", "w1", "w3", "w2"),
            {"exp_probs_b.bias": "feed_forward.expert_bias"},
            outer=_SHORT_CONV_OUTER,
            steps={"shortconv.conv.weight": ("conv",)},
        ),
        Architecture("arcee", ("arcee",), _ATTENTION | _PRE_NORM | _MLP, permuted=True),
        Architecture("nemotron", ("nemotron",), _ATTENTION | _PRE_NORM | _MLP, norm_offset=1.0),
        Architecture(
            "starcoder2",
            ("starcoder2",),
            _ATTENTION | _PRE_NORM | {"ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"},
        ),
        Architecture(
            "afmoe",
            ("afmoe",),
            _ATTENTION
            | _QK_NORMS
            | {
                "post_attention_norm": "post_attention_layernorm",
                "ffn_norm": "pre_mlp_layernorm",
                "post_ffw_norm": "post_mlp_layernorm",
                "attn_gate": "self_attn.gate_proj",
                "ffn_gate_inp": "mlp.router.gate",
            }
            | _MLP
            | _EXPERTS
            | _SHARED_EXPERTS,
            {"exp_probs_b.bias": "mlp.expert_bias"},
        ),
        Architecture(
            "stablelm",
            ("stablelm",),
            _ATTENTION
            | {"attn_q_norm": "self_attn.q_layernorm.norms.{}", "attn_k_norm": "self_attn.k_layernorm.norms.{}"}
            | _PRE_NORM
            | _MLP,
        ),
        Architecture(
            "olmo", ("olmo",), {k: v for k, v in _ATTENTION.items() if k != "attn_norm"} | _MLP, permuted=True
        ),
        Architecture(
            "phi2",
            ("phi",),
            _ATTENTION | {"attn_output": "self_attn.dense", "ffn_up": "mlp.fc1", "ffn_down": "mlp.fc2"},
            outer=OUTER | {"output_norm": "model.final_layernorm"},
        ),
        Architecture(
            "qwen2vl",
            ("qwen2_vl", "qwen2_5_vl", "qwen2_vl_text", "qwen2_5_vl_text"),
            _ATTENTION | _PRE_NORM | _MLP,
            read_as="qwen2",
        ),
        Architecture(
            "qwen3vl",
            ("qwen3_vl", "qwen3_vl_text"),
            _ATTENTION | _QK_NORMS | _PRE_NORM | _MLP,
            read_as="qwen3",
        ),
        Architecture(
            "qwen3vlmoe",
            ("qwen3_vl_moe", "qwen3_vl_moe_text"),
            _ATTENTION | _QK_NORMS | _PRE_NORM | _MLP | _EXPERTS | _ROUTER,
            fused=(
                Fused("mlp.experts.gate_up_proj", ("ffn_gate_exps.weight", "ffn_up_exps.weight"), "wide_in"),
                Fused("mlp.experts.down_proj", ("ffn_down_exps.weight",), "wide_out"),
            ),
            read_as="qwen3_moe",
        ),
        Architecture(
            "gpt2",
            ("gpt2",),
            {
                "attn_norm": "ln_1",
                "attn_qkv": "attn.c_attn",
                "attn_output": "attn.c_proj",
                "ffn_norm": "ln_2",
                "ffn_up": "mlp.c_fc",
                "ffn_down": "mlp.c_proj",
            },
            outer={
                "token_embd": "transformer.wte",
                "position_embd": "transformer.wpe",
                "output_norm": "transformer.ln_f",
                "output": "lm_head",
            },
            layers="transformer.h",
            steps={f"{leaf}.weight": ("turned",) for leaf in ("attn_qkv", "attn_output", "ffn_up", "ffn_down")},
        ),
        Architecture(
            "bloom",
            ("bloom",),
            _GPT_NEOX | {"attn_qkv": "self_attention.query_key_value", "attn_output": "self_attention.dense"},
            outer=_FALCON | {"token_embd_norm": "transformer.word_embeddings_layernorm"},
            layers="transformer.h",
            steps=_QKV,
        ),
        Architecture(
            "gptneox",
            ("gpt_neox",),
            _GPT_NEOX | {"attn_qkv": "attention.query_key_value"},
            outer={
                "token_embd": "gpt_neox.embed_in",
                "output_norm": "gpt_neox.final_layer_norm",
                "output": "embed_out",
            },
            layers="gpt_neox.layers",
            steps=_QKV,
        ),
        Architecture(
            "falcon",
            ("falcon",),
            _FALCON_LAYER,
            outer=_FALCON,
            layers="transformer.h",
            steps=_QKV,
        ),
        Architecture(
            "bailingmoe2",
            ("sarvam_moe", "bailing_moe", "bailing_moe_v2"),
            {
                "attn_norm": "input_layernorm",
                "attn_qkv": "attention.query_key_value",
                "attn_output": "attention.dense",
                "attn_q_norm": "attention.query_layernorm",
                "attn_k_norm": "attention.key_layernorm",
                "layer_output_norm": "final_layernorm",  # of draft layers
            }
            | _PRE_NORM
            | _MLP
            | _EXPERTS
            | _SHARED_EXPERTS
            | _ROUTER
            | _NEXTN,
            {"exp_probs_b.bias": "mlp.gate.expert_bias"},
            outer=_BAILING_OUTER,
        ),
        Architecture(
            "bailingmoe",
            ("bailing_moe",),
            {
                "attn_norm": "input_layernorm",
                "attn_q": "attention.q_proj",
                "attn_k": "attention.k_proj",
                "attn_v": "attention.v_proj",
                "attn_output": "attention.dense",
            }
            | _PRE_NORM
            | _EXPERTS
            | _SHARED_EXPERTS
            | _ROUTER,
            outer=_BAILING_OUTER,
            steps={"attn_q.weight": ("query_pairs",), "attn_k.weight": ("key_pairs",)},
            fused=(
                Fused("attention.query_key_value.weight", ("attn_q.weight", "attn_k.weight", "attn_v.weight"), "qkv"),
            ),
            read_as="granitemoeshared",
        ),
    )
}


# Rows of the same architectures for models whose layers are named or fused otherwise.
VARIANTS: dict[str, Architecture] = {
    "granitehybrid without experts": Architecture(
        "granitehybrid",
        ("granitemoehybrid",),
        _ATTENTION | _GRANITE_STATE | _PRE_NORM | _GRANITE_SHARED,
        _GRANITE_STATE_TENSORS,
        permuted=True,
        steps=_STATE_STEPS,
        fused=_GRANITE_SHARED_FUSED,
    ),
    "granite of a hybrid": Architecture(  # all of its layers attention, none with experts; read as a plain Granite
        "granite",
        ("granitemoehybrid",),
        _ATTENTION | _PRE_NORM | _GRANITE_SHARED,
        permuted=True,
        fused=_GRANITE_SHARED_FUSED,
    ),
    "falcon of two norms": Architecture(  # 40B and 180B: one before attention, one before the feed-forward maps
        "falcon",
        ("falcon",),
        _FALCON_LAYER | {"attn_norm": "ln_mlp", "attn_norm_2": "ln_attn"},
        outer=_FALCON,
        layers="transformer.h",
        steps=_QKV,
    ),
    "file of the first Ling": Architecture(  # transformers has no such class; Granite's computes the same
        "bailingmoe",
        ("granitemoeshared",),
        _ATTENTION | _PRE_NORM | _GRANITE_MOE,
        permuted=True,
        fused=_GRANITE_FUSED,
    ),
}


def keys_are_interleaved(model_type: str) -> bool:
    """Whether conversion to GGUF reorders a model's keys, so that the two halves of a head that rotary embedding turns
    together lie side by side in llama.cpp: value i of half j is number 2 i + j of a head."""
    return any(row.permuted and model_type in row.model_types for row in ARCHITECTURES.values())
