"""Decoded weights that stay in memory, as far as there is room: a search asks for the same ones again and again.

A source that is held is read and decoded once, or made once where its candidates are made on the fly; what there is no
room for is decoded each time, as without. Values are shared by all who ask: nobody may write into them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from recompile.checkpoint.checkpoint import StoredModule, WeightSource
from recompile.gguf.names import Heads, Joined
from recompile.io.memory import available_bytes
from recompile.merge.overlay import Overlay

if TYPE_CHECKING:
    import torch
    from torch import Tensor

HELD_SHARE = 2  # at most one part in so many of the memory that is free is used


def room_for_weights(device: str) -> int:
    """Bytes that a store may hold where no cap says less."""
    return available_bytes(device) // HELD_SHARE


@dataclass
class WeightStore:
    """Values by source and tensor, as the source gives them, while they fit into `limit_bytes`."""

    limit_bytes: int
    held_bytes: int = 0
    _values: dict[tuple[int, str, str], Tensor] = field(default_factory=dict, repr=False)
    _sources: dict[int, WeightSource] = field(default_factory=dict, repr=False)  # kept alive: values go by identity

    def load(self, source: WeightSource, tensor: str, device: str | torch.device) -> Tensor:
        key = (id(source), tensor, str(device))
        value = self._values.get(key)
        if value is None:
            value = source.load(tensor, device=device)
            if self.held_bytes + value.nbytes <= self.limit_bytes:
                self.held_bytes += value.nbytes
                self._values[key] = value
                self._sources[id(source)] = source
        return value

    def over(self, source: WeightSource) -> HeldWeights:
        return HeldWeights(source, self)

    def clear(self) -> None:
        """Let go of all values."""
        self._values.clear()
        self._sources.clear()
        self.held_bytes = 0


def have_shared_sources(mixes: Sequence[WeightSource]) -> bool:
    """Whether any checkpoint is a source of two of the mixes, so that a store would be asked for its weights twice."""
    different = {id(mix): mix for mix in mixes if isinstance(mix, Overlay)}.values()
    owners = [{id(one) for one in (mix.base, *mix.sources.values())} for mix in different]
    return sum(map(len, owners)) > len(set().union(*owners))


@dataclass(frozen=True)
class HeldWeights:
    """A weight source whose values come through a store; those of a mix by the checkpoints that they are from, so that
    mixes share them."""

    source: WeightSource
    store: WeightStore

    @property
    def label(self) -> str:
        return str(getattr(self.source, "label", "the checkpoint"))

    @property
    def config(self) -> Mapping[str, Any]:
        return self.source.config

    @property
    def modules(self) -> Mapping[str, StoredModule]:
        return self.source.modules

    @property
    def joined(self) -> Mapping[str, Joined]:
        """The tensors that the source keeps in parts."""
        return getattr(self.source, "joined", {})

    @property
    def heads(self) -> Heads | None:
        return getattr(self.source, "heads", None)

    def has(self, tensor: str) -> bool:
        return self.source.has(tensor)

    def load(self, tensor: str, *, device: str | torch.device = "cpu") -> Tensor:
        if tensor in self.joined:  # of parts from several checkpoints, maybe
            return self.source.load(tensor, device=device)
        owner = self.source.source_of(tensor) if isinstance(self.source, Overlay) else self.source
        return self.store.load(owner, tensor, device)
