"""Recipes of modifiers: one variant whose modules have several schemes and methods.

    modifiers:
      - {method: gptq, scheme: w4a16-g64, targets: "*.self_attn.*"}
      - {method: awq, scheme: w4a16-g64, targets: "*.mlp.*", ignore: "*.0.mlp.*"}
      - {method: smoothquant, strength: 0.8, targets: "*.0.mlp.*"}      # no scheme: scales only, a later one rounds
      - {method: gptq, scheme: w8a8, targets: "*.0.mlp.*"}

The first modifier with a scheme that matches a module decides how it is stored, the first awq or smoothquant how its
inputs are scaled; what none matches stays dense. "awq+gptq" scales and then rounds by GPTQ. Recipes of llm-compressor
(`X_stage: {Y_modifiers: {SmoothQuantModifier: {...}, GPTQModifier: {...}}}`, also AWQModifier and QuantizationModifier)
are read where they mean the same: their targets, ignore lists, presets and config groups; keys that only steer its
search are named in a note. One pass serves all modifiers; their order does not matter beyond which of them takes a
module. See `quantize_model` for what layers are calibrated on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from recompile.errors import FormatError, RecipeError, UnsupportedError
from recompile.formats.schemes import Scheme, parse_scheme, stored_format
from recompile.io.files import read_text
from recompile.io.patterns import compile_regex
from recompile.quantize.scheme_encoder import (
    METHODS,
    SCALED_METHODS,
    ScalingRule,
    SchemeRule,
    SchemeVariant,
    split_method,
)
from recompile.quantize.smoothing_scales import SCALINGS
from recompile.recipe.read_yaml import yaml_loader

_OWN_KEYS = frozenset({"method", "scheme", "targets", "ignore", "strength"})
_FOREIGN_METHODS = {"GPTQModifier": "gptq", "QuantizationModifier": "rtn", "AWQModifier": "awq"}
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
        "num_calibration_steps",
        "calibration_function",
        "offload_device",
        "duo_scaling",
        "n_grid",
    }
)
_MADE_ELSEWHERE = "make that variant with llm-compressor, and give its directory to recipes as a source"


def load_modifiers(path: Path) -> tuple[SchemeVariant, list[str]]:
    """One variant, named like the file, and notes on keys that are not used.

    Raises RecipeError, naming file and place, for what is not a recipe of modifiers; UnsupportedError for methods that
    are not made here (SpinQuant and others); FormatError for schemes that do not exist.
    """
    text = read_text(path, kind="recipe", error=RecipeError)
    try:
        content = yaml_loader(text).get_single_data()
    except (yaml.YAMLError, ValueError, ArithmeticError, LookupError, AttributeError, TypeError) as error:
        raise RecipeError(f"{path}: not YAML: {' '.join(str(error).split())[:300]}") from error
    except RecursionError as error:
        raise RecipeError(f"{path}: not a recipe: the YAML is nested too deeply") from error
    if not isinstance(content, Mapping) or not content:
        raise RecipeError(f"{path}: wanted `modifiers:` with a list, or a recipe of llm-compressor")
    notes: list[str] = []
    if "modifiers" in content:
        unknown = content.keys() - {"modifiers", "name"}
        if unknown:
            raise RecipeError(f"{path}: {sorted(unknown)[0]!r} is not known; wanted modifiers and name")
        if not isinstance(content["modifiers"], list) or not content["modifiers"]:
            raise RecipeError(f"{path}: modifiers: wanted a list of {{method, scheme, targets}}")
        found = [
            rule
            for n, entry in enumerate(content["modifiers"])
            for rule in _own_rules(entry, f"{path}: modifiers[{n}]")
        ]
    else:
        found = []
        for place, kind, body in _foreign(content, str(path)):
            found += _foreign_rules(kind, body, f"{path}: {place}", notes)
    rules = tuple(rule for rule in found if isinstance(rule, SchemeRule))
    scalings = tuple(rule for rule in found if isinstance(rule, ScalingRule))
    if not rules:
        raise RecipeError(f"{path}: no modifier has a scheme, so nothing would be quantized")
    return SchemeVariant(str(content.get("name") or path.stem), rules, scalings, str(path)), notes


def _own_rules(entry: Any, where: str) -> list[SchemeRule | ScalingRule]:
    if not isinstance(entry, Mapping):
        raise RecipeError(f"{where}: found {entry!r}, wanted {{method, scheme, targets}}")
    unknown = sorted(str(key) for key in entry.keys() - _OWN_KEYS)
    if unknown:
        raise RecipeError(f"{where}: {unknown[0]!r} is not known; known: {', '.join(sorted(_OWN_KEYS))}")
    method = str(entry.get("method", "gptq")).lower()
    if method not in (*METHODS, *SCALED_METHODS):
        if method in ("quip", "spinquant", "autoround"):
            raise UnsupportedError(f"{where}: method {method} is not made here; {_MADE_ELSEWHERE}")
        raise RecipeError(f"{where}: method: found {method!r}, wanted {', '.join((*METHODS, *SCALED_METHODS))}")
    scaling, rounding = split_method(method)
    if "strength" in entry and scaling != "smoothquant":
        raise RecipeError(f"{where}: strength is SmoothQuant's, the method is {method}")
    targets, ignore = _names(entry.get("targets", "*"), where), _names(entry.get("ignore", ()), where)
    found: list[SchemeRule | ScalingRule] = []
    if scaling is not None:
        found.append(ScalingRule(scaling, targets, ignore, _strength(entry.get("strength", 0.5), where)))
    if "scheme" in entry:
        named = entry["scheme"]
        if not isinstance(named, str) and named is not None:
            raise RecipeError(f"{where}: scheme: found {named!r}, wanted a name such as w4a16-g64")
        try:
            scheme = None if named in (None, "dense") else parse_scheme(named)
        except FormatError as error:
            raise RecipeError(f"{where}: {error}") from error
        found.append(SchemeRule(scheme, rounding, targets, ignore))
    elif method not in SCALINGS:
        raise RecipeError(f"{where}: scheme is missing")
    return found


def _strength(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise RecipeError(f"{where}: strength: found {value!r}, wanted a number from 0 to 1")
    return float(value)


def _names(value: Any, where: str) -> tuple[str, ...]:
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, (list, tuple)) or not all(isinstance(name, str) for name in values):
        raise RecipeError(f"{where}: found {value!r}, wanted a name pattern or a list of them")
    for name in values:
        if name.startswith("re:"):
            compile_regex(name[3:], where, error=RecipeError)
    return tuple(values)


def _foreign(content: Mapping[str, Any], where: str) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    if content and all(str(key).endswith("_modifiers") for key in content):  # one stage, left out
        content = {"default_stage": content}
    for stage, groups in content.items():
        if not str(stage).endswith("_stage") or not isinstance(groups, Mapping):
            raise RecipeError(f"{where}: {stage!r} is not known; wanted `modifiers:`, or stages of llm-compressor")
        for name, modifiers in groups.items():
            if name == "run_type":  # when the stage runs: there is no other time here
                continue
            if not str(name).endswith("_modifiers") or not isinstance(modifiers, Mapping):
                raise RecipeError(f"{where}: {stage}.{name}: wanted `..._modifiers` with modifiers by class name")
            for kind, body in modifiers.items():
                yield f"{stage}.{name}.{kind}", str(kind), body if isinstance(body, Mapping) else {}


def _foreign_rules(kind: str, body: Mapping[str, Any], where: str, notes: list[str]) -> list[SchemeRule | ScalingRule]:
    if kind == "SmoothQuantModifier":
        return [_smoothquant(body, where, notes)]
    if kind not in _FOREIGN_METHODS:
        raise UnsupportedError(f"{where}: {kind} is not made here; {_MADE_ELSEWHERE}")
    scaling, method = split_method(_FOREIGN_METHODS[kind])
    ignore = _names(body.get("ignore") or (), where)
    _check_mappings(body, where)
    for key in body.keys() - _READ_KEYS - {"mappings"}:
        if body[key] is None or (key == "bypass_divisibility_checks" and body[key] is False):  # says nothing
            continue
        if key not in _SEARCH_KEYS:
            raise RecipeError(f"{where}: {key!r} is not known here, and may change what the recipe means")
        notes.append(f"{where}.{key}: steers llm-compressor's search and is not used")
    groups, scheme = body.get("config_groups"), body.get("scheme")
    if groups and scheme:
        raise RecipeError(f"{where}: has a scheme and config_groups; wanted one of them")
    rules: list[SchemeRule]
    if isinstance(groups, Mapping):
        rules = [
            SchemeRule(_scheme_of_group(group, f"{where}.{key}"), method, _names(group.get("targets"), where), ignore)
            for key, group in groups.items()
        ]
    elif isinstance(scheme, Mapping):
        rules = [SchemeRule(parse_scheme(str(k)), method, _names(v, where), ignore) for k, v in scheme.items()]
    elif isinstance(scheme, str):
        rules = [SchemeRule(parse_scheme(scheme), method, _names(body.get("targets") or "Linear", where), ignore)]
    else:
        raise RecipeError(f"{where}: wanted a scheme or config_groups")
    return [*([ScalingRule(scaling, rule.targets, ignore) for rule in rules] if scaling else []), *rules]


def _check_mappings(body: Mapping[str, Any], where: str) -> None:
    """Which maps read which norm is found by running the model; a list of our own choosing would mean the same only
    where it says what is found."""
    if body.get("mappings"):
        raise UnsupportedError(
            f"{where}: mappings are found here by running the model, and a list of them is not read; remove it, or "
            f"{_MADE_ELSEWHERE}"
        )


def _smoothquant(body: Mapping[str, Any], where: str, notes: list[str]) -> ScalingRule:
    _check_mappings(body, where)
    for key in body.keys() - {"smoothing_strength", "ignore", "mappings"}:
        if body[key] is None:
            continue
        if key not in _SEARCH_KEYS:
            raise RecipeError(f"{where}: {key!r} is not known here, and may change what the recipe means")
        notes.append(f"{where}.{key}: steers llm-compressor's search and is not used")
    ignore = _names(body.get("ignore") or (), where)
    return ScalingRule("smoothquant", ("*",), ignore, _strength(body.get("smoothing_strength", 0.5), where))


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
    fmt, scale_dtype = stored_format(args, has_inputs=bool(inputs))
    if scale_dtype is not None:
        args["scale_dtype"] = scale_dtype
    own = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor", "dynamic": False}
    kept = None if not inputs else {**own, **{k: v for k, v in inputs.items() if v is not None and k[:8] != "observer"}}
    name = f"{args['type']}{bits}-{strategy}{args.get('group_size') or ''}{'' if args['symmetric'] else '-asym'}"
    return Scheme(f"{name}-{fmt}{'-a' if kept else ''}", fmt, args, kept)
