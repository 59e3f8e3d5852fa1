"""Experts of a decoded copy, put together again: transformers reads some models' experts from one tensor a layer only.

Quantized builds hold such experts one by one (checkpoint/fused_experts.py says how they come apart). Names and layout
are those that transformers' own mapping reads, below the prefix that the checkpoint gives its layers.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from recompile.checkpoint.checkpoint import GgufCheckpoint, StoredModule, split_name
from recompile.checkpoint.config_fields import config_place
from recompile.errors import CheckpointError, MissingWeight, UnsupportedError
from recompile.formats import WEIGHT_PARTS
from recompile.merge.overlay import Overlay, Placement

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_EXPERT = re.compile(r"\.(\d+)\.[a-z]\w*\.(?:weight|bias)$")
_LAYER = re.compile(r"(.*?\.)(\d+)\.(.+)")


@dataclass(frozen=True)
class FusedExperts:
    """One tensor of the output that is made of all experts' weights or biases of a projection, or of two.

    tensors: names in the mix, role by role, each in the order of the experts; roles: "gate", "up" or "down" of each
    """

    name: str
    shape: tuple[int, ...]
    tensors: tuple[str, ...]
    roles: tuple[str | None, ...]
    stack: Any = field(repr=False)  # ExpertStack, which needs torch
    turned: Callable[[Tensor], Tensor] | None = field(default=None, repr=False)  # parameter -> as it is stored

    @property
    def module(self) -> str:
        """The module that it is in the output: itself where the parameter has a name of its own."""
        module, part = split_name(self.name)
        return module if part in WEIGHT_PARTS else self.name

    def make(self, overlay: Overlay, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> Tensor:
        """The whole, [experts, ...], of decoded values; shapes: of padded tensors, without the padding."""
        stack = copy.deepcopy(self.stack)
        for tensor, role in zip(self.tensors, self.roles, strict=True):
            value = overlay.load(tensor)
            shape = shapes.get(split_name(tensor)[0], value.shape)
            cut = tuple(slice(0, size) for size in (shape if value.dim() == 2 else shape[:1]))
            stack.add_tensor(self.name, tensor, role, value[cut].to(dtype))
        whole: Tensor = stack.convert(self.name)[self.name]
        return whole if self.turned is None else self.turned(whole)


def fused_experts(overlay: Overlay) -> tuple[list[FusedExperts], list[str]]:
    """What a decoded copy has to hold in one piece for transformers to load it; and what is to be said.

    Experts that transformers' mapping takes one by one stay so; so do those of a model that it does not know, which is
    said. Raises MissingWeight where some experts of a layer are missing.
    """
    if isinstance(overlay.base, GgufCheckpoint) or not any(
        stored.is_quantized and _EXPERT.search(f"{name}.weight") for name, stored in overlay.modules.items()
    ):
        return [], []
    import torch

    from recompile.model.fused_experts import ExpertStack, is_flat
    from recompile.model.skeleton import build_skeleton, find_origins

    try:
        place = config_place(overlay.label)
        model = build_skeleton(overlay.config, torch.float32, torch.device("cpu"), place)
    except (UnsupportedError, CheckpointError) as error:
        return [], [f"experts are written one by one, as the variants hold them: {error}"]
    origins, left = find_origins(model, overlay)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    names = _StoredNames(model, shapes)
    found = []
    for parameter, origin in origins.items():
        if not isinstance(origin.converter, ExpertStack):
            continue
        counts = Counter(origin.patterns)
        if set(counts) != set(origin.converter.roles) or set(counts.values()) != {shapes[parameter][0]}:
            held = ", ".join(f"{count} of {role}" for role, count in counts.items())
            raise MissingWeight(
                f"{overlay.label}: {parameter} is made of {shapes[parameter][0]} experts' "
                f"{' and '.join(origin.converter.roles)}, it holds {held}; download or make the variant again"
            )
        name, turned = names.of(parameter, origin.tensors[0])
        if is_flat(parameter):
            turned = _rows_below
        shape = shapes[parameter]
        if turned is not None:
            shape = tuple(turned(torch.empty(shape, device="meta")).shape)
        stack = copy.deepcopy(origin.converter)
        found.append(FusedExperts(name, shape, origin.tensors, origin.patterns, stack, turned))
    beyond = [tensor for tensor, _ in left if _EXPERT.search(tensor)] if found else []
    notes = [f"{len(beyond)} tensors of experts outside of the model's layers (first: {beyond[0]}) are written one by "
             f"one"] if beyond else []  # fmt: skip
    return found, notes


def _rows_below(stack: Tensor) -> Tensor:
    """[experts, rows, columns] -> [experts x rows, columns]."""
    return stack.flatten(0, 1)


class _StoredNames:
    """Under which name a checkpoint of a model stores a parameter, and in which form."""

    def __init__(self, model: Any, state: dict[str, Any]) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        transforms = get_model_conversion_mapping(model)
        self._renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
        current = get_model_conversion_mapping(model, add_legacy=False)
        renamings = [entry for entry in current if isinstance(entry, WeightRenaming)]
        reverted = (entry.reverse_transform() for entry in reversed(renamings))
        self._back = [entry for entry in reverted if isinstance(entry, WeightRenaming)]
        self._model, self._state = model, state

    def of(self, parameter: str, beside: str) -> tuple[str, Callable[[Tensor], Tensor] | None]:
        """The name, and what makes the stored tensor of the parameter where transformers turns it when it loads.

        beside: a tensor of one expert as it is stored, whose prefix the name gets. Raises UnsupportedError where
        transformers reads the parameter under no name that is known here.
        """
        from transformers.core_model_loading import apply_renamings, rename_source_key

        released = apply_renamings(parameter, self._back)
        tails = [match[3] for name in (released, parameter) if (match := _LAYER.fullmatch(name))]
        stored = _LAYER.fullmatch(beside)
        prefixed = [f"{stored[1]}{stored[2]}.{tail}" for tail in tails] if stored else []
        for name in (*prefixed, released, parameter):
            made, pattern = rename_source_key(
                name, self._renamings, self._converters, self._model.base_model_prefix, self._state
            )
            if made == parameter and pattern is None:
                return name, None
            turning = next((entry for entry in self._converters if entry.source_patterns == [pattern]), None)
            if made == parameter and turning is not None and len(turning.target_patterns) == 1:
                return name, partial(self._back_through, turning, parameter)
        raise UnsupportedError(
            f"{parameter}: transformers reads these experts from one tensor, under a name that is not known here, so "
            f"that no decoded copy can be written that it loads"
        )

    def _back_through(self, converter: Any, parameter: str, value: Tensor) -> Tensor:
        """What transformers' converter makes `value` of."""
        back = converter.reverse_transform()
        back.add_tensor(parameter, parameter, back.source_patterns[0], value)
        (stored,) = back.convert(parameter, model=self._model, config=self._model.config).values()
        made: Tensor = stored[0] if isinstance(stored, list) else stored
        return made.contiguous()


def with_fused(
    ordered: Sequence[Placement], fused: Sequence[FusedExperts], placements: Mapping[str, Placement]
) -> list[Placement]:
    """The placements with those of single experts replaced by one a fused tensor."""
    members: dict[str, list[Placement]] = {}
    for whole in fused:
        placed = members.setdefault(whole.module, [])
        placed += [placements[split_name(tensor)[0]] for tensor in whole.tensors]
    gone = {placement.module for placed in members.values() for placement in placed}
    return [placement for placement in ordered if placement.module not in gone] + [
        _together(module, placed) for module, placed in members.items()
    ]


def _together(module: str, members: Sequence[Placement]) -> Placement:
    """Where a module comes from that is made of several: their parts, and every source's name."""
    parts = {f"{m.module}.{part}": info for m in members for part, info in m.stored.parts.items()}
    first = next((m for m in members if m.stored.is_quantized), members[0])
    sources = list(dict.fromkeys(m.source for m in members))
    source = first.source if len(sources) == 1 else " + ".join(name or "the base" for name in sources)
    return Placement(module, StoredModule(module, parts, None, first.stored.format), first.checkpoint, source, None)
