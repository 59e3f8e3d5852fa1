"""Recipes (override YAML): read, explained, checked and written. Opens no checkpoint and imports no torch.

    sources:
      - {id: 4, model_dir: ./4bpw}
      - {id: 5, model_dir: ./5bpw}
    overrides:
      - {key: "model.layers.*.self_attn.*", source: 4}
      - {key: "model.layers.0.*", source: 5}

Who wins. A later source of the same id replaces the earlier one. A key that is repeated to the letter keeps its first
position and takes its last source. The keys are then grouped by directory, in order of first mention, and the group
that was first mentioned last is asked first: if any of its patterns matches, it wins. No match: the base.
"""

from __future__ import annotations

from recompile.recipe.globs import Glob, suggest
from recompile.recipe.precedence import Recipe
from recompile.recipe.read_yaml import load_recipe, parse_recipe, resolve_dir
from recompile.recipe.spelling import describe_spec
from recompile.recipe.values import DENSE, MADE_KINDS, MADE_SETTINGS, Decision, Override, Source, SourceId
from recompile.recipe.write_yaml import dump_recipe

__all__ = [
    "DENSE",
    "MADE_KINDS",
    "MADE_SETTINGS",
    "Decision",
    "Glob",
    "Override",
    "Recipe",
    "Source",
    "SourceId",
    "describe_spec",
    "dump_recipe",
    "load_recipe",
    "parse_recipe",
    "resolve_dir",
    "suggest",
]
