"""What the directories of a recipe were made of, so that its mix can be made anew from the base.

A recipe for a merge names variants. Those that model_quantize made say in their report how: each stands for the source
{id: 4, bits: 4, ...} that makes the same modules.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from recompile.checkpoint.checkpoint import read_json
from recompile.errors import RecompileError
from recompile.formats import COMPRESSED, exl2, exl3, packed_int
from recompile.formats.mlx_config import QUANT_METHOD as MLX
from recompile.quantize.quantize_report import REPORT
from recompile.recipe.recipe import Recipe, load_recipe, resolve_dir

_RATE = re.compile(r"(\d{1,2}(?:\.\d{1,4})?)bpw")


def load_made_recipe(path: Path) -> Recipe:
    """A recipe whose directories, and a `base:` that is one, are replaced by what they were made of. Those that do not
    say it stay. Raises RecipeError."""
    recipe = load_recipe(path)
    sources = [
        source if source.spec is not None else replace(source, spec=_spec_at(recipe, source.model_dir))
        for source in recipe.sources
    ]
    base = recipe.base
    if isinstance(base, str):
        base = _spec_at(recipe, base) or base
    return replace(recipe, sources=tuple(sources), base=base)


def _spec_at(recipe: Recipe, model_dir: str) -> Mapping[str, Any] | None:
    try:
        directory, _ = resolve_dir(recipe, model_dir)
        return spec_of_variant(directory) if (directory / REPORT).is_file() else None
    except RecompileError:  # it is refused as a directory, by its line
        return None


def spec_of_variant(directory: Path) -> Mapping[str, Any] | None:
    """The source that a variant's report describes; None for a mix, or a scheme with exceptions.

    Raises CheckpointError for a report that cannot be read."""
    report = read_json(directory / REPORT)
    encoder, variant = _mapping(_mapping(report, "made_by"), "encoder"), _mapping(report, "variant")
    name, form = variant.get("name"), encoder.get("format")
    if not isinstance(name, str):
        return None
    if form == COMPRESSED:
        rules = _mapping(encoder, "variants").get(name)
        alone = rules[0] if isinstance(rules, list) and len(rules) == 1 else None
        return {"scheme": name} if isinstance(alone, dict) and alone.get("scheme") == name else None
    rate = _RATE.fullmatch(name)
    if rate is None:
        return {"scheme": name, "format": MLX} if form == MLX else None
    bits = float(rate[1])
    if form == packed_int.FORMAT:
        return {"bits": bits, "group_size": encoder.get("group_size"), "symmetric": encoder.get("symmetric", True)}
    if form in (exl2.FORMAT, exl3.FORMAT):
        return {"bits": bits, "format": form}
    entries = encoder.get("variants")
    for entry in entries if form == MLX and isinstance(entries, list) else ():
        if isinstance(entry, dict) and entry.get("bits") == bits:
            return {"bits": bits, "group_size": entry.get("group_size"), "format": MLX}
    return None


def _mapping(value: Any, key: str) -> Mapping[str, Any]:
    """A part that is a mapping, in a mapping; empty where there is none."""
    found = value.get(key) if isinstance(value, dict) else None
    return found if isinstance(found, dict) else {}
