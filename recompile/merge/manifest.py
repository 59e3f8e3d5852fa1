"""recompile_manifest.json: where every module of an output was taken from, and the hash of its bytes."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from typing import Any

from recompile import __version__
from recompile.checkpoint.checkpoint import Checkpoint
from recompile.errors import RecipeError
from recompile.merge.overlay import Overlay
from recompile.merge.write_plan import WritePlan
from recompile.recipe.recipe import dump_recipe, parse_recipe

MANIFEST_VERSION = 1


def recipe_text(overlay: Overlay) -> str | None:
    """The recipe as written. Raises RecipeError if the file no longer says what was resolved."""
    recipe = overlay.recipe
    if recipe is None:
        return None
    if recipe.path is None:
        return dump_recipe(recipe)
    try:
        raw = recipe.path.read_bytes()
        text = io.TextIOWrapper(io.BytesIO(raw), encoding="utf-8").read()  # with the line ends of read_text
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{recipe.name}: cannot be read again: {error}") from error
    if hashlib.sha256(raw).hexdigest() == recipe.text_sha256:
        return text
    again = parse_recipe(text, recipe.name)
    if (again.sources, again.overrides) != (recipe.sources, recipe.overrides):
        raise RecipeError(f"{recipe.name}: changed while this command was reading it; start again")
    return text


def make_manifest(plan: WritePlan, hashes: Mapping[str, str]) -> dict[str, Any]:
    """What the output is made of; the same for every run with the same inputs (no times, no host, no output name).

    A module's hash is the sha256 of the bytes of its parts, one after another in the order of the part names.
    """
    overlay = plan.overlay
    modules: dict[str, Any] = {}
    for module in plan.modules:
        entry: dict[str, Any] = {
            "source": module.placement.source,
            "format": module.stored.format,
            "bits_per_weight": round(module.stored.bits_per_weight, 6),
            "sha256": hashes[module.name],
        }
        if module.conversion is not None:
            entry["converted_from"] = module.placement.stored.format
        elif module.stored.format != module.placement.stored.format:
            entry["decoded_from"] = module.placement.stored.format
        modules[module.name] = entry
    text = plan.recipe_text
    return {
        "manifest_version": MANIFEST_VERSION,
        "recompile_version": __version__,
        "dense": plan.dense,
        "base": _manifest_source(overlay.base),
        "sources": {model_dir: _manifest_source(source) for model_dir, source in overlay.sources.items()},
        "recipe": None
        if text is None or overlay.recipe is None
        else {"name": overlay.recipe.name, "sha256": hashlib.sha256(text.encode()).hexdigest(), "text": text},
        "accounting": plan.accounting.as_dict(),
        "modules": modules,
    }


def _manifest_source(checkpoint: Checkpoint) -> dict[str, str]:
    return {"directory": checkpoint.label, "fingerprint": checkpoint.fingerprint}
