"""A mix of bits or schemes as a recipe of a converter: mlx-lm, llm-compressor, exllamav3.

    mlx             JSON: the `quantization` map of a config.json, with an entry for every path; mlx_lm.convert takes it
                    by a quant_predicate (docs/recipes.md)
    llm-compressor  YAML of modifiers with config groups: GPTQ for integers, plain rounding for floats
    exllamav3       YAML for `-rcp`: whole bits of every linear map of the layers, and of the head

The mix is one that a merge would write (of checkpoints in that format), or one that model_quantize would make of a
dense base by a recipe whose sources say bits or schemes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import yaml

from recompile.checkpoint.checkpoint import Checkpoint
from recompile.checkpoint.module_names import HEAD_NAMES, Dense, head_in, role_of
from recompile.errors import FormatError, RecipeError
from recompile.formats import compressed_tensors, exl3_config, mlx_config
from recompile.formats.mlx_config import MlxScheme
from recompile.formats.schemes import parse_scheme
from recompile.merge.overlay import Overlay
from recompile.model.roles import roles_of
from recompile.quantize.encoders import EXL_HEAD_BITS
from recompile.quantize.mix import assign
from recompile.quantize.mlx_encoder import check_base, embeddings_of
from recompile.recipe.other_tools import EXLLAMAV3, LLM_COMPRESSOR, MLX
from recompile.recipe.recipe import DENSE, Override, Recipe, describe_spec

_MAPS = ("linear", "router", "gate", "head", "embedding")  # kinds of modules that a converter would look at
GROUP_SIZE = 64  # of bits without a group size, as model_quantize has it
EXL3 = exl3_config.QUANT_METHOD
Spec: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True)
class ToStore:
    """One module of the mix."""

    name: str
    shape: tuple[int, int]  # [out, in]
    role: str  # "layer", "head" or "embedding"
    weight: int  # how many weights it has
    spec: Spec | None  # of the source that makes it; None: dense
    stored: tuple[Checkpoint, Any] | None  # (checkpoint, stored module) of one that is there
    recipe: Recipe | None = None
    override: Override | None = None  # the line of it that decides; None: the base

    @property
    def where(self) -> str:
        """For messages: the line of the recipe that asks for this, and what it asks for."""
        name = f"{self.stored[0].label}: {self.name}" if self.stored is not None else self.name
        if self.recipe is None or (self.override is None and self.stored is not None):
            return name
        line = f"{self.recipe.name}: base" if self.override is None else self.recipe.location(self.override)
        return f"{line}: {name}"


def modules_to_make(recipe: Recipe, base: Checkpoint, mlx: bool) -> list[ToStore]:
    """What model_quantize would make of every linear map of the text model. mlx: embeddings and head take part as well.

    Raises RecipeError for lines that name nothing."""
    roles = roles_of(base)
    embeddings = embeddings_of(base) if mlx else ()
    head = head_in(base.modules) or HEAD_NAMES[0]
    unnamed = describe_spec(recipe.base) if isinstance(recipe.base, dict) else None
    assigned = assign(recipe, base, unnamed, head, embeddings if mlx else None)
    specs: dict[str, Spec] = {s.model_dir: s.spec for s in recipe.sources if s.spec is not None}
    if unnamed is not None:
        specs[unnamed] = recipe.base
    dense = Dense(quantize=(*embeddings, head))
    found = []
    for name, module in base.modules.items():
        if module.shape is None or len(module.shape) != 2 or roles[name].part not in ("text", "mtp"):
            continue
        if roles[name].kind not in _MAPS:
            continue
        spec = specs.get(assigned.get(name, ""))
        if dense.why_dense(name, roles[name], module.shape) is not None or spec == DENSE:
            spec = None
        override, weights = recipe.explain(f"{name}.weight").override, module.shape[0] * module.shape[1]
        found.append(ToStore(name, module.shape, role_of(name), weights, spec, None, recipe, override))
    return found


def modules_of(overlay: Overlay) -> list[ToStore]:
    """How a merge stores every matrix of the text model."""
    roles = roles_of(overlay)
    return [
        ToStore(
            name,
            p.stored.shape,
            role_of(name),
            p.stored.shape[0] * p.stored.shape[1],
            None,
            (p.checkpoint, p.stored),
            overlay.recipe,
            p.override,
        )
        for name, p in overlay.placements.items()
        if p.stored.shape is not None
        and len(p.stored.shape) == 2
        and roles[name].part in ("text", "mtp")
        and roles[name].kind in _MAPS
    ]


# ---- MLX -------------------------------------------------------------------------------------------------------------


def _mlx_scheme(module: ToStore) -> MlxScheme | None:
    if module.stored is not None:
        checkpoint, stored = module.stored
        if stored.format == "dense":
            return None
        if stored.format != MLX:
            raise RecipeError(f"{module.where}: is stored as {stored.format}, and mlx-lm makes no such weight")
        return mlx_config.scheme_of(checkpoint, stored)
    if module.spec is None:
        return None
    spec = module.spec
    if spec.get("format", MLX) != MLX or spec.get("symmetric") or spec.get("group_size") == "channel":
        raise RecipeError(f"{module.where}: {describe_spec(spec)} is no scheme of MLX's")
    try:
        if "scheme" not in spec:
            if "bits" not in spec:
                raise FormatError("is no scheme of MLX's; wanted bits, or a scheme")
            return MlxScheme(spec["bits"], spec.get("group_size", GROUP_SIZE))
        if spec["scheme"] not in mlx_config.MODES:
            raise FormatError(f"MLX has {', '.join(mlx_config.MODES)}")
        (bits,), (size,), _ = mlx_config.MODES[spec["scheme"]]
        return MlxScheme(bits, size, spec["scheme"])
    except FormatError as error:
        raise RecipeError(f"{module.where}: {describe_spec(spec)}: {error}") from error


def _as_mlx(modules: list[ToStore], base: Checkpoint) -> str:
    check_base(base)
    schemes: dict[str, MlxScheme | None] = {}
    held: Counter[MlxScheme] = Counter()
    for module in modules:
        scheme = _mlx_scheme(module)
        if scheme is not None and module.shape[1] % scheme.group_size:
            scheme = None  # as both converters leave it
        path = mlx_config.path_of(base.config, module.name)
        if schemes.setdefault(path, scheme) != scheme:
            raise RecipeError(
                f"{module.where}: {path}: its experts are given several schemes; mlx-lm stacks them under one"
            )
        if scheme is not None:
            held[scheme] += module.weight
    if not held:
        raise RecipeError(f"{base.label}: the mix quantizes nothing")
    # mlx-lm leaves out what the group size of all does not divide, whatever the path's own entry says: so the smallest
    top = min(held, key=lambda scheme: (scheme.group_size, -held[scheme]))
    entries = {path: scheme.entry() if scheme is not None else False for path, scheme in schemes.items()}
    said = {"model_type": base.config.get("model_type"), "quantization": {**top.entry(), **entries}}
    return json.dumps(said, indent=2) + "\n"


# ---- llm-compressor --------------------------------------------------------------------------------------------------


def _config_group(module: ToStore) -> Mapping[str, Any] | None:
    if module.stored is not None:
        checkpoint, stored = module.stored
        if stored.format == "dense":
            return None
        if checkpoint.quantization_config.get("quant_method") != compressed_tensors.QUANT_METHOD:
            raise RecipeError(f"{module.where}: is stored as {stored.format}, which llm-compressor does not make")
        return compressed_tensors.group_for(checkpoint, stored)
    if module.spec is None:
        return None
    spec = module.spec
    if spec.get("format", compressed_tensors.QUANT_METHOD) != compressed_tensors.QUANT_METHOD:
        raise RecipeError(f"{module.where}: {describe_spec(spec)} is no scheme of compressed-tensors")
    try:
        return parse_scheme(str(spec["scheme"]) if "scheme" in spec else _name_of_bits(spec)).group()
    except FormatError as error:
        raise RecipeError(f"{module.where}: {describe_spec(spec)}: {error}") from error


def _name_of_bits(spec: Spec) -> str:
    size = spec.get("group_size", GROUP_SIZE)
    if "bits" not in spec:
        raise FormatError("is no scheme of compressed-tensors; wanted bits, or a scheme")
    return f"w{spec['bits']}a16-{'channel' if size == 'channel' else f'g{size}'}" + (
        "" if spec.get("symmetric", True) else "-asym"
    )


def _as_llm_compressor(modules: list[ToStore], base: Checkpoint) -> str:
    groups = {module.name: group for module in modules if (group := _config_group(module)) is not None}
    embedded = [module.name for module in modules if module.role == "embedding"]
    if not groups:
        raise RecipeError(f"{base.label}: the mix quantizes nothing")
    dense = [module.name for module in modules if module.name not in groups and module.name not in embedded]
    config = compressed_tensors.merged_config({}, groups.items(), dense, [*groups, *dense])
    stages: dict[str, Any] = {}
    for name, group in config["config_groups"].items():
        kind = "GPTQModifier" if group["weights"].get("type", "int") == "int" else "QuantizationModifier"
        kept = {key: _plain(value) for key, value in group.items() if value is not None and key != "format"}
        stages.setdefault(kind, {"ignore": [*config["ignore"]], "config_groups": {}})["config_groups"][name] = kept
    return yaml.safe_dump({"quant_stage": {"quant_modifiers": stages}}, sort_keys=False, width=120)


def _plain(value: Any) -> Any:
    """Without nulls and without the same object twice, which YAML would write as an alias."""
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items() if one is not None}
    return [_plain(one) for one in value] if isinstance(value, (list, tuple)) else value


# ---- exllamav3 -------------------------------------------------------------------------------------------------------


def _exl3_bits(module: ToStore) -> int:
    bits: Any = None
    if module.stored is not None and module.stored[1].format == EXL3:
        bits = exl3_config.bits_of(module.stored[1])
    elif module.spec is not None and module.spec.get("format", EXL3) == EXL3:
        bits = module.spec.get("bits")
    if isinstance(bits, (int, float)) and bits == int(bits) and 1 <= bits <= 8:
        return int(bits)
    said = module.stored[1].format if module.stored is not None else "dense"
    said = describe_spec(module.spec) if module.spec is not None else said
    raise RecipeError(f"{module.where}: {said}; exllamav3's recipes give every map whole bits from 1 to 8")


def _as_exllamav3(modules: list[ToStore], base: Checkpoint) -> str:
    roles = roles_of(base)
    linear = [
        m for m in modules if m.role == "layer" and roles[m.name].kind == "linear" and roles[m.name].part == "text"
    ]
    bits = {module.name: _exl3_bits(module) for module in linear}
    if not bits:
        raise RecipeError(f"{base.label}: has no linear maps in its layers")
    heads = [m for m in modules if m.role == "head" and (m.spec is not None or _is_exl3(m))]
    mean = round(sum(bits[m.name] * m.weight for m in linear) / sum(m.weight for m in linear), 4)
    head_bits = _exl3_bits(heads[0]) if heads else EXL_HEAD_BITS
    said = {"target_bpw": mean, "achieved_bpw": mean, "head_bits": head_bits, "tensors": bits}
    return yaml.safe_dump(said, sort_keys=False)


def _is_exl3(module: ToStore) -> bool:
    return module.stored is not None and module.stored[1].format == EXL3


WRITERS: Mapping[str, Callable[[list[ToStore], Checkpoint], str]] = {
    MLX: _as_mlx,
    LLM_COMPRESSOR: _as_llm_compressor,
    EXLLAMAV3: _as_exllamav3,
}
