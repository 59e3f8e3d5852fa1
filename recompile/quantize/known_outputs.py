"""Outputs of a layer's maps that are final, so that a layer that is run again, up to another stage, need not make them
again.

A map's output is final once its weight is, and those of all maps called before it; what attention takes together is
final once all maps before it are. The rest (norms, activations) is computed anew; these are most of the work.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

_EXPERT = re.compile(r"\.experts\.\d+\.")


@dataclass
class Room:
    """Bytes that may be held, by all who share it."""

    left: int

    def take(self, count: int) -> bool:
        """Whether they are there; they are taken then."""
        if count > self.left:
            return False
        self.left -= count
        return True


@dataclass
class KnownOutputs:
    """Of one layer of one model, over batches that are run again and again.

    room: what is kept beyond it is computed anew
    """

    room: Room
    _order: Mapping[str, int] = field(default_factory=dict)  # kind -> stage
    _final: int = 0  # stages before this one are final
    _weights: dict[str, Tensor] = field(default_factory=dict)  # those that took the base's place, by name
    _kept: dict[tuple[int, tuple[str, ...], int], _Output] = field(default_factory=dict)
    _spare: dict[tuple[torch.Size, torch.dtype], list[Tensor]] = field(default_factory=dict)  # memory to use again
    _batch: int = 0
    _stage: int = 0  # of the maps that were called in this run of the batch, the last one
    _calls: Counter[tuple[str, ...]] = field(default_factory=Counter)

    def enter(self, order: Mapping[str, int]) -> None:
        """Another layer; nothing of it is final yet. order: the stage of every kind of modules, as the layer calls
        them."""
        self.room.left += sum(tensor.nbytes for spare in self._spare.values() for tensor in spare)
        self._spare = {}
        self._drop(0)
        self._order, self._final, self._weights = order, 0, {}

    def settle(self, final: int, weights: Mapping[str, Tensor] | None = None) -> None:
        """Stages before `final` are final from now on. weights: [out, in] by name, those that took the base's place.

        Where one is another than it was, outputs of its stage and of those behind it are forgotten: there are none
        where stages are rounded one after another."""
        now = dict(weights or {})
        names = now.keys() | self._weights.keys()
        changed = {name for name in names if now.get(name) is not self._weights.get(name)}
        if changed:
            self._drop(min(self._order.get(kind_of(name.rpartition(".")[0]), 0) for name in changed))
        self._weights, self._final = now, final

    def begin(self, batch: int) -> None:
        """Before a batch is run, which is known by its number."""
        self._batch, self._stage = batch, 0
        self._calls.clear()

    def of(self, modules: tuple[str, ...], x: Tensor, make: Callable[[], Tensor]) -> Tensor:
        """The output [..., out] of a call of the map that holds these modules on x [..., in], made where it is not
        known."""
        self.pass_over(modules)
        return self._known(modules, self._stage_of(modules), x, make)

    def of_all(self, name: str, x: Tensor, make: Callable[[], Tensor]) -> Tensor:
        """What a function called `name` makes, [..., out], of x [..., in] and others, outputs of any maps that were
        called before it."""
        return self._known((name,), self._stage, x, make)

    def pass_over(self, modules: tuple[str, ...]) -> None:
        """The map that holds these modules is called, whatever it gives."""
        self._stage = max(self._stage, self._stage_of(modules))

    def _stage_of(self, modules: tuple[str, ...]) -> int:
        return max(self._order.get(kind_of(module), self._final) for module in modules)

    def _known(self, names: tuple[str, ...], stage: int, x: Tensor, make: Callable[[], Tensor]) -> Tensor:
        key = (self._batch, names, self._calls[names])
        self._calls[names] += 1
        known = self._kept.get(key)
        if known is not None and known.value.shape[:-1] == x.shape[:-1]:  # else a device sent an expert other tokens
            return known.value.clone()  # models write into outputs
        made = make()
        if known is None and stage < self._final:
            self._keep(key, stage, made)
        return made

    def _keep(self, key: tuple[int, tuple[str, ...], int], stage: int, made: Tensor) -> None:
        spare = self._spare.get((made.shape, made.dtype))
        if spare:
            self._kept[key] = _Output(stage, spare.pop().copy_(made))
        elif self.room.take(made.nbytes):
            self._kept[key] = _Output(stage, made.clone())

    def _drop(self, stage: int) -> None:
        """Outputs of this stage and of those behind it."""
        for key in [key for key, known in self._kept.items() if known.stage >= stage]:
            old = self._kept.pop(key).value
            self._spare.setdefault((old.shape, old.dtype), []).append(old)


@dataclass(frozen=True)
class _Output:
    stage: int
    value: Tensor


def kind_of(module: str) -> str:
    """A module's name without the number of its expert: what a layer calls one after another is of a kind."""
    return _EXPERT.sub(".experts.*.", module)
