"""Recipes of modifiers: one variant whose modules have several schemes and methods.

    modifiers:
      - {method: gptq, scheme: w4a16-g64, targets: "*.self_attn.*"}
      - {method: mse, scheme: fp8-channel, targets: "*.mlp.*", ignore: "*.0.mlp.*"}

The first modifier that matches a module decides; what none matches stays dense. llm-compressor's own recipes
(`X_stage: {Y_modifiers: {GPTQModifier: {...}, QuantizationModifier: {...}}}`) are read where they mean the same: their
targets, ignore lists, presets and config groups; keys that only steer its search are named in a note. Every module is
calibrated on the unquantized model's activations, so that one pass serves all modifiers and their order does not
matter beyond which of them takes a module.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from recompile.errors import RecipeError, UnsupportedError
from recompile.formats.schemes import Scheme, parse_scheme
from recompile.quantize.scheme_encoder import METHODS, SchemeRule, SchemeVariant

_OWN_KEYS = frozenset({"method", "scheme", "targets", "ignore"})
_FOREIGN_METHODS = {"GPTQModifier": "gptq", "QuantizationModifier": "rtn"}
_READ_KEYS = frozenset({"targets", "scheme", "ignore", "config_groups"})
# How llm-compressor searches; ours does it in its own way.
_SEARCH_KEYS = frozenset(
    {
        "dampening_frac",
        "block_size",
        "actorder",
        "sequential_targets",
        "sequential_update",
        "observer",
        "offload_hessians",
    }
)
_MADE_ELSEWHERE = "make that variant with llm-compressor, and give its directory to recipes as a source"


def load_modifiers(path: Path) -> tuple[SchemeVariant, list[str]]:
    """One variant, named like the file, and notes on keys that are not used.

    Raises RecipeError, naming file and place, for what is not a recipe of modifiers; UnsupportedError for methods that
    are not made here (AWQ, SmoothQuant and others); FormatError for schemes that do not exist.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"{path}: not YAML: {error}") from error
    if not isinstance(content, Mapping) or not content:
        raise RecipeError(f"{path}: wanted `modifiers:` with a list, or a recipe of llm-compressor")
    notes: list[str] = []
    if "modifiers" in content:
        unknown = content.keys() - {"modifiers", "name"}
        if unknown:
            raise RecipeError(f"{path}: {sorted(unknown)[0]!r} is not known; wanted modifiers and name")
        if not isinstance(content["modifiers"], list) or not content["modifiers"]:
            raise RecipeError(f"{path}: modifiers: wanted a list of {{method, scheme, targets}}")
        rules = [_own_rule(entry, f"{path}: modifiers[{n}]") for n, entry in enumerate(content["modifiers"])]
    else:
        rules = []
        for place, kind, body in _foreign(content, str(path)):
            rules += _foreign_rules(kind, body, f"{path}: {place}", notes)
    return SchemeVariant(str(content.get("name") or path.stem), tuple(rules)), notes


def _own_rule(entry: Any, where: str) -> SchemeRule:
    if not isinstance(entry, Mapping):
        raise RecipeError(f"{where}: found {entry!r}, wanted {{method, scheme, targets}}")
    unknown = sorted(str(key) for key in entry.keys() - _OWN_KEYS)
    if unknown:
        raise RecipeError(f"{where}: {unknown[0]!r} is not known; known: {', '.join(sorted(_OWN_KEYS))}")
    method = str(entry.get("method", "gptq")).lower()
    if method not in METHODS:
        if method in ("awq", "smoothquant", "quip", "spinquant", "autoround"):
            raise UnsupportedError(f"{where}: method {method} is not made here; {_MADE_ELSEWHERE}")
        raise RecipeError(f"{where}: method: found {method!r}, wanted {', '.join(METHODS)}")
    if "scheme" not in entry:
        raise RecipeError(f"{where}: scheme is missing")
    scheme = None if entry["scheme"] in (None, "dense") else parse_scheme(str(entry["scheme"]))
    return SchemeRule(scheme, method, _names(entry.get("targets", "*"), where), _names(entry.get("ignore", ()), where))


def _names(value: Any, where: str) -> tuple[str, ...]:
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, (list, tuple)) or not all(isinstance(name, str) for name in values):
        raise RecipeError(f"{where}: found {value!r}, wanted a name pattern or a list of them")
    return tuple(values)


def _foreign(content: Mapping[str, Any], where: str) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    for stage, groups in content.items():
        if not str(stage).endswith("_stage") or not isinstance(groups, Mapping):
            raise RecipeError(f"{where}: {stage!r} is not known; wanted `modifiers:`, or stages of llm-compressor")
        for name, modifiers in groups.items():
            if not str(name).endswith("_modifiers") or not isinstance(modifiers, Mapping):
                raise RecipeError(f"{where}: {stage}.{name}: wanted `..._modifiers` with modifiers by class name")
            for kind, body in modifiers.items():
                yield f"{stage}.{name}.{kind}", str(kind), body if isinstance(body, Mapping) else {}


def _foreign_rules(kind: str, body: Mapping[str, Any], where: str, notes: list[str]) -> list[SchemeRule]:
    if kind not in _FOREIGN_METHODS:
        raise UnsupportedError(f"{where}: {kind} is not made here; {_MADE_ELSEWHERE}")
    method, ignore = _FOREIGN_METHODS[kind], _names(body.get("ignore") or (), where)
    for key in body.keys() - _READ_KEYS:
        if key not in _SEARCH_KEYS:
            raise RecipeError(f"{where}: {key!r} is not known here, and may change what the recipe means")
        notes.append(f"{where}.{key}: steers llm-compressor's search and is not used")
    groups, scheme = body.get("config_groups"), body.get("scheme")
    if groups and scheme:
        raise RecipeError(f"{where}: has a scheme and config_groups; wanted one of them")
    if isinstance(groups, Mapping):
        return [
            SchemeRule(_scheme_of_group(group, f"{where}.{key}"), method, _names(group.get("targets"), where), ignore)
            for key, group in groups.items()
        ]
    if isinstance(scheme, Mapping):
        return [SchemeRule(parse_scheme(str(k)), method, _names(v, where), ignore) for k, v in scheme.items()]
    if not isinstance(scheme, str):
        raise RecipeError(f"{where}: wanted a scheme or config_groups")
    return [SchemeRule(parse_scheme(scheme), method, _names(body.get("targets") or "Linear", where), ignore)]


def _scheme_of_group(group: Any, where: str) -> Scheme:
    weights = group.get("weights") if isinstance(group, Mapping) else None
    if not isinstance(weights, Mapping):
        raise RecipeError(f"{where}: weights is missing")
    if group.get("output_activations"):
        raise UnsupportedError(f"{where}: output_activations are not supported")
    inputs = group.get("input_activations")
    args = {key: value for key, value in weights.items() if value is not None and not key.startswith("observer")}
    args = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False, **args}
    args.pop("actorder", None)
    if "strategy" not in args:
        raise RecipeError(f"{where}: weights.strategy is missing")
    bits, strategy = args["num_bits"], args["strategy"]
    if args["type"] == "int":
        fmt = "int-quantized" if bits == 8 and inputs else "pack-quantized"
    elif strategy == "tensor_group":
        fmt, args["scale_dtype"] = "nvfp4-pack-quantized", "torch.float8_e4m3fn"
    elif strategy == "group" and args.get("group_size") == 32:
        fmt = "mxfp8-quantized" if bits == 8 else f"mxfp{bits}-pack-quantized"
        args["scale_dtype"] = "torch.uint8"
    else:
        fmt = "float-quantized"
    own = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor", "dynamic": False}
    kept = None if not inputs else {**own, **{k: v for k, v in inputs.items() if v is not None and k[:8] != "observer"}}
    name = f"{args['type']}{bits}-{strategy}{args.get('group_size') or ''}{'' if args['symmetric'] else '-asym'}"
    return Scheme(f"{name}-{fmt}{'-a' if kept else ''}", fmt, args, kept)
