"""GGUF tensor names <-> Hugging Face names, and what conversion did to the values, by the table of architectures.

Conversion changes whole rows and norm weights and splits fused tensors, so stored blocks are the same bytes under both
conventions. A 3-D tensor of experts [experts, out, in] stands for one module an expert, as Hugging Face checkpoints
have them. Where such a checkpoint fuses what GGUF keeps apart (`Fused`), the parts have names of their own here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from recompile.errors import UnsupportedError
from recompile.gguf.architectures import ARCHITECTURES, VARIANTS, Architecture, Fused
from recompile.gguf.fields import OTHER_NAMES, UNGROUPED
from recompile.gguf.values import Heads, Step, make_step, row_order

__all__ = ["ARCHITECTURES", "Architecture", "Fused", "Heads", "Joined", "Place", "row_order"]

# Where the text model of a multimodal checkpoint stands, and what becomes of it -> its name in a text checkpoint.
_WRAPPED = (
    ("model.language_model.", "model."),
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("model.text_model.", "model."),
    *((name, f"transformer.{name}") for name in ("h.", "wte.", "wpe.", "ln_f.", "word_embeddings.")),  # the bare model
    ("word_embeddings_layernorm.", "transformer.word_embeddings_layernorm."),
)
NO_WEIGHTS = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias")
# Towers and projectors are a file of their own for llama.cpp (mmproj); heads that draft tokens are not taken here.
TOWERS = (
    "model.visual.",
    "visual.",
    "model.vision_tower.",
    "vision_tower.",
    "model.vision_model.",
    "vision_model.",
    "model.multi_modal_projector.",
    "multi_modal_projector.",
    "model.embed_vision.",
    "model.audio_tower.",
    "audio_tower.",
    "model.embed_audio.",
    "mtp.",
    "model.mtp.",
)
_LAYER = re.compile(r"blk\.(\d+)\.(.+)")
_NUMBERED = re.compile(r"(.+?\.|)(\d+)(\..+|)")  # of an expert, or of the norm of a head


@dataclass(frozen=True)
class Place:
    """Where a Hugging Face tensor, or a part of a fused one, is in a GGUF file, and how its values differ there.

    expert: which slice of a 3-D tensor; None for a tensor of its own
    heads:  rows are reordered head by head for this many heads; 0 where they are not
    offset: what the stored values have in addition
    steps:  other changes, in order
    fused:  the Hugging Face tensor is more than this one; part: which of its `parts`; stacked: [experts, ...]
    """

    gguf: str
    expert: int | None = None
    heads: int = 0
    offset: float = 0.0
    steps: tuple[str, ...] = ()
    fused: Fused | None = None
    part: int = 0
    stacked: bool = False

    @property
    def moves_rows(self) -> bool:
        """Whether a row of the stored tensor is another row, or none, of the Hugging Face one."""
        return bool(self.heads or self.steps or self.fused)


@dataclass(frozen=True)
class Joined:
    """A tensor of a Hugging Face checkpoint that a GGUF file keeps in parts.

    name:  of the whole; parts: for each part its names, one or one an expert; how, stacked: see `Fused`
    """

    name: str
    parts: tuple[tuple[str, ...], ...]
    how: str
    stacked: bool


# ---- look-ups --------------------------------------------------------------------------------------------------------


def architecture_of(model_type: Any, text_type: Any = None) -> Architecture:
    """The GGUF architecture of a config.json's `model_type`, or of that of its text model. Raises UnsupportedError for
    any other than those known."""
    for kind in (model_type, text_type):
        for row in ARCHITECTURES.values():
            if kind in row.model_types:
                return row
    known = ", ".join(name for row in ARCHITECTURES.values() for name in row.model_types)
    raise UnsupportedError(
        f"model_type {model_type!r} cannot be written as GGUF here; known: {known}. Convert it with llama.cpp's own "
        f"converter and give the GGUF file"
    )


def text_config_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config of the text model, under the usual names of fields: that of a multimodal one's language part, else the
    config itself. `deepstack_layers` is how many of its layers take what a vision tower gives."""
    inner, vision = config.get("text_config"), config.get("vision_config")
    found = dict(inner) if isinstance(inner, Mapping) else dict(config)
    if "tie_word_embeddings" in config:
        found["tie_word_embeddings"] = config["tie_word_embeddings"]
    if isinstance(vision, Mapping) and vision.get("deepstack_visual_indexes") is not None:
        found["deepstack_layers"] = len(vision["deepstack_visual_indexes"])
    for name, others in OTHER_NAMES.items():
        other = next((other for other in others if found.get(other) is not None), None)
        if found.get(name) is None and other is not None:
            found[name] = found[other]
    if found.get("num_hidden_layers") is None and (kinds := kinds_of_layers(found)):
        found["num_hidden_layers"] = len(kinds)
    if found.get("model_type") in UNGROUPED:
        found["num_key_value_heads"] = found.get("num_attention_heads")
    if found.get("model_type") == "falcon" and not found.get("new_decoder_architecture"):
        found["num_key_value_heads"] = 1 if found.get("multi_query", True) else found.get("num_attention_heads")
    return found


def text_name(hf: str) -> str | None:
    """The name in a text model of a tensor of a multimodal one; None for a tensor of a tower or a draft head."""
    if hf.startswith(TOWERS):
        return None
    for wrapped, plain in _WRAPPED:
        if hf.startswith(wrapped):
            return plain + hf.removeprefix(wrapped)
    return hf


def to_hf(architecture: Architecture | None, name: str, experts: int | None = None) -> list[str]:
    """The Hugging Face names that a GGUF tensor stands for: one, or one an expert.

    experts: length of the slowest axis, which is that of experts where the architecture says so. Names that the
    architecture does not have stay as they are.
    """
    module, _, part = name.rpartition(".")
    if architecture is None:
        return [name]
    if module in architecture.outer:
        return [f"{architecture.outer[module]}.{part}"]
    match = _LAYER.fullmatch(name)
    if match is None:
        return [name]
    if match[2] in architecture.tensors:
        return [f"{architecture.layers}.{match[1]}.{architecture.tensors[match[2]]}"]
    leaf = architecture.layer.get(match[2].rpartition(".")[0])
    if leaf is None:
        return [name]
    if "{}" not in leaf:
        return [f"{architecture.layers}.{match[1]}.{leaf}.{part}"]
    return [f"{architecture.layers}.{match[1]}.{leaf.format(number)}.{part}" for number in range(experts or 0)]


def is_stacked(architecture: Architecture, name: str) -> bool:
    """Whether a GGUF tensor holds one module for each expert along its slowest axis."""
    match = _LAYER.fullmatch(name)
    if match is None or match[2] in architecture.tensors:
        return False
    return "{}" in architecture.layer.get(match[2].rpartition(".")[0], "")


def place_of(architecture: Architecture, hf: str, heads: Heads) -> Place | None:
    """Where a Hugging Face tensor goes in a GGUF file, the first place of a fused one; None for one that the
    architecture does not have."""
    return next(iter(places_of(architecture, hf, heads)), None)


def places_of(architecture: Architecture, hf: str, heads: Heads) -> tuple[Place, ...]:
    """All places of a Hugging Face tensor: one, or those of its parts for one that is fused."""
    modules, tensors, outer, fused = architecture.reverse
    module, _, part = hf.rpartition(".")
    if module in outer:
        return (_place(architecture, f"{outer[module]}.{part}", outer[module], part, heads),)
    number, _, leaf = hf.removeprefix(f"{architecture.layers}.").partition(".")
    if not hf.startswith(f"{architecture.layers}.") or not number.isdigit():
        return ()
    blk = f"blk.{number}."
    if leaf in fused:
        return tuple(
            Place(
                f"{blk}{name}",
                fused=fused[leaf],
                part=number,
                stacked="{}" in architecture.layer[name.rpartition(".")[0]],
                steps=architecture.steps.get(name, ()),
            )
            for number, name in enumerate(fused[leaf].parts)
        )
    if leaf in tensors:
        return (Place(f"{blk}{tensors[leaf]}", steps=architecture.steps.get(tensors[leaf], ())),)
    leaf, expert = leaf.rpartition(".")[0], None
    inside = None if leaf in modules else _NUMBERED.fullmatch(leaf)
    if inside is not None:
        leaf, expert = f"{inside[1]}{{}}{inside[3]}", int(inside[2])
    gguf = modules.get(leaf)
    if gguf is None:
        return ()
    return (_place(architecture, f"{blk}{gguf}.{part}", gguf, part, heads, expert),)


def _place(
    architecture: Architecture, gguf: str, leaf: str, part: str, heads: Heads, expert: int | None = None
) -> Place:
    turned = {"attn_q": heads.query, "attn_k": heads.key}.get(leaf, 0) if architecture.permuted else 0
    added = "norm" in leaf and part == "weight" and leaf not in architecture.plain_norms
    return Place(
        gguf,
        expert,
        turned,
        architecture.norm_offset if added else 0.0,
        architecture.steps.get(f"{leaf}.{part}", ()),
    )


def joined_of(architecture: Architecture, names: Mapping[str, tuple[str, ...]]) -> dict[str, Joined]:
    """The fused tensors of Hugging Face's checkpoint that a GGUF file holds all parts of.

    names: GGUF tensor -> the names that it has here. Raises nothing: a part that is missing is found by whoever needs
    the whole.
    """
    found = {}
    for layer in dict.fromkeys(match[1] for name in names if (match := _LAYER.fullmatch(name))):
        for fused in architecture.fused:
            stored = [names.get(f"blk.{layer}.{part}") for part in fused.parts]
            if all(stored):
                name = f"{architecture.layers}.{layer}.{fused.hf}"
                stacked = "{}" in architecture.layer[fused.parts[0].rpartition(".")[0]]
                found[name] = Joined(name, tuple(part for part in stored if part), fused.how, stacked)
    return found


def steps_of(place: Place, heads: Heads, *, quantized: bool = False) -> tuple[Step, ...]:
    """The changes of a place that are functions, in the order in which conversion does them. Quantized maps are
    [out, in] wherever they are stored, so that none of them is turned."""
    return tuple(make_step(name, heads) for name in place.steps if not (quantized and name == "turned"))


def architecture_for(config: Mapping[str, Any]) -> Architecture:
    """Of a whole config.json; raises as `architecture_of` does, and for text that is read in both directions."""
    text = text_config_of(config)
    found = _variant_of(architecture_of(config.get("model_type"), text.get("model_type")), text)
    if text.get("use_bidirectional_attention") is True:
        raise UnsupportedError(
            f"config.json: use_bidirectional_attention is true, and llama.cpp computes {found.name} causally"
        )
    return found


def _variant_of(row: Architecture, text: Mapping[str, Any]) -> Architecture:
    """The row by which a model of this config is written, of several of its type."""
    if row.name == "nemotron_h":
        return ARCHITECTURES["nemotron_h_moe"] if "moe" in kinds_of_layers(text) else row
    if row.name == "bailingmoe2" and text.get("model_type") == "bailing_moe" and not text.get("use_qk_norm"):
        return ARCHITECTURES["bailingmoe"]
    if (
        row.name == "falcon"
        and text.get("new_decoder_architecture")
        and text.get("num_ln_in_parallel_attn") in (None, 2)
    ):
        return VARIANTS["falcon of two norms"]
    if row.name != "granitehybrid":
        return row
    experts = bool(text.get("num_local_experts"))
    if "linear_attention" in kinds_of_layers(text):
        return row if experts else VARIANTS["granitehybrid without experts"]
    return ARCHITECTURES["granitemoe"] if experts else VARIANTS["granite of a hybrid"]


def architecture_in(name: Any, tensors: Iterable[str]) -> Architecture | None:
    """The row by which a GGUF file with these tensors is read; None for an architecture without one."""
    row = ARCHITECTURES.get(str(name))
    if row is not None and row.name == "granitehybrid" and not any(".ffn_gate_inp." in tensor for tensor in tensors):
        return VARIANTS["granitehybrid without experts"]
    if row is not None and row.name == "falcon" and any(".attn_norm_2." in tensor for tensor in tensors):
        return VARIANTS["falcon of two norms"]
    return VARIANTS["file of the first Ling"] if row is not None and row.name == "bailingmoe" else row


_KINDS = {"M": "linear_attention", "mamba": "linear_attention", "*": "full_attention", "attention": "full_attention"}
_KINDS |= {"-": "mlp", "E": "moe"}


def kinds_of_layers(text: Mapping[str, Any]) -> list[str]:
    """What every layer is, in transformers' words: "linear_attention", "full_attention", "mlp", "moe"."""
    found = next((text[name] for name in _LAYER_KINDS if text.get(name)), ())
    return [_KINDS.get(kind, kind) for kind in found]


_LAYER_KINDS = ("layer_types", "layers_block_type", "hybrid_override_pattern")  # the last one letter a layer


def unnamed(architecture: Architecture, tensors: Iterable[str], heads: Heads) -> tuple[list[str], list[str]]:
    """Of the tensors of a Hugging Face checkpoint: those without a name in GGUF, and those of towers and drafts."""
    unknown, left = [], []
    for name in tensors:
        plain = text_name(name)
        if plain is None:
            left.append(name)
        elif not places_of(architecture, plain, heads) and not plain.endswith(NO_WEIGHTS):
            unknown.append(name)
    return unknown, left
