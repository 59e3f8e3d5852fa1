"""Which share of a checkpoint or a mix is not quantized, by what its modules are for. Headers only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recompile.checkpoint.checkpoint import WeightSource
from recompile.checkpoint.module_names import Role, by_name, read_roles
from recompile.merge.overlay import Overlay


def known_roles(source: WeightSource) -> Mapping[str, Role]:
    """The roles of all modules: as a variant keeps them; by name where the config tells of nothing but
    plain layers; else by transformers' model (seconds, and torch). Raises CheckpointError for a damaged file.
    """
    kept = kept_roles(source)
    if kept is not None:
        return kept
    if is_plain(source.config):
        return by_name(source.modules, {name: module.shape for name, module in source.modules.items()}, source.config)
    from recompile.model.roles import roles_of

    return roles_of(source)


def kept_roles(source: WeightSource) -> Mapping[str, Role] | None:
    """The roles of all modules that a variant keeps beside its weights, None where none does. Raises CheckpointError
    for a damaged file."""
    checkpoints = source.checkpoints if isinstance(source, Overlay) else (source,)
    for checkpoint in checkpoints:
        path = getattr(checkpoint, "path", None)
        found = read_roles(path, source.modules) if isinstance(path, Path) else None
        if found is not None:
            return found
    return None


def is_plain(config: Mapping[str, Any]) -> bool:
    """Whether a config.json tells of no experts, no kinds of layers, no MTP layers and no model within the model."""
    told = ("expert", "nextn", "mtp", "conv", "layer_types", "layers_block_type")
    if any(isinstance(value, Mapping) and "hidden_size" in value for value in config.values()):
        return False
    return not any(word in key and value not in (None, 0, []) for key, value in config.items() for word in told)


@dataclass(frozen=True)
class LeftDense:
    """Which share of a model's weights is not quantized, and as what.

    kinds: (label, weights, tensors) with the largest first; weights: of the whole model
    """

    kinds: tuple[tuple[str, int, int], ...]
    weights: int

    @property
    def share(self) -> float:
        return sum(count for _, count, _ in self.kinds) / max(1, self.weights)

    def as_dict(self) -> dict[str, Any]:
        return {
            "share": self.share,
            "kinds": [{"kind": kind, "weights": count, "tensors": tensors} for kind, count, tensors in self.kinds],
        }

    def __str__(self) -> str:
        """left dense: 41.2 % of the weights: mtp 40.1 % (46 tensors), router 1.1 % (3)"""
        listed = [
            f"{kind} {100 * count / max(1, self.weights):.1f} % ({tensors}{'' if number else ' tensors'})"
            for number, (kind, count, tensors) in enumerate(self.kinds)
        ]
        return f"left dense: {100 * self.share:.1f} % of the weights: {', '.join(listed)}"


def left_dense(source: WeightSource) -> LeftDense:
    """What a checkpoint or a mix does not store quantized, by role."""
    roles = known_roles(source)
    weights: Counter[str] = Counter()
    tensors: Counter[str] = Counter()
    for name, module in source.modules.items():
        if not module.is_quantized:
            label = roles[name].label
            weights[label] += module.numel
            tensors[label] += len(module.parts)
    total = sum(module.numel for module in source.modules.values())
    return LeftDense(tuple((label, count, tensors[label]) for label, count in weights.most_common()), total)
