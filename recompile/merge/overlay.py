"""Overlay: a base checkpoint and a recipe resolved to "which source holds this module".

The one place where a recipe meets checkpoints. `model_diff -or` runs an Overlay and `recompile -or` writes the same
Overlay, so what was measured is what is written. Reads headers only; imports no torch.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recompile.checkpoint.checkpoint import (
    Checkpoint,
    PartedCheckpoint,
    StoredModule,
    TensorInfo,
    open_checkpoint,
    split_name,
)
from recompile.checkpoint.coupled_modules import ScaledSet, read_scaled_sets
from recompile.checkpoint.module_names import role_of
from recompile.checkpoint.tied_head import stored_head
from recompile.costs import ProfileHeader
from recompile.errors import MismatchError, MissingWeight, RecipeError
from recompile.formats import FORMATS
from recompile.gguf.names import Heads, Joined
from recompile.recipe.recipe import Override, Recipe, load_recipe, resolve_dir, suggest

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# Config fields that must agree between builds of one model. Anything else may differ between quantizers.
IDENTITY_FIELDS = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "moe_intermediate_size",
    "num_experts",
    "num_local_experts",
    "vocab_size",
)
_IN_LAYER = re.compile(r"\.\d+\.")
SHOWN_LINES = 8  # of a recipe, of one kind: what a person reads


@dataclass(frozen=True, slots=True)
class Placement:
    """Where one module comes from."""

    module: str
    stored: StoredModule
    checkpoint: Checkpoint
    source: str | None  # the model_dir as written in the recipe; None for the base
    override: Override | None  # the line that decided; None for the base


@dataclass(frozen=True)
class Accounting:
    """Honest size: one set of figures for every report.

    "Quantized" modules are those that the base or any source of the recipe stores quantized, head and embedding apart;
    a module of theirs that the mix takes dense counts at its dense size. Bits include scales, zero points and biases.
    """

    quantized_weights: int
    quantized_bits: int
    head_weights: int
    head_bits: int
    embedding_weights: int
    embedding_bits: int
    other_weights: int
    other_bits: int

    @property
    def bpw(self) -> float:
        """Bits per weight over quantized modules."""
        return self.quantized_bits / max(1, self.quantized_weights)

    @property
    def head_bpw(self) -> float | None:
        return self.head_bits / self.head_weights if self.head_weights else None

    @property
    def embedding_bpw(self) -> float | None:
        return self.embedding_bits / self.embedding_weights if self.embedding_weights else None

    @property
    def total_weights(self) -> int:
        return self.quantized_weights + self.head_weights + self.embedding_weights + self.other_weights

    @property
    def total_bits(self) -> int:
        return self.quantized_bits + self.head_bits + self.embedding_bits + self.other_bits

    @property
    def total_bpw(self) -> float:
        return self.total_bits / max(1, self.total_weights)

    @property
    def total_bytes(self) -> int:
        return self.total_bits // 8

    @property
    def total_gib(self) -> float:
        return self.total_bytes / 2**30

    def as_dict(self) -> dict[str, float | int | None]:
        return {
            "bpw": self.bpw,
            "head_bpw": self.head_bpw,
            "embedding_bpw": self.embedding_bpw,
            "total_bpw": self.total_bpw,
            "total_bytes": self.total_bytes,
            "total_gib": self.total_gib,
            "quantized_weights": self.quantized_weights,
            "quantized_bits": self.quantized_bits,
        }


def quantizable(checkpoints: Iterable[Checkpoint]) -> frozenset[str]:
    """Modules that any of the checkpoints stores quantized; if none is quantized, every 2-D weight of a layer."""
    checkpoints = list(checkpoints)
    found = {m.name for c in checkpoints for m in c.modules.values() if m.is_quantized}
    if not found:
        found = {
            m.name
            for c in checkpoints
            for m in c.modules.values()
            if m.shape is not None and len(m.shape) == 2 and _IN_LAYER.search(m.name)
        }
    return frozenset(name for name in found if role_of(name) == "layer")


def account(modules: Iterable[StoredModule], counted: frozenset[str]) -> Accounting:
    """Add up what modules take; `counted` are those that `bpw` is over."""
    totals: Counter[str] = Counter()
    for module in modules:
        role = role_of(module.name)
        kind = role if role != "layer" else ("quantized" if module.name in counted else "other")
        totals[f"{kind}_weights"] += module.numel
        totals[f"{kind}_bits"] += 8 * module.size_bytes
    kinds = ("quantized", "head", "embedding", "other")
    return Accounting(**{f"{kind}_{what}": totals[f"{kind}_{what}"] for kind in kinds for what in ("weights", "bits")})


@dataclass(frozen=True)
class Overlay:
    """A WeightSource: the base with some modules taken from other checkpoints."""

    base: Checkpoint
    recipe: Recipe | None
    sources: Mapping[str, Checkpoint]  # model_dir as written -> checkpoint
    placements: Mapping[str, Placement]
    warnings: tuple[str, ...] = ()
    _by_module: dict[str, StoredModule] = field(default_factory=dict, repr=False, compare=False)

    @staticmethod
    def of_choice(header: ProfileHeader, checkpoints: Mapping[str, Checkpoint], choice: Mapping[str, str]) -> Overlay:
        """A choice of the optimizer (group -> candidate label) as what `build_overlay` makes of its recipe.

        checkpoints: by candidate label. Raises MissingWeight for a module that its source lacks.
        """
        base = checkpoints[header.base]
        placements = {name: Placement(name, stored, base, None, None) for name, stored in base.modules.items()}
        for group in header.groups:
            label = choice[group.name]
            source = checkpoints[label]
            for module in group.modules:
                if module not in source.modules:
                    raise MissingWeight(f"{source.label} has no module {module}")
                directory = None if label == header.base else header.candidate(label).model_dir
                placements[module] = Placement(module, source.modules[module], source, directory, None)
        sources = {
            header.candidate(label).model_dir: checkpoints[label] for label in checkpoints if label != header.base
        }
        return Overlay(base, None, sources, placements)

    @property
    def label(self) -> str:
        name = self.base.label
        return f"{name} + {self.recipe.name}" if self.recipe is not None else name

    @cached_property
    def modules(self) -> Mapping[str, StoredModule]:
        return {name: placement.stored for name, placement in self.placements.items()}

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """The base's config; `tie_word_embeddings` is false wherever a head of its own is stored."""
        config = dict(self.base.config)
        if config.get("tie_word_embeddings") and stored_head(self.modules) is not None:
            config["tie_word_embeddings"] = False
        return config

    @property
    def checkpoints(self) -> tuple[Checkpoint, ...]:
        return (self.base, *self.sources.values())

    @cached_property
    def formats(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(m.format for m in self.modules.values() if m.is_quantized))

    @cached_property
    def accounting(self) -> Accounting:
        return account(self.modules.values(), quantizable(self.checkpoints))

    @cached_property
    def scaled_sets(self) -> tuple[ScaledSet, ...]:
        """Sets of modules of the mix between which their checkpoint moved scales (AWQ, SmoothQuant)."""
        found: dict[ScaledSet, None] = {}
        for checkpoint in self.checkpoints:
            for entry in read_scaled_sets(checkpoint.path):
                placed = [self.placements[name] for name in entry.members if name in self.placements]
                if placed and all(placement.checkpoint is checkpoint for placement in placed):
                    found[entry] = None
        return tuple(found)

    @property
    def joined(self) -> Mapping[str, Joined]:
        """The fused tensors that the mix holds in parts."""
        return self.base.joined if isinstance(self.base, PartedCheckpoint) else {}

    @property
    def heads(self) -> Heads | None:
        return self.base.heads if isinstance(self.base, PartedCheckpoint) else None

    @property
    def overridden(self) -> int:
        return sum(placement.source is not None for placement in self.placements.values())

    def has(self, tensor: str) -> bool:
        placement = self.placements.get(split_name(tensor)[0]) or self.placements.get(tensor)
        return placement is not None and placement.checkpoint.has(tensor)

    def load(self, tensor: str, *, device: str | torch.device = "cpu") -> Tensor:
        """As Checkpoint.load, from the source that holds the tensor's module; fused tensors that the base keeps in
        parts are put together of parts from where each is taken."""
        if tensor in self.joined:
            assert isinstance(self.base, PartedCheckpoint), "no other keeps tensors in parts"
            return self.base.join(self.joined[tensor], lambda part: self.load(part, device=device))
        return self.source_of(tensor).load(tensor, device=device)

    def source_of(self, tensor: str) -> Checkpoint:
        """The checkpoint that a tensor comes from."""
        placement = self.placements.get(split_name(tensor)[0]) or self.placements.get(tensor)
        return placement.checkpoint if placement else self.base


def build_overlay(
    base: Checkpoint, recipe: Recipe | str | os.PathLike[str] | None, *, allow_unmatched: bool = False
) -> Overlay:
    """Resolve a recipe against a base checkpoint and the sources it names.

    Raises RecipeError (with the line) for a directory that does not exist, a key that matches no tensor (unless
    allow_unmatched), and a module whose parts would come from different sources; MismatchError for a source that is not
    a build of the same model; MissingWeight for a source without the module that is asked of it.
    """
    if recipe is None:
        placements = {name: Placement(name, stored, base, None, None) for name, stored in base.modules.items()}
        return Overlay(base, None, {}, placements, base.notes)
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe)
    warnings = [*base.notes, *recipe.warnings]
    sources = _open_sources(recipe, base, warnings)
    names = dict.fromkeys(base.tensors)
    for source in sources.values():
        names.update(dict.fromkeys(source.tensors))
    aliases = {name: alias for checkpoint in (base, *sources.values()) for name, alias in checkpoint.aliases.items()}
    if aliases:
        recipe = replace(recipe, aliases=aliases)
    _check_keys(recipe, list(names), warnings, allow_unmatched)
    placements = {}
    modules = dict.fromkeys(base.modules)
    for source in sources.values():
        modules.update(dict.fromkeys(source.modules))
    for name in modules:
        placement = _place(name, base, recipe, sources)
        if placement is not None:
            placements[name] = placement
    warnings += _keep_scaled_together(recipe, base, sources, placements)
    return Overlay(base, recipe, sources, placements, tuple(warnings))


def _open_sources(recipe: Recipe, base: Checkpoint, warnings: list[str]) -> dict[str, Checkpoint]:
    """Open every directory that an override uses; equal directories under two spellings are opened once."""
    used = {override.source for override in recipe.overrides}
    opened: dict[Path, Checkpoint] = {}
    sources: dict[str, Checkpoint] = {}
    for source in {source.id: source for source in recipe.sources}.values():  # a repeated id keeps the last directory
        if source.id not in used or source.model_dir in sources:
            continue
        if source.spec is not None:
            raise RecipeError(
                f"{recipe.location(source)}: source {source.id!r} ({source.model_dir}) is not there yet: this recipe "
                f"is for model_quantize -i BASE -o OUT -or {recipe.name}, which makes the mix in one pass"
            )
        path, note = resolve_dir(recipe, source.model_dir)
        if note:
            warnings.append(note)
        real = path.resolve()
        if real not in opened:
            opened[real] = open_checkpoint(path)
            warnings += [note for note in opened[real].notes if note not in warnings]
            check_same_model(base, opened[real], f"{recipe.name}:{source.line}: ")
        sources[source.model_dir] = opened[real]
    return sources


def _check_keys(recipe: Recipe, names: list[str], warnings: list[str], allow_unmatched: bool) -> None:
    unmatched = recipe.unmatched(names)
    if unmatched:
        numbers = {id(override): number for number, override in enumerate(recipe.overrides)}
        lines = []
        for override in unmatched[:SHOWN_LINES]:
            near = suggest(override.key, [*names, *recipe.aliases.values()])
            hint = f'; did you mean "{near}"?' if near else ""
            lines.append(
                f"{recipe.name}:{override.line}: overrides[{numbers[id(override)]}].key "
                f'"{override.key[:200]}" matches no tensor{hint}'
            )
        if len(unmatched) > SHOWN_LINES:
            lines.append(f"{recipe.name}: and {len(unmatched) - SHOWN_LINES} more keys that match no tensor")
        if not allow_unmatched:
            raise RecipeError("\n".join(lines) + " ({allow_unmatched} goes on without it)")
        warnings += lines
    shadowed = recipe.shadowed(names)
    for hidden, winner in shadowed[:SHOWN_LINES]:
        warnings.append(
            f'{recipe.name}:{hidden.line}: "{hidden.key}" never decides: every tensor it matches is taken by '
            f'"{winner.key}" on line {winner.line} (a directory first named later wins)'
        )
    if len(shadowed) > SHOWN_LINES:
        warnings.append(f"{recipe.name}: and {len(shadowed) - SHOWN_LINES} more lines that never decide")


def _place(name: str, base: Checkpoint, recipe: Recipe, sources: Mapping[str, Checkpoint]) -> Placement | None:
    """Where module `name` comes from; None for a module that only a source has and the recipe does not ask for."""
    stored = base.modules.get(name)
    chosen = _directories(recipe, stored.parts.values()) if stored else {None: []}
    if set(chosen) == {None}:
        for directory, source in sources.items():  # names that only the source's format has
            if name in source.modules:
                found = _directories(recipe, source.modules[name].parts.values())
                if directory in found:
                    chosen = found
                    break
    if len(chosen) > 1:
        parts = "; ".join(f"{', '.join(tensors[:3])} from {where or 'the base'}" for where, tensors in chosen.items())
        line = _line_of(recipe, next(tensors[0] for where, tensors in chosen.items() if where is not None))
        raise RecipeError(
            f"{recipe.name}:{line}: parts of {name} would come from different places ({parts}); "
            f'a module moves as a whole: write "{name}.*"'
        )
    (origin,) = chosen
    if origin is None:
        return Placement(name, stored, base, None, None) if stored else None
    source = sources[origin]
    tensor = chosen[origin][0]
    override = recipe.explain(tensor).override
    if name not in source.modules:
        raise MissingWeight(
            f"{recipe.name}:{_line_of(recipe, tensor)}: {origin} has no module {name}, "
            f'which key "{override.key if override else tensor}" asks of it'
        )
    taken = source.modules[name]
    if stored is not None:
        check_shapes(name, stored, taken, base.label, origin)
    return Placement(name, taken, source, origin, override)


def _keep_scaled_together(
    recipe: Recipe, base: Checkpoint, sources: Mapping[str, Checkpoint], placements: dict[str, Placement]
) -> list[str]:
    """Let norms go where all their readers come from, and refuse what would be another function. Returns notes.

    A norm that was scaled for its readers, or unscaled for others', is moved along unless a line of the recipe names
    it; every other split of a scaled set is a MismatchError.
    """
    labels = {id(base): base.label} | {id(checkpoint): where for where, checkpoint in sources.items()}
    moved: dict[str, list[str]] = {}
    for checkpoint in {id(found): found for found in (base, *sources.values())}.values():
        for entry in read_scaled_sets(checkpoint.path):
            present = [name for name in entry.members if name in placements]
            if all(placements[name].checkpoint is not checkpoint for name in present):
                continue
            readers = [placements[name] for name in entry.consumers if name in placements]
            producer = placements.get(entry.producer)
            origins = {id(reader.checkpoint) for reader in readers}
            if producer is None or not readers or origins | {id(producer.checkpoint)} == {id(checkpoint)}:
                continue
            first, rest = readers[0], [reader for reader in readers if reader.checkpoint is not readers[0].checkpoint]
            other = first.checkpoint.modules.get(entry.producer)
            if not rest and producer.override is None and not producer.stored.is_quantized and other is not None:
                placements[entry.producer] = replace(
                    first, module=entry.producer, stored=other, checkpoint=first.checkpoint
                )
                moved.setdefault(labels[id(first.checkpoint)], []).append(entry.producer)
                continue
            apart = rest[0] if rest else producer
            raise MismatchError(
                f"{recipe.name}: {entry.producer} and the {len(readers)} maps that read it "
                f"({', '.join(name.rpartition('.')[2] for name in entry.consumers[:4])}) belong together in "
                f"{checkpoint.label}, which scaled them for each other (AWQ or SmoothQuant); the recipe takes "
                f"{first.module} from {labels[id(first.checkpoint)]} and {apart.module} from "
                f"{labels[id(apart.checkpoint)]}: take all of them from one source"
            )
    return [
        f"{len(names)} norms come from {where} with all the maps that read them, whose scales they carry (first: "
        f"{names[0]})"
        for where, names in moved.items()
    ]


def _directories(recipe: Recipe, parts: Iterable[TensorInfo]) -> dict[str | None, list[str]]:
    found: dict[str | None, list[str]] = {}
    for part in parts:
        found.setdefault(recipe.source_dir(part.name), []).append(part.name)
    return found


def _line_of(recipe: Recipe, tensor: str) -> int:
    override = recipe.explain(tensor).override
    return override.line if override else 0


# ---- same model ----------------------------------------------------------------------------------------------------


def check_same_model(base: Checkpoint, other: Checkpoint, where: str = "") -> None:
    """Raise MismatchError unless two checkpoints are builds of one model: architecture fields and tokenizer agree."""
    for name in IDENTITY_FIELDS:
        left, right = _identity(base.config, name), _identity(other.config, name)
        if left is not None and right is not None and left != right:
            raise MismatchError(
                f"{where}{other.label} is not a build of the same model as {base.label}: {name} in config.json is "
                f"{right}, wanted {left}"
            )
    from recompile.model.tokenizer import tokenizer_sha256

    left_hash, right_hash = tokenizer_sha256(base.path), tokenizer_sha256(other.path)
    if left_hash is None or right_hash is None or left_hash.startswith("gguf:") != right_hash.startswith("gguf:"):
        return  # none, or one in a GGUF file and one beside: nothing to compare
    if left_hash != right_hash:
        raise MismatchError(
            f"{where}{other.label} has another tokenizer than {base.label} (tokenizer hash {right_hash[:12]} against "
            f"{left_hash[:12]}); their token ids do not mean the same"
        )


def _identity(config: Mapping[str, Any], name: str) -> Any:
    nested = config.get("text_config")
    return config.get(name, nested.get(name) if isinstance(nested, Mapping) else None)


def check_shapes(module: str, base: StoredModule, other: StoredModule, base_label: str, other_label: str) -> None:
    """Raise MismatchError unless two stored forms of one module have the same weight shape, padding allowed for."""
    if base.shape is None or other.shape is None:
        same = {p: i.shape for p, i in base.parts.items()} == {p: i.shape for p, i in other.parts.items()}
        left, right = (", ".join(f"{p} {list(i.shape)}" for p, i in m.parts.items()) for m in (base, other))
        same = same or base.shape != other.shape  # a padded or decoded form: the running model checks it
    else:
        left, right = str(list(base.shape)), str(list(other.shape))
        same = _padded(base, other) == _padded(other, base)
        if base.is_quantized != other.is_quantized:  # a dense Conv1D is stored [in, out], a quantized one [out, in]
            same = same or (len(base.shape) == 2 and base.shape == other.shape[::-1])
    if not same:
        raise MismatchError(f"{other_label}: {module} is {right}, in {base_label} it is {left}; not the same model")


def _padded(module: StoredModule, other: StoredModule) -> tuple[int, ...]:
    shape = module.shape or ()
    if len(shape) != 2:
        return shape
    steps = [step for fmt in (module.format, other.format) if (step := FORMATS[fmt].pads_to) is not None]
    if not steps:
        return shape
    out_step, in_step = max(step[0] for step in steps), max(step[1] for step in steps)
    return (-(-shape[0] // out_step) * out_step, -(-shape[1] // in_step) * in_step)
