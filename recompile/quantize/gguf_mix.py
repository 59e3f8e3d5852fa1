"""A mix of GGUF types straight from a dense base: which type a recipe gives to every tensor.

    sources:
      - {id: Q4_K, type: Q4_K}
      - {id: Q6_K, type: Q6_K}
    overrides:
      - {key: "*.down_proj.*", source: Q6_K}        # or GGUF's own names, blk.*.ffn_down.*
    base: {type: Q4_K}

Recipes of other tools (llama-quantize, --custom-q, thireus) say the same in their words.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from recompile import __version__
from recompile.checkpoint.checkpoint import Checkpoint
from recompile.errors import FormatError, RecipeError
from recompile.formats.gguf_encode import resolve
from recompile.formats.gguf_types import TYPES, find_type
from recompile.gguf.container import NewTensor
from recompile.merge.type_recipes import TypeRecipe, load_type_recipe, looks_like_type_recipe
from recompile.merge.write_gguf import file_type_of
from recompile.quantize.gguf import PRESETS, BaseTensor, Mix, Preset, base_tensors, find_preset, layers_of
from recompile.recipe.recipe import Recipe, load_recipe, suggest

# Types whose presets give every weight of the layers the type itself.
_UNIFORM = frozenset({"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q6_K", "Q8_0", "BF16", "F16", "F32"})


def makes_gguf(recipe: Recipe) -> bool:
    """Whether a recipe's sources, or what it begins with, are GGUF types to be made."""
    specs: list[Mapping[str, Any]] = [source.spec for source in recipe.sources if source.spec is not None]
    if isinstance(recipe.base, dict):
        specs.append(recipe.base)
    return any("type" in spec for spec in specs)


def is_gguf_recipe(path: Path) -> bool:
    """Whether a recipe is of GGUF types: ours with such sources, or another tool's."""
    return looks_like_type_recipe(path) or makes_gguf(load_recipe(path))


def read_mix(
    path: Path, base: Checkpoint, out: Path, bits: Sequence[str] = ()
) -> tuple[Mix, dict[str, str], tuple[str, ...]]:
    """The types that a recipe, ours or another tool's, gives to the tensors of a file, what the file's keys say of
    that, and the recipe's warnings.

    bits: the type or preset of what no line names, at most one"""
    if len(bits) > 1:
        raise FormatError("{recipe}: {bits} gives the type of what no line names, so one type")
    check_out(out, f"{path} names types of GGUF, and a mix of them is one file")
    unnamed = bits[0] if bits else None
    tensors = base_tensors(base)
    warnings: tuple[str, ...] = ()
    if looks_like_type_recipe(path):
        types = load_type_recipe(path).of(tensor.name for tensor in tensors)
        said = types.notes if unnamed is None else ()
        if unnamed is None and types.base is not None:
            said = (*said, *filter(None, [preset_of_command(types)[1]]))
        warnings = (*said, *types.never_deciding(t.name for t in tensors))
        mix = mix_of_types(types, base, tensors, unnamed, out.name)
    else:
        recipe = load_recipe(path)
        warnings = tuple(recipe.warnings)
        mix = mix_of(recipe, base, tensors, unnamed, out.name)
    source = json.dumps({"file": base.path.resolve().name, "fingerprint": base.fingerprint})
    keys = {"version": __version__, "base": source, "recipe": path.read_text(encoding="utf-8")}
    return mix, keys, warnings


def mix_of(recipe: Recipe, base: Checkpoint, tensors: Sequence[BaseTensor], unnamed: str | None, name: str) -> Mix:
    """The types of a recipe whose sources are types. Lines name tensors by Hugging Face's names or by GGUF's.

    unnamed: the type or preset of what no line names; None: the recipe's own `base:`, else it stays as the base has it
    Raises RecipeError for sources that are no types, lines that name nothing to quantize, experts of one tensor that
    are given several types; FormatError for unknown types.
    """
    types: dict[str, str] = {}
    for source in recipe.sources:
        if source.spec is None or "type" not in source.spec:
            what = (
                f"{source.model_dir} is a directory" if source.spec is None else f"{source.model_dir} is no GGUF type"
            )
            raise RecipeError(
                f"{recipe.location(source)}: {what}; a GGUF mix that is to be made has sources like "
                f"{{id: Q4_K, type: Q4_K}}, and only such"
            )
        try:
            types[source.model_dir] = find_type(str(source.spec["type"])).name
        except FormatError as error:
            raise RecipeError(f"{recipe.location(source)}: {error}") from error
    if unnamed is None and isinstance(recipe.base, dict):
        if "type" not in recipe.base:
            raise RecipeError(f"{recipe.name}: base: {recipe.base}: wanted a GGUF type, as its sources are")
        unnamed = str(recipe.base["type"])
    weighty = [tensor for tensor in tensors if not tensor.plain]
    recipe = replace(recipe, aliases={source: t.name for t in weighty for source in t.seen})
    names = [source for tensor in weighty for source in tensor.seen]
    for line in recipe.unmatched(names):
        near = suggest(line.key, [*names, *recipe.aliases.values()])
        hint = f'; did you mean "{near}"?' if near else f"; such as {names[0]}"
        raise RecipeError(f'{recipe.location(line)}: key "{line.key}" matches no tensor to quantize{hint}')
    kinds: dict[str, str] = {}
    for tensor in weighty:
        found = {recipe.source_dir(source) for source in tensor.seen}
        if len(found) > 1:
            raise RecipeError(
                f"{recipe.name}: {tensor.name} holds {len(tensor.seen)} experts and has one type, the recipe gives "
                f"them {', '.join(sorted(str(types.get(directory or '', unnamed)) for directory in found))}"
            )
        (directory,) = found
        if directory is not None:
            kinds[tensor.name] = types[directory]
    return _finish(kinds, base, weighty, unnamed, name)


def mix_of_types(
    types: TypeRecipe, base: Checkpoint, tensors: Sequence[BaseTensor], unnamed: str | None, name: str
) -> Mix:
    """The same of another tool's recipe. Raises RecipeError for rules that match no tensor, and for a preset that is
    not made here."""
    stray = types.stray([tensor.name for tensor in tensors])
    if stray is not None:
        raise RecipeError(stray)
    if unnamed is None and types.base is not None:
        unnamed, _ = preset_of_command(types)
    weighty = [tensor for tensor in tensors if not tensor.plain]
    return _finish(types.resolve(tensor.name for tensor in weighty), base, weighty, unnamed, name)


def preset_of_command(types: TypeRecipe) -> tuple[str, str]:
    """The preset that a command names for all other tensors, and a warning where ours says less; empty for none.

    llama-quantize reads Q3_K, Q4_K and Q5_K as the presets with _M. Raises RecipeError for one that is not made here.
    """
    assert types.base is not None
    where = f"{types.name}:{types.base_line}: {types.dialect}"
    name = types.base.upper()
    name = f"{name}_M" if name in ("Q3_K", "Q4_K", "Q5_K") else name
    try:
        preset = find_preset(name)
    except FormatError as error:
        raise RecipeError(f"{where}: {error}; name another, or give {{bits}}") from error
    if preset.rules or name in _UNIFORM or name in PRESETS:
        return preset.name, ""
    return preset.name, f"{where}: all that no rule names gets {name} itself; the tool's {name} varies some tensors"


def _finish(
    kinds: dict[str, str], base: Checkpoint, weighty: Sequence[BaseTensor], unnamed: str | None, name: str
) -> Mix:
    preset: Preset | None = find_preset(unnamed) if unnamed is not None else None
    layers = layers_of(base, weighty)
    tied = not any(tensor.name == "output.weight" for tensor in weighty)
    for tensor in weighty:
        if tensor.name not in kinds:
            stored = base.tensors[tensor.seen[0]].dtype
            kinds[tensor.name] = preset.wanted(tensor.name, layers, tied) if preset is not None else stored
    got = types_got(kinds, weighty)
    new = [NewTensor(tensor.name, TYPES[got[tensor.name]], tensor.ne) for tensor in weighty]
    return Mix(name, {tensor.name: kinds[tensor.name] for tensor in weighty}, file_type_of(new))


def types_got(kinds: Mapping[str, str], tensors: Sequence[BaseTensor]) -> dict[str, str]:
    """GGUF tensor -> the type that it really gets, F32 for those that are never quantized."""
    return {t.name: "F32" if t.plain else resolve(kinds[t.name], t.ne[0]).name for t in tensors}


def check_out(out: Path, why: str = "a GGUF mix is one file") -> None:
    """Raises RecipeError where the name given for a mix is no GGUF file's. why: it has to be one, for the message"""
    if out.suffix != ".gguf":
        raise RecipeError(f"{{out}} {out}: {why}; give it a name that ends in .gguf")
