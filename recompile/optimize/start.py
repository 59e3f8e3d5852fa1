"""A recipe made by hand, or by another solver, as a choice of a profile's candidates: what a search may start from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from recompile.checkpoint.checkpoint import Checkpoint
from recompile.costs import Profile
from recompile.errors import RecompileError
from recompile.recipe.recipe import Recipe, load_recipe, resolve_dir


def read_start(path: Path, profile: Profile, checkpoints: Mapping[str, Checkpoint] | None) -> dict[str, str]:
    """A recipe as a choice of the profile's candidates.

    Raises RecompileError for a directory that is no candidate and a group whose modules come from several.
    """
    recipe = load_recipe(path)
    header = profile.header
    labels = {_real(candidate.model_dir): candidate.label for candidate in header.candidates}
    of_directory: dict[str | None, str] = {
        source.model_dir: _label_of(recipe, source.model_dir, labels, profile) for source in recipe.sources
    }
    has_base = isinstance(recipe.base, str)
    of_directory[None] = _label_of(recipe, recipe.base, labels, profile) if has_base else header.base
    choice = {}
    for group in header.groups:
        found: dict[str, str] = {}
        for module in group.modules:
            stored = checkpoints[header.base].modules.get(module) if checkpoints is not None else None
            tensors = [part.name for part in stored.parts.values()] if stored is not None else [f"{module}.weight"]
            for tensor in tensors:
                found.setdefault(of_directory[recipe.source_dir(tensor)], tensor)
        if len(found) > 1:
            parts = "; ".join(f"{tensor} from {label}" for label, tensor in found.items())
            raise RecompileError(
                f'{path}: group "{group.name}" is split ({parts}), and the profile chooses it as one; profile at a'
                f" finer {{level}}, or edit the recipe"
            )
        (choice[group.name],) = found
    return choice


def _real(directory: str) -> str:
    return str(Path(directory).resolve())


def _label_of(recipe: Recipe, directory: str, labels: Mapping[str, str], profile: Profile) -> str:
    real = _real(directory)
    if real not in labels:  # as the reader of recipes finds it: here, or beside the recipe
        found, _ = resolve_dir(recipe, directory)
        real = _real(str(found))
    if real not in labels:
        known = ", ".join(candidate.model_dir for candidate in profile.header.candidates)
        raise RecompileError(f"{recipe.name}: {directory} is no candidate of the profile; these are: {known}")
    return labels[real]
