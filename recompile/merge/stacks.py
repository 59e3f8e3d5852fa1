"""Tensors of the experts of a layer, or of its heads, that an engine loads as one [experts, ...] tensor: how an output
lays them out.

Experts are copied one by one, like everything else. Only the order in the file and the header know of the stack: its
experts lie one after another, and the header names the whole. No torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from recompile.errors import UnsupportedError


class Placed(Protocol):
    """A tensor that an output is to hold."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True, slots=True)
class StackPlace:
    """Where a tensor lies: stack is the tensor's name in the file, index its expert, count how many there are."""

    stack: str
    index: int
    count: int

    @property
    def container(self) -> str:
        """The block that all stacks of a layer are in, which stays in one file."""
        return self.stack.rpartition(".")[0].rpartition(".")[0]


def plan_stacks(tensors: Iterable[Placed], stack_of: Callable[[str], tuple[str, int] | None]) -> dict[str, StackPlace]:
    """Tensor name -> its place, for tensors that `stack_of` gives (stack, expert).

    Raises UnsupportedError where the experts of a stack are not all there or not all stored alike."""
    found: dict[str, dict[int, Placed]] = {}
    for tensor in tensors:
        place = stack_of(tensor.name)
        if place is not None:
            found.setdefault(place[0], {})[place[1]] = tensor
    places: dict[str, StackPlace] = {}
    counts: dict[str, int] = {}
    for stack, members in found.items():
        container = StackPlace(stack, 0, 0).container
        counts[container] = max(counts.get(container, 0), max(members) + 1)
    for stack, members in found.items():
        count = counts[StackPlace(stack, 0, 0).container]
        first = members.get(0)
        for index in range(count):
            own = members.get(index)
            if first is None or own is None or (own.dtype, own.shape) != (first.dtype, first.shape):
                kind = "not stored so" if own is None else f"{own.dtype} {list(own.shape)}"
                zero = "not stored so" if first is None else f"{first.dtype} {list(first.shape)}"
                what = "head" if ".self_attn." in stack else "expert"
                raise UnsupportedError(
                    f"{stack}: the engine loads all {count} {what}s as one tensor, and {what} {index} is {kind} where "
                    f"{what} 0 is {zero}; give all {what}s of the layer one source"
                )
            places[own.name] = StackPlace(stack, index, count)
    return places


@dataclass(frozen=True)
class FileNames:
    """Under which name and in which shape the header of an output has a tensor. stacks: of `plan_stacks`; rename,
    reshape: what the format's engine does to names and to shapes of tensors, bytes untouched"""

    stacks: Mapping[str, StackPlace]
    rename: Callable[[str], str] = str
    reshape: Callable[[str, tuple[int, ...]], tuple[int, ...]] = lambda tensor, shape: shape

    def name(self, tensor: str) -> str:
        """Of the tensor, or of the stack that it lies in."""
        return self.rename(self.stacks[tensor].stack if tensor in self.stacks else tensor)
