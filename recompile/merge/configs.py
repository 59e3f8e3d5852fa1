"""What the JSON files of a merged checkpoint must say, so that the engine of its format loads it, and which mixes no
engine loads. Works on tensor headers and configs alone; no torch."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from recompile.checkpoint.checkpoint import Checkpoint, StoredModule
from recompile.checkpoint.module_names import role_of
from recompile.costs import FUSED_SETS
from recompile.errors import MismatchError, UnsupportedError
from recompile.formats import FORMATS, FormatSpec, compressed_tensors, mlx_config
from recompile.formats.mix_facts import MixFacts
from recompile.merge.convert import Conversion, notes_of
from recompile.merge.left_dense import kept_roles, known_roles
from recompile.merge.overlay import Overlay, Placement

# Formats whose modules a compressed-tensors config describes.
COMPRESSED_FORMATS = frozenset(
    spec.name for spec in FORMATS.values() if compressed_tensors.QUANT_METHOD in spec.readers
)


def dump_json(value: Any, indent: int = 2) -> str:
    """A value as the text of a JSON file, line break included."""
    return json.dumps(value, indent=indent, ensure_ascii=False) + "\n"


def family_of(checkpoint: Checkpoint, module: StoredModule) -> str:
    """What an engine is told in `quant_method` for a quantized module."""
    readers = FORMATS[module.format].readers
    if not readers:
        return module.format
    return str(checkpoint.quantization_config.get("quant_method") or next(iter(readers)))


def is_verbatim(overlay: Overlay) -> bool:
    """Whether the base's own configs stay true: nothing is overridden."""
    return overlay.overridden == 0


def merged_texts(
    overlay: Overlay, conversions: Mapping[str, Conversion] | None = None
) -> tuple[dict[str, str], list[str]]:
    """The JSON files that say what the output holds, and warnings.

    conversions: modules that are stored in another form than their source's; see convert.py
    """
    conversions = conversions or {}
    families: dict[str, Placement] = {}
    for name, placement in overlay.placements.items():
        if placement.stored.is_quantized:
            family = family_of(placement.checkpoint, placement.stored)
            families.setdefault(compressed_tensors.QUANT_METHOD if name in conversions else family, placement)
    if len(families) > 1:
        listed = " and ".join(f"{family} ({p.module} from {origin_of(p)})" for family, p in families.items())
        raise UnsupportedError(
            f"{overlay.label}: the mix holds {listed}, and no engine loads these formats in one model; "
            f"take all modules from variants of one format, or write a decoded copy with {{dense}}"
        )
    if not families:
        return {"config.json": dump_json(without_quantization(overlay.config))}, []
    (family,) = families
    spec = FORMATS.get(family)
    if spec is not None and spec.merge is not None:
        return _own_texts(overlay, spec)
    if is_verbatim(overlay):
        return {"config.json": dump_json(dict(overlay.config))}, []
    if family != compressed_tensors.QUANT_METHOD:
        raise UnsupportedError(
            f"{overlay.label}: {families[family].module} is stored as {family}; modules can be exchanged between "
            f"dense, compressed-tensors, GPTQ, AWQ, DeepSeek fp8, EXL2, EXL3 and MLX checkpoints"
        )
    return _compressed_texts(overlay, conversions)


def origin_of(placement: Placement) -> str:
    """Where a module comes from, as messages name it."""
    return placement.source if placement.source is not None else placement.checkpoint.label


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without its `quantization_config`, and without MLX's `quantization`."""
    return {key: value for key, value in config.items() if key not in mlx_config.KEYS}


def _inherited(overlay: Overlay, fmt: str) -> Mapping[str, Any]:
    """The quantization_config to carry version and calibration over from: the base's, else the first source's."""
    for checkpoint in overlay.checkpoints:
        if fmt in checkpoint.formats and checkpoint.quantization_config:
            return checkpoint.quantization_config
    return {}


def _foreign_dense(overlay: Overlay, fmt: str) -> list[StoredModule]:
    """Dense modules that a converter to `fmt` did not write."""
    return [
        p.stored for p in overlay.placements.values() if not p.stored.is_quantized and fmt not in p.checkpoint.formats
    ]


def _refuse(overlay: Overlay, problems: Sequence[str], way_out: str) -> None:
    if problems:
        more = f" (and {len(problems) - 1} more like it)" if len(problems) > 1 else ""
        raise UnsupportedError(f"{overlay.label}: {problems[0]}{more}; {way_out}")


def _named(overlay: Overlay, role: str) -> frozenset[str]:
    return frozenset(name for name in overlay.placements if role_of(name) == role)


def _own_texts(overlay: Overlay, spec: FormatSpec) -> tuple[dict[str, str], list[str]]:
    """The files of a mix of a format that says itself what a merge needs."""
    rules = spec.load_merge()
    assert rules is not None, f"{spec.name} names no merge file"
    figures = overlay.accounting
    mix = MixFacts(
        overlay.base.config,
        overlay.config,
        _inherited(overlay, spec.name),
        overlay.modules,
        {
            name: placement.checkpoint.scheme(placement.stored)
            for name, placement in overlay.placements.items()
            if FORMATS[placement.stored.format].readers
        },
        _named(overlay, "head"),
        _named(overlay, "embedding"),
        _foreign_dense(overlay, spec.name),
        figures.bpw,
        figures.head_bpw,
    )
    for problem in rules.problems(mix):
        _refuse(overlay, problem.causes, problem.way_out)
    files, warnings = rules.merged_files(mix)
    return {file.name: dump_json(file.content, file.indent) for file in files}, warnings


def _compressed_texts(overlay: Overlay, conversions: Mapping[str, Conversion]) -> tuple[dict[str, str], list[str]]:
    quantized: dict[str, Mapping[str, Any]] = {}
    shared: dict[tuple[int, str], Mapping[str, Any]] = {}  # one value for all modules of a config group
    dense = []
    for name, placement in overlay.placements.items():
        stored, checkpoint = placement.stored, placement.checkpoint
        conversion = conversions.get(name)
        if conversion is not None and conversion.group is not None:
            quantized[name] = conversion.group
        elif stored.is_quantized:
            group = compressed_tensors.group_for(checkpoint, stored)  # refuses a module that no group covers
            as_stored = {**group, "format": group.get("format") or stored.format}
            quantized[name] = shared.setdefault((id(group), stored.format), as_stored)
        elif is_linear(stored):
            dense.append(name)
    warnings = []
    for checkpoint in {id(p.checkpoint): p.checkpoint for p in overlay.placements.values()}.values():
        if checkpoint.quantization_config.get("transform_config"):
            raise MismatchError(
                f"{checkpoint.label}: its weights are stored rotated (transform_config in config.json), so that single "
                f"modules of it do not fit another variant; take variants made without rotations"
            )
        if checkpoint.quantization_config.get("kv_cache_scheme") != overlay.base.quantization_config.get(
            "kv_cache_scheme"
        ):
            warnings.append(f"{checkpoint.label}: has another kv_cache_scheme than the base; the base's is written")
    if "lm_head" not in quantized and "lm_head" not in dense:
        dense.append("lm_head")  # tied: engines build the module all the same
    inherited = overlay.base.quantization_config
    if inherited.get("quant_method") != compressed_tensors.QUANT_METHOD:
        inherited = {}
    merged = compressed_tensors.merged_config(inherited, quantized.items(), dense, list(overlay.placements))
    if _has_other_names(overlay):
        names = {name: role.loader for name, role in known_roles(overlay).items()}
        merged = compressed_tensors.named_for_loaders(merged, names)
    config = {**overlay.config, "quantization_config": merged}
    warnings += notes_of(conversions)
    return {"config.json": dump_json(config)}, [*warnings, *_scheme_warnings(quantized, dense)]


def _has_other_names(overlay: Overlay) -> bool:
    """Whether loaders may know modules by other names than the stored ones: in wrappers around a text model, where a
    source keeps such names, and where its config names what it does not store."""
    kept = kept_roles(overlay) or {}
    if any(role.loader != name and role.part == "text" and ".experts." not in name for name, role in kept.items()):
        return True
    if any(isinstance(value, Mapping) and "hidden_size" in value for value in overlay.config.values()):
        return True
    return any(
        compressed_tensors.names_others(checkpoint.quantization_config, checkpoint.modules)
        for checkpoint in overlay.checkpoints
    )


def is_linear(stored: StoredModule) -> bool:
    """A dense 2-D weight that is neither an embedding nor a norm."""
    return (
        stored.shape is not None
        and len(stored.shape) == 2
        and "weight" in stored.parts
        and role_of(stored.name) != "embedding"
    )


def _scheme_warnings(quantized: Mapping[str, Mapping[str, Any]], dense: Iterable[str]) -> list[str]:
    """Where engines run several modules with one scheme, and this mix gives them several."""
    spelled = {
        id(group): json.dumps({key: group[key] for key in group if key != "targets"}, sort_keys=True)
        for group in {id(group): group for group in quantized.values()}.values()
    }
    scheme = {name: spelled[id(group)] for name, group in quantized.items()} | dict.fromkeys(dense, "dense")
    sets: dict[tuple[str, str], set[str]] = {}
    experts: dict[str, set[str]] = {}
    for name, key in scheme.items():
        expert = re.match(r"^(.+\.experts)\.\d+\.", name)
        if expert:
            experts.setdefault(expert[1], set()).add(key)
            continue
        parent, _, leaf = name.rpartition(".")
        for fused in FUSED_SETS:
            if leaf in fused:
                sets.setdefault((parent, ", ".join(fused)), set()).add(key)
    warnings = []
    mixed = [found for found, keys in sets.items() if len(keys) > 1]
    if mixed:
        parent, fused_names = mixed[0]
        more = f" and {len(mixed) - 1} more sets" if len(mixed) > 1 else ""
        warnings.append(
            f"{parent}: {fused_names} have different schemes{more}; transformers loads this, vLLM does not, since it "
            f"runs such sets as one matrix (give them one source to serve the result there)"
        )
    mixed_layers = [layer for layer, keys in experts.items() if len(keys) > 1]
    if mixed_layers:
        warnings.append(
            f"{mixed_layers[0]}: its experts have different schemes ({len(mixed_layers)} layers like it); vLLM wants "
            f"one per layer, and transformers would decode them wrongly without saying so"
        )
    elif len({key for keys in experts.values() for key in keys}) > 1:
        warnings.append(
            f"the experts of {len(experts)} layers have different schemes; vLLM loads this, transformers decodes all "
            f"experts with one scheme, wrongly and without saying so"
        )
    return warnings
