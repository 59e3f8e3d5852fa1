"""A mix as another tool's recipe: of GGUF types (llama-quantize, ik_llama.cpp's --custom-q, thireus), or of bits and
schemes (emit_schemes.py)."""

from __future__ import annotations

from pathlib import Path

from recompile.checkpoint.checkpoint import Checkpoint, GgufCheckpoint, open_checkpoint
from recompile.errors import RecipeError
from recompile.events import Note, OnEvent, ignore
from recompile.formats.gguf_types import TYPES
from recompile.io.sizes import format_bpw
from recompile.merge.overlay import build_overlay
from recompile.merge.run import MergeOptions, read_type_recipe
from recompile.merge.type_recipes import emit, looks_like_type_recipe, types_of
from recompile.model.decoded import as_dense
from recompile.quantize.emit_schemes import WRITERS, modules_of, modules_to_make
from recompile.quantize.gguf import base_tensors
from recompile.quantize.gguf_mix import makes_gguf, read_mix, types_got
from recompile.recipe.other_tools import MLX
from recompile.recipe.recipe import load_recipe

DIALECTS = ("llama-quantize", "ik-custom-q", "thireus", *WRITERS)


def emit_recipe(base_dir: str, dialect: str, options: MergeOptions, on_event: OnEvent = ignore) -> str:
    """The types or schemes of a mix that a merge would write, or that `recompile.quantize` would make of a dense base,
    as a recipe of another tool. Raises RecipeError for what the tool cannot say."""
    if dialect in WRITERS:
        return _emit_schemes(base_dir, dialect, options, on_event)
    base, path = open_checkpoint(base_dir), options.recipe
    if path is not None and not options.type_sources and _is_to_be_made(base, path):
        mix, _, warnings = read_mix(path, base, Path("mix.gguf"))
        types = types_got(mix.kinds, base_tensors(base))
        comment = f"{base.label} ({path})"
    else:
        recipe = read_type_recipe(base, path, options.type_sources, options.allow_unmatched)
        overlay = build_overlay(base, recipe or path, allow_unmatched=options.allow_unmatched)
        warnings, types = tuple(overlay.warnings), types_of(overlay)
        comment = f"{overlay.label}, {format_bpw(overlay.accounting.bpw)} bpw over quantized modules"
    for warning in warnings:
        on_event(Note(warning, "Warning"))
    own = sorted({name for name in types.values() if TYPES[name].fork})
    if own and dialect == "llama-quantize":
        said = f"{', '.join(own)}: ik_llama.cpp's own, which llama.cpp's llama-quantize refuses"
        on_event(Note(said, "Warning"))
    return emit(types, dialect, comment)


def _emit_schemes(base_dir: str, dialect: str, options: MergeOptions, on_event: OnEvent) -> str:
    base, path = open_checkpoint(base_dir), options.recipe
    if options.type_sources or (path is not None and looks_like_type_recipe(path)):
        raise RecipeError(f"{path}: names GGUF types, and {dialect} has none")
    recipe = load_recipe(path) if path is not None else None
    if recipe is not None and (isinstance(recipe.base, dict) or any(s.spec is not None for s in recipe.sources)):
        warnings, base = recipe.warnings, as_dense(base)
        modules = modules_to_make(recipe, base, dialect == MLX)
    else:
        overlay = build_overlay(base, path, allow_unmatched=options.allow_unmatched)
        warnings, modules = tuple(overlay.warnings), modules_of(overlay)
    for warning in warnings:
        on_event(Note(warning, "Warning"))
    return WRITERS[dialect](modules, base)


def _is_to_be_made(base: Checkpoint, path: Path) -> bool:
    """Whether a recipe is of GGUF types that model_quantize would make of a dense base."""
    if looks_like_type_recipe(path):
        return not base.is_quantized and not isinstance(base, GgufCheckpoint)
    return makes_gguf(load_recipe(path))
