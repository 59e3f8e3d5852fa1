"""MLX configs: how a module is stored, and what config.json must say after a merge. Headers alone; no torch.

`quantization` of config.json says bits, group_size and mode (affine where absent) of every path that stores scales and
has no entry of its own; `"<path>": {...}` says them of one path, where absent keys are the mode's defaults and not the
values at the top; `"<path>": false` leaves it dense. mlx-lm (0.32, run) reads `quantization` and repeats it as
`quantization_config`. Its versions differ in how they load a path without an entry, by the values at the top or by what
the shapes allow; so a mix of several schemes names every path.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from recompile.errors import CheckpointError, FormatError
from recompile.formats import FLOAT_DTYPES, Headers
from recompile.formats.mix_facts import MergedFile, MergeProblem, MixFacts
from recompile.formats.stored import Described, StoredModule

KEYS = ("quantization", "quantization_config")  # of config.json: what mlx-lm reads, and its copy
QUANT_METHOD = "mlx"
# mode -> bits, group sizes, and (group_size, bits) of an entry that does not say them
MODES: Mapping[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, int]]] = {
    "affine": ((2, 3, 4, 5, 6, 8), (32, 64, 128), (64, 4)),
    "mxfp4": ((4,), (32,), (32, 4)),
    "mxfp8": ((8,), (32,), (32, 8)),
    "nvfp4": ((4,), (16,), (16, 4)),
}
# Models whose tensors mlx-lm keeps under their names and with their values: float32 logits of mlx-lm 0.32 on a seeded
# checkpoint of transformers' are equal within 1e-4 of their range. Others it renames, stacks or changes.
MODEL_TYPES = frozenset({
    "cohere", "cohere2", "ernie4_5", "exaone4", "gemma", "gemma2", "gemma3", "gemma3_text", "glm4", "granite", "helium",
    "hunyuan_v1_dense", "llama", "ministral3", "mistral", "mistral3", "nemotron", "olmo2", "olmo3", "phi", "phi3",
    "qwen2", "qwen3", "seed_oss", "smollm3", "stablelm", "starcoder2",
})  # fmt: skip
# Those whose experts it stacks, and what it calls an expert's maps: `mlp.experts.7.up_proj` is row 7 of
# `mlp.switch_mlp.up_proj`. As its loaders do it with a checkpoint of transformers' (0.32, run); logits equal as above.
_PLAIN = {"gate_proj": "gate_proj", "up_proj": "up_proj", "down_proj": "down_proj"}
_MIXTRAL = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
EXPERTS: Mapping[str, Mapping[str, str]] = {
    "afmoe": _PLAIN,
    "deepseek_v2": _PLAIN,
    "deepseek_v3": _PLAIN,
    "deepseek_v32": _PLAIN,
    "dots1": _PLAIN,
    "ernie4_5_moe": _PLAIN,
    "exaone_moe": _PLAIN,
    "gemma4": _PLAIN,
    "glm4_moe": _PLAIN,
    "glm4_moe_lite": _PLAIN,
    "glm_moe_dsa": _PLAIN,
    "gpt_oss": _PLAIN,
    "granitemoe": _MIXTRAL,
    "granitemoehybrid": _MIXTRAL,
    "kimi_k2": _PLAIN,
    "laguna": _PLAIN,
    "lfm2_moe": _MIXTRAL,
    "llama4": _PLAIN,
    "mellum": _PLAIN,
    "minimax_m2": _MIXTRAL,
    "mistral4": _PLAIN,
    "mixtral": _MIXTRAL,
    "nemotron_h": {"up_proj": "fc1", "down_proj": "fc2"},
    "olmoe": _PLAIN,
    "phimoe": _MIXTRAL,
    "qwen2_moe": _PLAIN,
    "qwen3_5_moe": _PLAIN,
    "qwen3_moe": _PLAIN,
    "qwen3_next": _PLAIN,
    "qwen3_vl_moe": _PLAIN,
    "solar_open": _PLAIN,
}
# Those whose tensors it keeps under other names: transformers' beginning of a name -> its own.
_LANGUAGE_MODEL = {"model.language_model": "language_model.model"}
_WITH_HEAD = {**_LANGUAGE_MODEL, "lm_head": "language_model.lm_head"}
RENAMED: Mapping[str, Mapping[str, str]] = {
    "gemma4": _LANGUAGE_MODEL,
    "gptj": {"transformer": "model"},
    "qwen3_5": _WITH_HEAD,
    "qwen3_5_moe": _WITH_HEAD,
    "qwen3_vl": {**_WITH_HEAD, "model.visual": "visual"},  # which it leaves out; under the other name it would stop
    "qwen3_vl_moe": {**_WITH_HEAD, "model.visual": "visual"},
}
# What it calls what transformers calls otherwise inside a layer: maps of dense blocks, routers and their corrections.
_LEAVES = {f".feed_forward.{own}": f".feed_forward.{theirs}" for own, theirs in _MIXTRAL.items()}
_CORRECTION = "e_score_correction_bias"
RENAMED_INSIDE: Mapping[str, Mapping[str, str]] = {
    "exaone_moe": {f".mlp.{_CORRECTION}": f".mlp.gate.{_CORRECTION}"},
    "laguna": {f".mlp.experts.{_CORRECTION}": f".mlp.gate.{_CORRECTION}", ".mlp.gate": ".mlp.gate.proj"},
    "lfm2_moe": _LEAVES,
}
# Those with the last two axes of convolutions exchanged, the first of which has one place, or without the one axis of a
# number, so that bytes stay: how the names of these end.
RESHAPED: Mapping[str, tuple[str, ...]] = {
    "apertus": (".act_fn.alpha_p", ".act_fn.alpha_n"),
    "granitemoehybrid": (".conv1d.weight",),
    "lfm2": (".conv.conv.weight",),
    "lfm2_moe": (".conv.conv.weight",),
    "mamba": (".conv1d.weight",),
    "mamba2": (".conv1d.weight",),
    "nemotron_h": (".conv1d.weight",),
    "qwen3_5": (".conv1d.weight",),
    "qwen3_5_moe": (".conv1d.weight",),
    "qwen3_next": (".conv1d.weight",),
}
ADDED = frozenset({"qwen3_5", "qwen3_5_moe", "qwen3_next"})  # those with 1 added to norms
_ADDED = (
    ".input_layernorm.weight",
    ".post_attention_layernorm.weight",
    "model.norm.weight",
    ".q_norm.weight",
    ".k_norm.weight",
)
# Those whose `kv_b_proj` it keeps as two stacks of one matrix a head, the keys' turned: `self_attn.embed_q.3`
# [rank, key] and `self_attn.unembed_out.3` [value, rank]. A whole one it splits when it loads it, a quantized one it
# rounds anew.
BY_HEAD = frozenset({"deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "kimi_k2", "mistral4"})
OF_HEADS = ("embed_q", "unembed_out")
_OF_HEAD = re.compile(rf"(.+\.(?:{'|'.join(OF_HEADS)}))\.(\d{{1,9}})")
_WHOLE = ".kv_b_proj"
KNOWN_TYPES = MODEL_TYPES | EXPERTS.keys() | RENAMED.keys() | RESHAPED.keys()
# Where the stacks lie, beside or in the place of `experts`.
_STACKS = {"gemma4": "experts.switch_glu"} | dict.fromkeys(("afmoe", "dots1", "gpt_oss", "llama4"), "experts")
_EXPERT = re.compile(r"(.+)\.experts\.(\d{1,9})\.(\w+)")


def kind_of(config: Mapping[str, Any]) -> str:
    """The model type that the tables here are by: that of config.json, or of a text model that mlx-lm treats apart."""
    text, model_type = config.get("text_config"), config.get("model_type")
    inner = text.get("model_type") if isinstance(text, Mapping) else None
    return "mistral4" if (model_type, inner) == ("mistral3", "mistral4") else str(model_type)


def is_known(config: Mapping[str, Any]) -> bool:
    """Whether what mlx-lm makes of the tensors of a model is known here."""
    model_type = kind_of(config)
    if model_type == "granitemoehybrid":  # without experts mlx-lm splits a map of every layer
        return isinstance(config.get("num_local_experts"), int) and config["num_local_experts"] > 0
    return model_type in KNOWN_TYPES


@dataclass(frozen=True)
class MlxScheme:
    """How one module is quantized. Raises FormatError for what MLX does not have."""

    bits: int
    group_size: int
    mode: str = "affine"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise FormatError(f"mode: found {self.mode!r}, wanted {', '.join(MODES)}")
        bits, groups, _ = MODES[self.mode]
        for name, found, wanted in (("bits", self.bits, bits), ("group_size", self.group_size, groups)):
            if type(found) is not int or found not in wanted:
                listed = ", ".join(map(str, wanted))
                raise FormatError(f"{name}: found {found!r}, wanted {listed} for mode {self.mode}")

    def entry(self) -> dict[str, Any]:
        """As `quantization` of config.json says it."""
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}


def stack_name(config: Mapping[str, Any]) -> str:
    """What mlx-lm calls the module of the stacks of a layer's experts, in the block that holds them."""
    return _STACKS.get(kind_of(config), "switch_mlp")


def stack_of(config: Mapping[str, Any], module: str) -> tuple[str, int] | None:
    """(path, number) of a module that is one expert's, or one head's, in a stack of mlx-lm's; None for any other."""
    leaves = EXPERTS.get(kind_of(config))
    of_head = _OF_HEAD.fullmatch(module) if is_by_head(config) else None
    if of_head is not None:
        return of_head[1], int(of_head[2])
    found = _EXPERT.fullmatch(module) if leaves else None
    if leaves is None or found is None or found[3] not in leaves:
        return None
    return f"{found[1]}.{stack_name(config)}.{leaves[found[3]]}", int(found[2])


def path_of(config: Mapping[str, Any], module: str) -> str:
    """What mlx-lm calls the module that holds a stored one."""
    place = stack_of(config, module)
    return name_in_file(config, module if place is None else place[0])


def name_in_file(config: Mapping[str, Any], name: str) -> str:
    """mlx-lm's name of a tensor or module that has this one in transformers, stacks aside."""
    model_type = kind_of(config)
    return _renamed(name, RENAMED.get(model_type, {}), RENAMED_INSIDE.get(model_type, {}))


def name_seen(config: Mapping[str, Any], name: str) -> str:
    """transformers' name of what mlx-lm calls so, stacks aside."""
    model_type = kind_of(config)
    beginnings, inside = RENAMED.get(model_type, {}), RENAMED_INSIDE.get(model_type, {})
    return _renamed(name, {own: seen for seen, own in beginnings.items()}, {own: seen for seen, own in inside.items()})


def _renamed(name: str, beginnings: Mapping[str, str], inside: Mapping[str, str]) -> str:
    for old, new in beginnings.items():
        if name == old or name.startswith(f"{old}."):
            return new + name[len(old) :]
    for old, new in inside.items():
        place = name.find(old)
        if place >= 0 and name[place + len(old) : place + len(old) + 1] in ("", "."):
            return name[:place] + new + name[place + len(old) :]
    return name


def adds_one(config: Mapping[str, Any], tensor: str) -> bool:
    """Whether mlx-lm's value of a tensor, under either name, is transformers' with 1 added."""
    changed = kind_of(config) in ADDED and not _is_of_later_tokens(tensor)
    return changed and name_in_file(config, tensor).endswith(_ADDED)


def _is_of_later_tokens(name: str) -> bool:
    return "mtp." in name


def is_left_out(config: Mapping[str, Any], module: str) -> bool:
    """Whether mlx-lm stops at a module, which transformers ignores: layers for later tokens beside stacked experts."""
    return config.get("model_type") == "qwen3_next" and _is_of_later_tokens(module)


def is_by_head(config: Mapping[str, Any]) -> bool:
    """Whether mlx-lm keeps what keys and values come from head by head."""
    return kind_of(config) in BY_HEAD


def stays_dense(config: Mapping[str, Any], module: str) -> bool:
    """Whether a module is not quantized in builds for mlx-lm, which would round anew what it reads."""
    return is_by_head(config) and module.endswith(_WHOLE)


def wholes_of(config: Mapping[str, Any], modules: Iterable[str]) -> dict[str, tuple[tuple[str, ...], ...]]:
    """Weights that transformers has in one piece and mlx-lm by heads: their parts among `modules`, those of all heads
    of one after those of the other. Raises FormatError for one that is not whole."""
    found: dict[str, tuple[list[str], ...]] = {}
    for module in modules if is_by_head(config) else ():
        of_head = _OF_HEAD.fullmatch(module)
        if of_head is not None:
            block, _, own = of_head[1].rpartition(".")
            parts = found.setdefault(f"{block}{_WHOLE}.weight", tuple([] for _ in OF_HEADS))
            parts[OF_HEADS.index(own)].append(f"{module}.weight")
    for whole, parts in found.items():
        if len({len(names) for names in parts}) > 1:
            block = whole.removesuffix(f"{_WHOLE}.weight")
            counts = " and ".join(f"{len(names)} of {own}" for own, names in zip(OF_HEADS, parts, strict=True))
            raise FormatError(f"{block}: holds matrices of heads, {counts}; wanted one of each for every head")
    return {whole: tuple(tuple(sorted(names, key=_number)) for names in parts) for whole, parts in found.items()}


def _number(tensor: str) -> int:
    return int(tensor.split(".")[-2])


def shape_in_file(config: Mapping[str, Any], tensor: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """mlx-lm's shape of a tensor that has this one in transformers, and the other way round; the bytes are the same."""
    endings = RESHAPED.get(kind_of(config), ())
    if not endings or not tensor.endswith(endings):
        return shape
    return (shape[0], shape[2], shape[1]) if len(shape) == 3 else {(1,): (), (): (1,)}.get(shape, shape)


def is_changed(config: Mapping[str, Any], tensors: Headers) -> bool:
    """Whether tensors are as mlx-lm keeps them where that is not as transformers does: where values differ it tells by
    the convolutions, else the names do."""
    model_type = kind_of(config)
    endings = RESHAPED.get(model_type)
    if endings is not None:
        shapes = [info.shape for name, info in tensors.items() if name.endswith(endings)]
        if shapes:
            return all(shape == () or (len(shape) == 3 and shape[2] == 1) for shape in shapes)
    if is_by_head(config):
        return any(name.endswith(f".{OF_HEADS[0]}.weight") for name in tensors)
    renames = model_type in RENAMED or model_type in RENAMED_INSIDE  # of others no name is looked at
    return renames and any(name_seen(config, name) != name for name in tensors)


def stacked_tensor(config: Mapping[str, Any], tensor: str) -> tuple[str, int] | None:
    """As `stack_of`, of a tensor `<module>.<part>`."""
    module, _, part = tensor.rpartition(".")
    place = stack_of(config, module)
    return None if place is None else (f"{place[0]}.{part}", place[1])


def experts_of(config: Mapping[str, Any], tensor: str) -> tuple[str, str] | None:
    """Of a stacked tensor the names of its experts', or heads', before and after their number; None for any other."""
    module, _, part = tensor.rpartition(".")
    if is_by_head(config) and module.endswith(tuple(f".{own}" for own in OF_HEADS)):
        return f"{module}.", f".{part}"
    leaves = EXPERTS.get(kind_of(config), {})
    block, found, rest = tensor.rpartition(f".{stack_name(config)}.")
    leaf, _, part = rest.partition(".")
    own = next((name for name, stacked in leaves.items() if stacked == leaf), None)
    return (f"{block}.experts.", f".{own}.{part}") if found and own is not None and part else None


def read_scheme(quantization: Mapping[str, Any], path: str) -> MlxScheme:
    """The scheme of a module that stores scales, from `quantization` of config.json.

    Raises FormatError, naming the place in config.json, for a path that it leaves dense and for values unknown to MLX.
    """
    entry = quantization.get(path, True)
    where = f"config.json: quantization: {path}" if path in quantization else "config.json: quantization"
    if entry is True:
        values = {key: quantization.get(key) for key in ("bits", "group_size")}
        mode = quantization.get("mode", "affine")
    elif isinstance(entry, Mapping):
        known = {"bits", "group_size", "mode"}
        more = [key for key, value in entry.items() if key not in known and value not in (False, None)]
        if more:
            raise FormatError(
                f"{where}: {more[0]}: found {entry[more[0]]!r}, known keys are {', '.join(sorted(known))}"
            )
        mode = entry.get("mode", "affine")
        if not isinstance(mode, str) or mode not in MODES:
            raise FormatError(f"{where}: mode: found {mode!r}, wanted {', '.join(MODES)}")
        group_size, bits = MODES[mode][2]
        values = {"bits": entry.get("bits") or bits, "group_size": entry.get("group_size") or group_size}
    else:
        raise FormatError(f"{where}: found {entry!r}, and {path} stores scales; wanted its bits, group_size and mode")
    if not isinstance(mode, str):
        raise FormatError(f"{where}: mode: found {mode!r}, wanted {', '.join(MODES)}")
    try:
        return MlxScheme(values["bits"], values["group_size"], mode)  # type: ignore[arg-type]
    except FormatError as error:
        raise FormatError(f"{where}: {error}") from None


def scheme_of(checkpoint: Described, module: StoredModule) -> MlxScheme:
    """The scheme of a stored module. Raises FormatError for a config that does not describe it."""
    return _scheme_of(checkpoint, module.name)


def _scheme_of(checkpoint: Described, name: str) -> MlxScheme:
    quantization = checkpoint.quantization_config
    if quantization.get("quant_method") != QUANT_METHOD:
        raise FormatError(
            f"{checkpoint.label}: config.json has no quantization with bits and group_size, and {name} has MLX's "
            f"uint32 codes; MLX loaders read that key, take config.json as it was published"
        )
    try:
        return read_scheme(quantization, path_of(checkpoint.config, name))
    except FormatError as error:
        raise FormatError(f"{checkpoint.label}: {error}") from None


def shape_of(checkpoint: Described, name: str, parts: Headers) -> tuple[int, int]:
    """(out_features, in_features) of a module, from headers and config.json.

    Raises CheckpointError for models whose tensors mlx-lm renames or stacks, FormatError for parts that do not fit.
    """
    model_type = checkpoint.config.get("model_type")
    if not is_known(checkpoint.config):
        raise CheckpointError(
            f"{checkpoint.label}: is an MLX checkpoint of model_type {str(model_type)[:60]!r}, whose tensors mlx-lm "
            f"may rename, stack or change; read are "
            f"{', '.join(sorted(KNOWN_TYPES))}; take a build in another format"
        )
    scheme = _scheme_of(checkpoint, name)
    weight, scales = parts["weight"].shape, parts["scales"].shape
    found = f"{checkpoint.label}: {name} has weight {list(weight)} and scales {list(scales)}"
    if len(weight) != 2 or len(scales) != 2:
        raise FormatError(f"{found}, wanted two axes each")
    in_features = scales[1] * scheme.group_size
    if weight[0] != scales[0] or weight[1] * 32 != in_features * scheme.bits or 0 in weight:
        raise FormatError(
            f"{found}, which is not {scheme.mode} of {scheme.bits} bits in groups of {scheme.group_size}, "
            f"as quantization in config.json says; loaders would misread it: give it an entry of its own there"
        )
    floats = scheme.mode == "affine"
    if (parts["scales"].dtype in FLOAT_DTYPES) != floats or (not floats and parts["scales"].dtype != "U8"):
        raise FormatError(
            f"{checkpoint.label}: {name}.scales is {parts['scales'].dtype}, wanted {'floats' if floats else 'U8'} for "
            f"mode {scheme.mode} in config.json"
        )
    if floats and ("biases" not in parts or parts["biases"].shape != scales):
        have = f"found {list(parts['biases'].shape)}" if "biases" in parts else "not found"
        raise FormatError(f"{checkpoint.label}: {name}.biases: {have}, wanted {list(scales)} as its scales")
    if not floats and "biases" in parts:
        raise FormatError(f"{checkpoint.label}: {name}.biases: found, and mode {scheme.mode} has none")
    return (weight[0], in_features)


def quantization_map(
    config: Mapping[str, Any], schemes: Mapping[str, MlxScheme], weights: Mapping[str, int]
) -> dict[str, Any]:
    """`quantization` of config.json for the modules that store scales: at the top the scheme that holds most weights,
    and an entry a path where there are several."""
    held: Counter[MlxScheme] = Counter()
    for name, scheme in schemes.items():
        held[scheme] += weights[name]
    quantization: dict[str, Any] = held.most_common(1)[0][0].entry()
    if len(held) > 1:
        quantization |= {path_of(config, name): scheme.entry() for name, scheme in schemes.items()}
    return quantization


def quantization_of(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The `quantization` of a config.json with "mlx" as its quant_method; None where it is no map of MLX's."""
    found = config.get(KEYS[0])
    if not isinstance(found, Mapping) or not {"bits", "group_size"} <= found.keys():
        return None
    return {**found, "quant_method": QUANT_METHOD}


# Those whose text model has its settings in text_config.
_NESTED = frozenset({"gemma3", "gemma4", "llama4", "mistral3", "qwen3_vl_moe"})


def rotary_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config.json, or the part of it, in which mlx-lm looks for rotary settings of the text model."""
    text = config.get("text_config")
    return text if config.get("model_type") in _NESTED and isinstance(text, Mapping) else config


def rotary_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Keys to add to a config.json for mlx-lm, which looks for rotary settings where transformers 4 had them: most of
    its models take 10000 as `rope_theta`, unsaid, where only `rope_parameters` of transformers 5 has it."""
    given = config.get("rope_parameters")
    if not isinstance(given, Mapping):
        return {}
    whole, local = given.get("full_attention", given), given.get("sliding_attention")
    if not isinstance(whole, Mapping):
        return {}
    fields = {key: whole[key] for key in ("rope_theta", "partial_rotary_factor") if key in whole}
    if whole.get("rope_type", "default") != "default":
        fields["rope_scaling"] = {key: value for key, value in whole.items() if key != "rope_theta"}
    if isinstance(local, Mapping) and "rope_theta" in local:
        fields["rope_local_base_freq"] = local["rope_theta"]
    return {key: value for key, value in fields.items() if config.get(key) is None}


_VOCABULARY = {"gemma3": 262208, "gemma4": 262144}  # where config.json does not say, at the top
_HEAD_OF_FULL_ATTENTION = 512


def _of_full_attention(text: Mapping[str, Any]) -> dict[str, Any]:
    """Gemma 4's sizes of layers with full attention, which transformers 5 says layer by layer."""
    layers = text.get("per_layer_config")
    each = [layer for layer in layers.values() if isinstance(layer, Mapping)] if isinstance(layers, Mapping) else []
    found = {}
    for own, name in (("head_dim", "global_head_dim"), ("num_key_value_heads", "num_global_key_value_heads")):
        sizes = {layer[own] for layer in each if type(layer.get(own)) is int}
        if len(sizes) == 1 and name not in text and sizes != {_HEAD_OF_FULL_ATTENTION}:
            found[name] = sizes.pop()
    return found


def _head_dim(config: Mapping[str, Any]) -> dict[str, Any]:
    hidden, heads = config.get("hidden_size"), config.get("num_attention_heads")
    return {"head_dim": hidden // heads} if type(hidden) is int and type(heads) is int and heads > 0 else {}


def _sparse_layers(config: Mapping[str, Any]) -> list[bool]:
    """Which layers have experts: what transformers 5 says layer by layer, else all but the first."""
    kinds, dense, layers = (
        config.get(key) for key in ("mlp_layer_types", "first_k_dense_replace", "num_hidden_layers")
    )
    if isinstance(kinds, list):
        return [kind == "sparse" for kind in kinds]
    return [n >= dense for n in range(layers)] if isinstance(dense, int) and isinstance(layers, int) else []


_GRANITE_LAYERS = {"linear_attention": "mamba", "full_attention": "attention"}  # transformers 5's names -> as published


def loader_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """`rotary_fields`, and what mlx-lm's class of the model wants in config.json that transformers 5 does not write."""
    wanted: dict[str, Any] = {}
    text = rotary_config(config)
    inner = rotary_fields(text) if text is not config and config.get("model_type") != "gemma4" else {}
    match config.get("model_type"):
        case "gemma3" | "gemma4" as kind if text is not config:
            if text.get("vocab_size") not in (None, _VOCABULARY[kind]):
                wanted = {"vocab_size": text["vocab_size"]}
            inner |= _of_full_attention(text)
        case "apertus":
            wanted = {"mlp_bias": False, "post_norm": False, "qk_norm": True}
        case "exaone4":
            wanted = _head_dim(config) | {"rope_scaling": None}
        case "exaone_moe":
            wanted = _head_dim(config) | {"is_moe_layer": _sparse_layers(config)}
        case "glm4_moe":
            wanted = {"rope_scaling": None}
        case "glm_moe_dsa":
            wanted = {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1}
        case "lfm2":
            wanted = {"block_dim": config.get("hidden_size")}
        case "llama4" if "rope_scaling" not in text:
            inner = {"rope_scaling": None, **inner}
        case "mellum":
            wanted = {"num_experts": config.get("num_local_experts")}
        case "minimax_m2":
            given = config.get("rope_parameters")
            share = given.get("partial_rotary_factor", 1.0) if isinstance(given, Mapping) else 1.0
            head = config.get("head_dim")
            wanted = {"shared_intermediate_size": 0}
            if isinstance(head, int) and isinstance(share, (int, float)):
                wanted["rotary_dim"] = int(head * share)
        case "qwen3_vl_moe":
            more = {"num_experts": text.get("num_local_experts"), "norm_topk_prob": True}
            inner |= {key: value for key, value in more.items() if key not in text}
        case "solar_open":
            wanted = {"first_k_dense_replace": 0, "partial_rotary_factor": 1.0}
    found = {key: value for key, value in wanted.items() if key not in config} | rotary_fields(config)
    kinds = config.get("layer_types")
    if config.get("model_type") == "granitemoehybrid" and config.get("position_embedding_type") is None:
        found["position_embedding_type"] = "nope"  # none in transformers, rotary in mlx-lm
    if config.get("model_type") == "exaone4" and isinstance(kinds, list):  # transformers 5 has a number there
        pattern = "".join("L" if kind == "sliding_attention" else "G" for kind in kinds)
        if not isinstance(config.get("sliding_window_pattern"), str):
            found["sliding_window_pattern"] = pattern if "L" in pattern else None
    if config.get("model_type") == "granitemoehybrid" and isinstance(kinds, list):
        published = [_GRANITE_LAYERS.get(str(kind), kind) for kind in kinds]
        found |= {"layer_types": published} if published != kinds else {}
    return found | {"text_config": {**text, **inner}} if inner else found


# ---- what a merge asks -----------------------------------------------------------------------------------------------


def problems(mix: MixFacts) -> list[MergeProblem]:
    """What keeps mlx-lm from loading the mix: nothing, any modules go together."""
    return []


def merged_files(mix: MixFacts) -> tuple[list[MergedFile], list[str]]:
    """The JSON files of the output, and warnings."""
    quantization = quantization_map(mix.config, mix.schemes, {name: mix.modules[name].numel for name in mix.schemes})
    config = {key: value for key, value in mix.config.items() if key not in KEYS}
    fields = dict.fromkeys(KEYS, quantization) | loader_fields(config)
    return [MergedFile("config.json", config | fields)], []


def config_problems(config: Mapping[str, Any], modules: Mapping[str, StoredModule]) -> Iterator[tuple[str, str, str]]:
    """(place, what is wrong, severity) of a checkpoint's config: entries that name what is not stored quantized, and a
    second copy of the map that says something else."""
    quantization, copy = (config.get(key) for key in KEYS)
    modules = {path_of(config, name): module for name, module in modules.items()}
    for path, entry in quantization.items() if isinstance(quantization, Mapping) else ():
        module = modules.get(path)
        if (isinstance(entry, Mapping) or entry is True) and not (module is not None and module.is_quantized):
            stored = "is not stored" if module is None else "is stored dense"
            yield f"config.json: quantization: {path}", f"{stored}, and mlx-lm would look for its scales", "error"
    if copy is not None and copy != quantization:
        yield (
            "config.json",
            "quantization_config is not quantization; mlx-lm reads the latter, others may not",
            "warning",
        )
