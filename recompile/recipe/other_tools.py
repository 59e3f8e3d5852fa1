"""Recipes that other tools keep in YAML or JSON, as recipes of sources that model_quantize makes. No torch.

    mlx           `quantization` of a config.json: bits and group size of all, and of single paths, false: dense
    modelopt      hf_quant_config.json, or such a quantization_config: quant_algo, exclude_modules, quantized_layers
    exllamav3     its recipe, for `-rcp`: head_bits, and `tensors:` with whole bits of every module

Each line keeps its place in the file. Whatever changes the result and cannot be said by such sources is an error; what
recipes never say (the KV cache) is a warning. exllamav3's form is that of its doc/optimize.md, ModelOpt's that of the
files it writes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from recompile.errors import FormatError
from recompile.formats import exl3_config, mlx_config
from recompile.formats.schemes import parse_scheme
from recompile.recipe.messages import Place, line_of, quote, show
from recompile.recipe.spelling import describe_spec
from recompile.recipe.values import DENSE, Override, Source

MLX, MODELOPT, EXLLAMAV3 = mlx_config.QUANT_METHOD, "modelopt", "exllamav3"
LLM_COMPRESSOR = "llm-compressor"
SCHEME_DIALECTS = (MLX, LLM_COMPRESSOR, EXLLAMAV3)  # that are written, of bits and schemes
MIXED = "MIXED_PRECISION"
# quant_algo -> scheme; {}: the group size
_ALGORITHMS: Mapping[str, str] = {
    "FP8": "fp8-static",
    "FP8_PER_CHANNEL_PER_TOKEN": "fp8-dynamic",
    "FP8_PB_WO": "fp8-block",
    "FP8_BLOCK_SCALES": "fp8-block-dynamic",
    "NVFP4": "nvfp4-a4",
    "W4A16_NVFP4": "nvfp4",
    "MXFP8": "mxfp8-a8",
    "MXFP4": "mxfp4-a4",
    "W4A16_MXFP4": "mxfp4",
    "W8A16": "w8a16",
    "W4A16": "w4a16-g{}",
    "W4A16_AWQ": "w4a16-g{}",
    "W4A8_AWQ": "w4afp8-g{}",
    "W8A8_SQ_PER_CHANNEL": "w8a8-static",
    "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN": "w8a8",
}
_SCALED = {"AWQ": "awq", "SQ": "smoothquant"}  # by words of an algorithm's name
_LAYER_KEYS = frozenset({"quant_algo", "group_size", "has_zero_point", "pre_quant_scale"})
MOST_BITS = 8  # of an EXL3 module


@dataclass
class Converted:
    """Parts of a recipe."""

    sources: dict[str, Source] = field(default_factory=dict)  # by id
    overrides: list[Override] = field(default_factory=list)
    base: dict[str, Any] | None = None
    warnings: list[str] = field(default_factory=list)

    def add(self, key: str, source_id: str, spec: Mapping[str, Any], line: int, optional: bool = False) -> None:
        """One line: tensors of `key` from a source made so."""
        self.sources.setdefault(source_id, Source(source_id, describe_spec(spec), line, spec=dict(spec)))
        self.overrides.append(Override(key, source_id, line, optional=optional))


def read_other(data: Mapping[Any, Any], node: yaml.MappingNode, at: Place) -> Converted | None:
    """The recipe of another tool in a mapping that is none of ours; None where it is nobody's.

    Raises RecipeError, naming the tool and the line.
    """
    if isinstance(data.get("tensors"), Mapping) and ("head_bits" in data or "target_bpw" in data):
        return _of_exllamav3(data, node, at)
    for key in ("quantization", "quantization_config"):
        said = data.get(key)
        if not isinstance(said, Mapping):
            continue
        inner, inside = _value(node, key), at.inside(key, _value(node, key))
        if "quant_algo" in said or said.get("quant_method") == MODELOPT:
            return _of_modelopt(said, inner, inside)
        if said.get("quant_method") in (None, MLX) and {"bits", "group_size", "mode"} & said.keys():
            return _of_mlx(data, said, inner, inside)
        if "quant_method" in said:
            raise inside.error(
                f"{quote(str(said['quant_method']))}: configs of this quant_method are not read as recipes; give the "
                f"checkpoint's directory as a source"
            )
    if any(str(key).endswith(("_stage", "_modifiers")) or key == "modifiers" for key in data):
        raise at.error("llm-compressor: is a recipe of modifiers; give it as {modifiers}")
    return None


def _value(node: yaml.Node, key: str) -> yaml.MappingNode:
    """The node of a mapping inside a mapping."""
    assert isinstance(node, yaml.MappingNode)
    return next(value for name, value in reversed(node.value) if name.value == key)


def _lines(node: yaml.Node) -> dict[str, int]:
    """Key -> line."""
    return {key.value: line_of(key) for key, _ in node.value} if isinstance(node, yaml.MappingNode) else {}


# ---- MLX -------------------------------------------------------------------------------------------------------------


def mlx_source(scheme: mlx_config.MlxScheme) -> tuple[str, dict[str, Any]]:
    """(id, spec) of a source in a scheme of MLX."""
    if scheme.mode != "affine":
        return scheme.mode, {"scheme": scheme.mode, "format": MLX}
    spec = {"bits": scheme.bits, "group_size": scheme.group_size, "format": MLX}
    return f"{scheme.bits}bit-g{scheme.group_size}", spec


def _of_mlx(config: Mapping[Any, Any], said: Mapping[Any, Any], node: yaml.Node, at: Place) -> Converted:
    made, lines = Converted(), _lines(node)
    own = {"group_size", "bits", "mode"}

    def scheme_of(path: str, place: Place) -> mlx_config.MlxScheme:
        try:
            return mlx_config.read_scheme(said, path)
        except FormatError as error:
            raise place.error(f"mlx: {str(error).removeprefix('config.json: ')}") from error

    made.base = mlx_source(scheme_of("", at))[1]
    for path, entry in said.items():
        if path in own or path == "quant_method":
            continue
        place = Place(at.name, lines.get(str(path), at.line), f"{at.inside_file}.{path}"[:200])
        if not isinstance(entry, (bool, Mapping)):
            raise place.error(f"mlx: {show(entry)} is no entry of a path; wanted {{bits, group_size}} or false")
        scheme = DENSE if entry is False else scheme_of(path, place)
        name, spec = ("dense", DENSE) if scheme is DENSE else mlx_source(scheme)  # type: ignore[arg-type]
        seen = mlx_config.name_seen(config, str(path))
        stacked = mlx_config.experts_of(config, f"{seen}.*")
        key = f"{seen}.*" if stacked is None else f"{stacked[0]}*{stacked[1]}"
        _check_literal(str(path), place)
        made.add(key, name, spec, place.line)
    return made


def _check_literal(path: str, place: Place) -> None:
    if "*" in path or not path.strip():
        raise place.error(f"{quote(path)} is no name of a module")


# ---- ModelOpt --------------------------------------------------------------------------------------------------------


def _of_modelopt(said: Mapping[Any, Any], node: yaml.Node, at: Place) -> Converted:
    made, lines = Converted(), _lines(node)
    algorithm = said.get("quant_algo")
    layers = said.get("quantized_layers") or {}
    if algorithm == MIXED or (algorithm is None and layers):
        if not isinstance(layers, Mapping) or not layers:
            raise at.error(f"modelopt: {MIXED} without quantized_layers, which say the algorithm of every layer")
        places = _lines(_value(node, "quantized_layers"))
        for name, entry in layers.items():
            place = Place(at.name, places.get(str(name), at.line), f"{at.inside_file}.quantized_layers.{name}"[:200])
            if not isinstance(entry, Mapping):
                raise place.error(f"modelopt: {show(entry)} is no entry of a layer; wanted {{quant_algo: ...}}")
            _check_literal(str(name), place)
            scheme = _scheme_of(entry, place, made.warnings)
            made.add(f"{name}.*", scheme, {"scheme": scheme}, place.line)
    else:
        made.base = {"scheme": _scheme_of(said, at, made.warnings)}
    if said.get("kv_cache_quant_algo") or said.get("kv_cache_scheme"):
        key = "kv_cache_quant_algo" if said.get("kv_cache_quant_algo") else "kv_cache_scheme"
        place = Place(at.name, lines.get(key, at.line))
        made.warnings.append(f"{place}: modelopt: {key} is not taken: a recipe says how weights are stored")
    excluded = False
    for key in ("exclude_modules", "ignore"):
        for pattern in _patterns(said.get(key), Place(at.name, lines.get(key, at.line), f"{at.inside_file}.{key}")):
            glob = pattern if pattern.endswith("*") else f"{pattern}.*"
            made.add(glob, "dense", DENSE, lines[key], optional=True)
            excluded = excluded or pattern.startswith(("lm_head", "*"))
    if made.base is not None and not excluded:
        made.warnings.append(f"{at}: modelopt: does not exclude lm_head, which stays dense here; a line can name it")
    return made


def _patterns(value: Any, place: Place) -> Iterator[str]:
    if value is None:
        return
    if not isinstance(value, (list, tuple)) or not all(isinstance(one, str) and one.strip() for one in value):
        raise place.error(f"modelopt: {show(value)} is no list of module names")
    for one in value:
        if re.search(r"[?\[\]]|^re:", one):
            raise place.error(f"modelopt: {quote(one)}: lines of a recipe have no wildcard but *")
        yield one.strip()


def _scheme_of(entry: Mapping[Any, Any], place: Place, warnings: list[str]) -> str:
    algorithm = entry.get("quant_algo")
    scheme = _ALGORITHMS.get(str(algorithm).upper())
    if scheme is None:
        known = ", ".join(_ALGORITHMS)
        raise place.error(f"modelopt: quant_algo {show(algorithm)} has no scheme here; known: {known}, {MIXED}")
    group_size = entry.get("group_size")
    if "{}" in scheme:
        if group_size is not None and (type(group_size) is not int or group_size < 1):
            raise place.error(f"modelopt: group_size {show(group_size)} is no number of columns")
        scheme = scheme.format(group_size or 128) + ("-asym" if entry.get("has_zero_point") else "")
        try:
            parse_scheme(scheme)
        except FormatError as error:
            raise place.error(f"modelopt: {error}") from error
    elif group_size not in (None, parse_scheme(scheme).columns):
        wanted = parse_scheme(scheme).columns
        raise place.error(f"modelopt: group_size {show(group_size)}: {algorithm} is stored in groups of {wanted} here")
    for word, method in _SCALED.items():
        if word in str(algorithm).upper().split("_"):
            said = f"modelopt: {algorithm} scales inputs as well, which is not taken; a recipe of modifiers with method"
            if not any(said in warning for warning in warnings):
                warnings.append(f"{place}: {said} {method} does it")
    return scheme


# ---- exllamav3 -------------------------------------------------------------------------------------------------------


def exl3_source(bits: int) -> tuple[str, dict[str, Any]]:
    """(id, spec) of a source of so many bits."""
    return f"{bits}bpw", {"bits": bits, "format": exl3_config.QUANT_METHOD}


def _of_exllamav3(data: Mapping[Any, Any], node: yaml.Node, at: Place) -> Converted:
    made, lines = Converted(), _lines(_value(node, "tensors"))
    entries = [(name, bits, lines.get(str(name), at.line)) for name, bits in data["tensors"].items()]
    if data.get("head_bits") is not None and "lm_head" not in data["tensors"]:
        entries.append(("lm_head", data["head_bits"], _lines(node)["head_bits"]))
    for name, bits, line in entries:
        place = Place(at.name, line, f"tensors.{name}"[:200])
        if type(bits) is not int or not 1 <= bits <= MOST_BITS:
            raise place.error(f"exllamav3: {show(bits)} bits; wanted a whole number from 1 to {MOST_BITS}")
        _check_literal(str(name), place)
        made.add(f"{name}.*", *exl3_source(bits), line, optional=name == "lm_head")
    if not entries:
        raise at.error("exllamav3: tensors is empty")
    return made
