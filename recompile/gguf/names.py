"""GGUF tensor names <-> Hugging Face names, and what conversion did to the values, for each architecture.

From the GGUF format spec, section 3. Conversion changes only whole rows (llama: the rows of q and k are reordered,
head by head) and norm weights (gemma: one is added), so stored blocks are the same bytes under both conventions.

A 3-D tensor of experts [experts, out, in] stands for one module an expert, as Hugging Face checkpoints have them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from recompile.errors import UnsupportedError

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
_SANDWICH_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_EXPERTS = {
    "ffn_gate_exps": "mlp.experts.{}.gate_proj",
    "ffn_up_exps": "mlp.experts.{}.up_proj",
    "ffn_down_exps": "mlp.experts.{}.down_proj",
}
_SHARED_EXPERT = {
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
_MIXTRAL = {
    "ffn_gate_inp": "block_sparse_moe.gate",
    "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
    "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
    "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
}


@dataclass(frozen=True)
class Architecture:
    """How one `general.architecture` is named and changed.

    name:        in the GGUF file
    model_types: in config.json; the first is what a GGUF file is read as
    layer:       leaf in GGUF ("attn_q") -> leaf in a Hugging Face layer; "{}" is the number of an expert
    permuted:    whether the rows of attn_q and attn_k are reordered head by head
    norm_offset: what was added to every norm weight
    """

    name: str
    model_types: tuple[str, ...]
    layer: Mapping[str, str] = field(repr=False)
    permuted: bool = False
    norm_offset: float = 0.0


ARCHITECTURES: dict[str, Architecture] = {
    row.name: row
    for row in (
        Architecture("llama", ("llama", "mistral", "mixtral"), _ATTENTION | _PRE_NORM | _MLP | _MIXTRAL, permuted=True),
        Architecture("qwen2", ("qwen2",), _ATTENTION | _PRE_NORM | _MLP),
        Architecture("qwen3", ("qwen3",), _ATTENTION | _QK_NORMS | _PRE_NORM | _MLP),
        Architecture(
            "qwen2moe",
            ("qwen2_moe",),
            _ATTENTION | _PRE_NORM | _MLP | _EXPERTS | _SHARED_EXPERT | {"ffn_gate_inp": "mlp.gate"},
        ),
        Architecture(
            "qwen3moe",
            ("qwen3_moe",),
            _ATTENTION | _QK_NORMS | _PRE_NORM | _MLP | _EXPERTS | {"ffn_gate_inp": "mlp.gate"},
        ),
        Architecture("gemma", ("gemma",), _ATTENTION | _PRE_NORM | _MLP, norm_offset=1.0),
        Architecture("gemma2", ("gemma2",), _ATTENTION | _SANDWICH_NORMS | _MLP, norm_offset=1.0),
        Architecture(
            "gemma3", ("gemma3_text", "gemma3"), _ATTENTION | _QK_NORMS | _SANDWICH_NORMS | _MLP, norm_offset=1.0
        ),
    )
}
_LAYER = re.compile(r"blk\.(\d+)\.(.+)")
_HF_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_HF_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Place:
    """Where a Hugging Face tensor is in a GGUF file, and how its values differ there.

    expert: which slice of a 3-D tensor; None for a tensor of its own
    heads:  rows are reordered head by head for this many heads; 0 where they are not
    offset: what the stored values have in addition
    """

    gguf: str
    expert: int | None = None
    heads: int = 0
    offset: float = 0.0


@dataclass(frozen=True)
class Heads:
    """Attention heads of a model, for the row order: queries and keys."""

    query: int
    key: int


def architecture_of(model_type: Any) -> Architecture:
    """The GGUF architecture of a config.json's `model_type`. Raises UnsupportedError for any other than those known."""
    for row in ARCHITECTURES.values():
        if model_type in row.model_types:
            return row
    known = ", ".join(name for row in ARCHITECTURES.values() for name in row.model_types)
    raise UnsupportedError(
        f"model_type {model_type!r} cannot be written as GGUF here; known: {known}. Convert it with llama.cpp's own "
        f"converter and give the GGUF file"
    )


def to_hf(architecture: Architecture | None, name: str, experts: int | None = None) -> list[str]:
    """The Hugging Face names that a GGUF tensor stands for: one, or one an expert.

    experts: length of the expert axis of a 3-D tensor. Names that the architecture does not have stay as they are.
    """
    module, _, part = name.rpartition(".")
    if architecture is None:
        return [name]
    if module in OUTER:
        return [f"{OUTER[module]}.{part}"]
    match = _LAYER.fullmatch(module)
    leaf = architecture.layer.get(match[2]) if match else None
    if match is None or leaf is None:
        return [name]
    if "{}" not in leaf:
        return [f"model.layers.{match[1]}.{leaf}.{part}"]
    return [f"model.layers.{match[1]}.{leaf.format(number)}.{part}" for number in range(experts or 0)]


def place_of(architecture: Architecture, hf: str, heads: Heads) -> Place | None:
    """Where a Hugging Face tensor goes in a GGUF file; None for one that the architecture does not have."""
    module, _, part = hf.rpartition(".")
    outer = {there: here for here, there in OUTER.items()}
    if module in outer:
        return Place(f"{outer[module]}.{part}", offset=architecture.norm_offset if "norm" in outer[module] else 0.0)
    match = _HF_LAYER.fullmatch(module)
    if match is None:
        return None
    leaf, expert = match[2], None
    inside = _HF_EXPERT.fullmatch(leaf)
    if inside is not None:
        leaf, expert = f"{inside[1]}.{{}}.{inside[3]}", int(inside[2])
    for gguf, there in architecture.layer.items():
        if there == leaf:
            return Place(
                f"blk.{match[1]}.{gguf}.{part}",
                expert,
                (heads.query if gguf == "attn_q" else heads.key if gguf == "attn_k" else 0)
                if architecture.permuted
                else 0,
                architecture.norm_offset if gguf.endswith("norm") else 0.0,
            )
    return None


def row_order(rows: int, heads: int, *, back: bool) -> list[int]:
    """Which row goes where: new[i] = old[order[i]]. To GGUF the two halves of a head are interleaved; `back` undoes it.

    rows: heads * head_dim, head_dim even. Raises UnsupportedError where the rows are not whole heads.
    """
    if heads < 1 or rows % (2 * heads):
        raise UnsupportedError(
            f"{rows} rows cannot be reordered for {heads} heads: a head must be a whole, even number of rows"
        )
    size = rows // heads
    half = size // 2
    order = []
    for start in range(0, rows, size):
        if back:
            order += [start + 2 * i + j for j in range(2) for i in range(half)]
        else:
            order += [start + j * half + i for i in range(half) for j in range(2)]
    return order
