"""What mlx-lm's loader makes of a checkpoint, module by module, against what is stored. Headers and configs only.

    findings(checkpoint)   every module that mlx-lm would load in another way than it is stored, and what it drops

Rules are those of mlx-lm 0.32.2 with mlx 0.32.4 (run on a CPU; tests/write/test_mlx_loader.py runs them again). With
`in` the columns of the model's own map:

    path in `quantization`     falsy: dense. true: group_size, bits and mode of the top. A map: what it says, where
                               absent mode affine and that mode's own group size and bits (a stack of experts: 64 and 4)
    path not in it             dense, unless `path.scales` is stored: bits = words * 32 / in, group size = in / scales,
                               affine where the scales are floats, else the mode with those bits and that group size
    then                       every part must be there, with that shape, and none beside; dtypes are not compared

    files                      every model*.safetensors, whatever the index says, and no other
    lm_head                    dropped in silence where embeddings are tied, which most models take to be so when
                               config.json does not say; left over by others, which stops the load
    rope_theta                 at the top of config.json; most models have a default and say nothing
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recompile.checkpoint.fused_experts import text_config
from recompile.checkpoint.module_names import head_in
from recompile.checkpoint.safetensors_files import read_safetensors_header
from recompile.errors import CheckpointError, FormatError, UnsupportedError
from recompile.formats import FLOAT_DTYPES, mlx_config
from recompile.formats.mlx_config import MODES, MlxScheme

if TYPE_CHECKING:
    from recompile.checkpoint.checkpoint import Checkpoint, TensorInfo
    from recompile.merge.engine_rules import Finding

VERSION = "mlx-lm 0.32.2"
# Model types that tie the embedding where config.json does not say, and those of them that drop lm_head.weight then
_TIED_UNSAID = frozenset(
    {"granite", "llama", "ministral3", "mistral", "olmo2", "olmoe", "qwen2", "seed_oss", "smollm3", "starcoder2"}
)
_READS_ROPE_PARAMETERS = frozenset({"gemma4_text", "mellum", "ministral3", "qwen3"})
_SCORED_BY_GROUPS = {"glm4_moe", "solar_open", "exaone_moe"} | mlx_config.BY_HEAD - {"mistral4"}
_STACK_DEFAULTS = (64, 4)  # group size and bits of a stack's entry that does not say them, whatever its mode
_DOWN = ("down_proj", "output_linear", "fc2")  # a stack's names in transformers' models and in mlx-lm's
_LAYER = re.compile(r"\.layers\.(\d+)\.")


@dataclass(frozen=True)
class _Stored:
    """One module under mlx-lm's name: headers of its parts, those of experts as the stack that they become."""

    path: str
    parts: Mapping[str, tuple[str, tuple[int, ...]]]  # part -> dtype, shape

    @property
    def is_stack(self) -> bool:
        return len(self.parts["weight"][1]) == 3

    def scheme(self, columns: int) -> MlxScheme | str:
        """How it is stored, from its shapes and the map's columns; "dense", or why it is nothing of MLX's."""
        dtype, shape = self.parts["weight"]
        if "scales" not in self.parts:
            return "dense" if dtype in FLOAT_DTYPES else f"{dtype} codes without scales"
        scales_dtype, scales = self.parts["scales"]
        if dtype != "U32" or not shape or not scales or not scales[-1] or columns % scales[-1]:
            return f"{dtype} {list(shape)} with scales {list(scales)}, which is no layout of MLX's"
        group_size, bits = columns // scales[-1], shape[-1] * 32 / columns
        if scales_dtype in FLOAT_DTYPES:
            mode = "affine"
        else:
            fitting = [
                name for name, (_, _, sizes) in MODES.items() if name != "affine" and sizes == (group_size, bits)
            ]
            mode = fitting[0] if fitting else "mxfp4"
        try:
            return MlxScheme(int(bits) if bits == int(bits) else bits, group_size, mode)  # type: ignore[arg-type]
        except FormatError as error:
            return (
                f"{bits:g} bits in groups of {group_size} with {scales_dtype} scales, which MLX does not have ({error})"
            )


def findings(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Everything that mlx-lm would load in another way than it is stored. Raises CheckpointError for unreadable
    headers."""
    from recompile.merge.engine_rules import Finding

    config = checkpoint.config
    if not mlx_config.is_known(config):
        yield Finding(
            "config.json",
            f"model_type {str(config.get('model_type'))[:60]!r}: what mlx-lm makes of its tensors is not known here; "
            f"known are {', '.join(sorted(mlx_config.KNOWN_TYPES))}",
        )
        return
    tensors, found = _loaded_files(checkpoint)
    modules, more = _modules(config, tensors)
    for where, message in (*found, *more, *_of_config(config), *_of_head(config, modules)):
        yield Finding(where, message)
    for message in _of_engine(config, tensors):
        yield Finding("config.json", message, "warning")
    try:
        columns = _columns(config, checkpoint.label)
    except (UnsupportedError, CheckpointError) as error:
        yield Finding("config.json", f"the model that it describes cannot be made, so no shape is compared: {error}")
        return
    quantization = config.get("quantization")
    for path, module in modules.items():
        if mlx_config.is_left_out(config, path):
            yield Finding(path, f"is of a layer for later tokens, and {VERSION} stops at what it has no place for")
        if mlx_config.stays_dense(config, path) and "scales" in module.parts:
            yield Finding(path, f"is quantized, and {VERSION} decodes it, splits it by heads and rounds it anew")
        wanted = columns(path)
        if wanted is None or "weight" not in module.parts or len(module.parts["weight"][1]) < 2:
            continue
        misread = _misread(module, quantization if isinstance(quantization, Mapping) else {}, wanted)
        if misread is not None:
            yield Finding(path, misread)


# ---- one module ------------------------------------------------------------------------------------------------------


def _misread(module: _Stored, quantization: Mapping[str, Any], columns: int) -> str | None:
    stored = module.scheme(columns)
    try:
        applied, source = _applied(module, quantization, columns)
    except FormatError as error:
        return f"stored as {_told(stored)}, and {VERSION} stops at it: {error}"
    if applied != stored:
        return f"stored as {_told(stored)}; {VERSION} applies {_told(applied)}, {source}"
    if isinstance(applied, str):
        width = module.parts["weight"][1][-1]
        return (
            None
            if width == columns
            else f"stored with {width} columns; the model that config.json describes has {columns}"
        )
    wanted = {"scales", "biases"} if applied.mode == "affine" else {"scales"}
    parts = module.parts.keys() & {"scales", "biases"}
    if parts != wanted:
        have, want = (" and ".join(sorted(names)) for names in (parts, wanted))
        return f"stored as {_told(stored)} with {have}; {VERSION} wants {want}"
    shapes = {module.parts[part][1] for part in wanted}
    expected = (*module.parts["weight"][1][:-1], columns // applied.group_size)
    if shapes != {expected}:
        return f"its scales and biases are {sorted(map(list, shapes))}; {VERSION} wants {list(expected)} of each"
    return None


def _applied(module: _Stored, quantization: Mapping[str, Any], columns: int) -> tuple[MlxScheme | str, str]:
    """What mlx-lm quantizes the module's place with ("dense": nothing), and why. Raises FormatError where it stops."""
    path = module.path
    if not quantization:
        return "dense", "as config.json has no quantization"
    if path not in quantization:
        if "scales" not in module.parts:
            return "dense", "as it stores no scales"
        found = module.scheme(columns)
        if isinstance(found, str):
            raise FormatError(f"it has no entry in quantization, and its shapes mean {found}")
        return found, "by its shapes"
    entry, where = quantization[path], f"by quantization: {path} in config.json"
    if not entry:
        return "dense", where
    if entry is True:
        size, bits, mode = quantization.get("group_size"), quantization.get("bits"), quantization.get("mode", "affine")
        return MlxScheme(bits, size, mode), f"{where} (true: the values at the top)"  # type: ignore[arg-type]
    if not isinstance(entry, Mapping):
        raise FormatError(f"quantization: {path} is {entry!r}, wanted a map, true or false")
    unknown = [key for key, value in entry.items() if key not in ("group_size", "bits", "mode") and value]
    if unknown:
        raise FormatError(f"quantization: {path}: {unknown[0]} is set, which is not read here")
    mode = entry.get("mode", "affine")
    if mode not in MODES:
        raise FormatError(f"mode: found {mode!r}, wanted {', '.join(MODES)}")
    size, bits = _STACK_DEFAULTS if module.is_stack else MODES[mode][2]
    return MlxScheme(entry.get("bits") or bits, entry.get("group_size") or size, mode), where


def _told(scheme: MlxScheme | str) -> str:
    if isinstance(scheme, str):
        return scheme
    return f"{scheme.mode} of {scheme.bits} bits in groups of {scheme.group_size}"


# ---- files, names and config -----------------------------------------------------------------------------------------


def _loaded_files(checkpoint: Checkpoint) -> tuple[dict[str, TensorInfo], list[tuple[str, str]]]:
    """The tensors that mlx-lm would load, and what it makes of files."""
    tensors: dict[str, TensorInfo] = {}
    found = []
    mine = {info.path for info in checkpoint.stored_tensors.values()}
    for path in sorted(Path(checkpoint.path).glob("model*.safetensors"), key=lambda path: (path not in mine, path)):
        headers, _ = read_safetensors_header(path)
        twice = next((name for name in headers if name in tensors), None)
        if twice is not None:
            found.append((path.name, f"{VERSION} loads every model*.safetensors, and {twice} is in another as well"))
        elif path not in mine:
            found.append((path.name, f"{VERSION} loads every model*.safetensors, and the index does not list it"))
        tensors |= headers
    missed = sorted(path.name for path in mine if not path.match("model*.safetensors"))
    if missed:
        found.append((missed[0], f"{VERSION} loads model*.safetensors alone"))
    return tensors, found


def _modules(
    config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]
) -> tuple[dict[str, _Stored], list[tuple[str, str]]]:
    """Modules by mlx-lm's paths, and experts that it would not stack."""
    parts: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {}
    counts: dict[str, int] = {}
    single: dict[str, str] = {}
    for name, info in tensors.items():
        place = mlx_config.stacked_tensor(config, name)
        path, _, part = (name if place is None else place[0]).rpartition(".")
        shape = info.shape
        if place is not None:
            counts[f"{path}.{part}"] = counts.get(f"{path}.{part}", 0) + 1
            shape = (counts[f"{path}.{part}"], *shape)
            if part != "weight":
                single.setdefault(path, name)
        parts.setdefault(path, {})[part] = (info.dtype, shape)
    found = [(path, f"{name} is of one expert; {VERSION} stacks weights of some models alone, store the stack")
             for path, name in single.items()]  # fmt: skip
    return {path: _Stored(path, own) for path, own in parts.items()}, found


def _of_config(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    quantization, copy = (config.get(key) for key in mlx_config.KEYS)
    if quantization is None and isinstance(copy, Mapping) and "quant_method" not in copy:
        yield "config.json", f"quantization_config has no quant_method and there is no quantization; {VERSION} stops"
    if isinstance(quantization, Mapping):
        missing = [key for key in ("group_size", "bits") if key not in quantization]
        if missing:
            yield "config.json", f"quantization: {missing[0]} is not at the top, where {VERSION} wants it"
    text = mlx_config.rotary_config(config)
    rotary = mlx_config.rotary_fields(text)
    if rotary and text.get("model_type") not in _READS_ROPE_PARAMETERS:
        key, value = next(iter(rotary.items()))
        where = "at the top" if text is config else "in text_config"
        yield (
            "config.json",
            f"rope_parameters says {key} {value}, stored for transformers 5; {VERSION} reads {key} {where}, where "
            f"it is not, and applies its own default or stops",
        )
    wanted = mlx_config.loader_fields(config)
    missed = [key for key in wanted if key not in rotary and key not in config]
    for key in wanted.keys() - rotary.keys() - {"text_config"}:
        if key in config and config[key] != wanted[key]:
            found, needed = (str(value)[:60] for value in (config[key], wanted[key]))
            yield "config.json", f"{key} is {found} there, and {VERSION} needs {needed} for the same"
    if config.get("model_type") == "deepseek_v2" and not config.get("rope_scaling") and "rope_scaling" not in rotary:
        yield "config.json", f"rope_scaling is not there, and {VERSION} stops without it"
    missed += [f"text_config.{key}" for key in wanted.get("text_config", {}) if key not in {*rotary, *text}]
    if missed:
        yield "config.json", f"{missed[0]} is not there, and {VERSION} stops without it"
    if config.get("quantize_activations"):
        yield "config.json", f"quantize_activations is set: {VERSION} rounds the inputs of nvfp4 and mxfp8 maps as well"


def _of_engine(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> Iterator[str]:
    """What it computes otherwise than transformers, whatever is stored."""
    rotary = mlx_config.rotary_config(config).get("rope_parameters")
    if isinstance(rotary, Mapping) and rotary.get("rope_type") == "yarn" and rotary.get("truncate") is False:
        yield (
            f"rope_parameters says truncate: false, which {VERSION} does not read: it rounds the range that yarn "
            f"corrects, and its logits differ a little from transformers'"
        )
    groups = config.get("n_group")
    if config.get("model_type") in _SCORED_BY_GROUPS and isinstance(groups, int) and groups > 1:
        yield (
            f"n_group is {groups}: {VERSION} scores experts of groups that were not chosen 0 and may take them, where "
            f"corrected scores of the others are below 0; transformers never does"
        )
    if config.get("model_type") == "ernie4_5_moe" and any(name.endswith("e_score_correction_bias") for name in tensors):
        yield f"{VERSION} drops e_score_correction_bias, and may choose other experts than transformers"
    if config.get("model_type") == "glm_moe_dsa":
        yield (
            f"beyond index_topk ({config.get('index_topk')}) tokens {VERSION} attends to others than transformers: its "
            f"indexer turns keys otherwise"
        )


def _of_head(config: Mapping[str, Any], modules: Mapping[str, _Stored]) -> Iterator[tuple[str, str]]:
    head = head_in(modules)
    said = config.get("tie_word_embeddings")
    if head is not None and said is None and config.get("model_type") in _TIED_UNSAID:
        yield (
            head,
            f"stored as a head of its own; config.json does not say tie_word_embeddings, which {VERSION} takes to be "
            f"true: it applies the embedding",
        )
    elif head is not None and said:
        yield head, f"stored as a head of its own; tie_word_embeddings is true, and {VERSION} applies the embedding"


def _columns(config: Mapping[str, Any], label: str) -> Any:
    """path -> the columns of the model's own map there, None for what is none. Imports torch."""
    import torch

    from recompile.checkpoint.config_fields import config_place
    from recompile.model.skeleton import build_skeleton

    plain = {key: value for key, value in config.items() if key not in mlx_config.KEYS}
    model = build_skeleton(plain, torch.float32, torch.device("cpu"), config_place(label))
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items() if value.dim() > 1}
    stacks = {}
    hidden = text_config(config).get("hidden_size")
    for name, shape in shapes.items():
        number = _LAYER.search(name)
        if number and len(shape) == 3 and min(shape[1:]) > 1:  # no convolution
            is_down = name.endswith(_DOWN)
            stacks[number[1], is_down] = _inputs(shape[1], shape[2], hidden, is_down)

    text, by_head = text_config(config), mlx_config.is_by_head(config)
    widths = (text.get("qk_nope_head_dim"), text.get("kv_lora_rank"))
    of_heads = dict(zip(mlx_config.OF_HEADS, widths, strict=True)) if by_head else {}
    stack = mlx_config.stack_name(config)

    def columns(path: str) -> int | None:
        number = _LAYER.search(path)
        own = of_heads.get(path.rpartition(".")[2])
        if own is not None:
            return own
        if f".{stack}." in path and number:
            return stacks.get((number[1], path.endswith(_DOWN)))
        shape = shapes.get(f"{mlx_config.name_seen(config, path)}.weight")
        return shape[-1] if shape is not None and len(shape) == 2 else None

    return columns


def _inputs(rows: int, columns: int, hidden: Any, is_down: bool) -> int:
    """Input features of a stack [experts, rows, columns] of transformers', which is [out, in] or [in, out]."""
    if is_down:
        return rows if columns == hidden else columns
    return hidden if hidden in (rows, columns) else columns
