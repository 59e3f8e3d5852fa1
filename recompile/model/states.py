"""The state that flows from layer to layer, as one tensor a batch, and the calls that it is fed into."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from recompile.errors import UnsupportedError
from recompile.model.own_forward import (
    PROBE_TOKENS,
    Follow,
    LayerPort,
    Path,
    Reached,
    Structure,
    Was,
    at,
    identity,
    is_cache,
    patched,
    rebuild,
    run_own,
    zero_weights,
    zeros_outside,
)

DIGIT_BITS = {torch.float32: 16, torch.float64: 16}  # of whole numbers, per value; 8 in narrower types


@dataclass(frozen=True)
class _Shape:
    """Which axis of a tensor counts rows: `per_row` entries of it for each. rest: the other axes, in order."""

    axis: int
    per_row: int
    rest: tuple[int, ...]

    @staticmethod
    def of(one: Tensor, two: Tensor) -> _Shape | None:
        """From the same tensor of a call with one row and of one with two; None where the rows share it."""
        if one.dim() != two.dim():
            return None
        grown = [axis for axis in range(one.dim()) if one.shape[axis] != two.shape[axis]]
        if len(grown) != 1 or two.shape[grown[0]] != 2 * one.shape[grown[0]]:
            return None
        axis = grown[0]
        return _Shape(axis, one.shape[axis], tuple(one.shape[:axis] + one.shape[axis + 1 :]))

    def by_row(self, value: Tensor) -> Tensor:
        """[rows, ...]"""
        rows = value.shape[self.axis] // self.per_row
        return value.unflatten(self.axis, (rows, self.per_row)).movedim(self.axis, 0)

    def together(self, value: Tensor) -> Tensor:
        """The opposite."""
        return value.movedim(0, self.axis).flatten(self.axis, self.axis + 1)

    @property
    def row(self) -> tuple[int, ...]:
        """What by_row gives of one row."""
        return (*self.rest[: self.axis], self.per_row, *self.rest[self.axis :])


@dataclass(frozen=True)
class _Fixed:
    """An argument that no row differs in; as a call of one row has it."""

    value: Any
    shape: _Shape | None = None

    def of(self, rows: int) -> Any:
        if self.shape is None or rows == 1:
            return self.value
        found = self.shape.by_row(self.value)
        return self.shape.together(found.expand(rows, *found.shape[1:]))


@dataclass(frozen=True)
class _Extra:
    """A tensor that travels behind the hidden state.

    from_layer: the layer before which the model makes it, and where in the call it is; None if layers give it
    """

    shape: _Shape
    dtype: torch.dtype
    columns: slice
    pieces: int  # values of the state for one of it
    made_at: tuple[int, Path] | None


@dataclass(frozen=True)
class _Slot:
    """The place of an extra, or of the hidden state (None), in a call."""

    extra: int | None


@dataclass
class Layout:
    """The calls of rows of one length, and where in a state the tensors are that differ from row to row."""

    structure: Structure
    dtype: torch.dtype
    tokens: int
    hidden: _Shape
    token_axis: int  # of the hidden state by row
    hidden_dtype: torch.dtype
    calls: list[Any]  # per layer (args, kwargs) with _Fixed and _Slot leaves
    extras: list[_Extra]
    _ready: dict[tuple[int, int], Any] = field(default_factory=dict)  # calls by layer and rows

    @cached_property
    def _places(self) -> dict[int, int]:
        """Of every layer that runs, its number among them."""
        return {layer: place for place, layer in enumerate(self.structure.ran)}

    @property
    def hidden_width(self) -> int:
        return math.prod(self.hidden.row) // self.tokens

    @property
    def width(self) -> int:
        return self.extras[-1].columns.stop if self.extras else self.hidden_width

    @property
    def is_plain(self) -> bool:
        """Whether a state is the hidden state as the layers have it."""
        shape = self.hidden
        return not self.extras and (shape.axis, shape.per_row, self.token_axis, len(shape.row)) == (0, 1, 1, 3)

    # ---- packing ---------------------------------------------------------------------------------------------------

    def hidden_of(self, state: Tensor) -> Tensor:
        """The hidden state in the shape that layers take; state [rows, tokens, width] of any number of tokens."""
        if self.is_plain:
            return state
        rest = [size for axis, size in enumerate(self.hidden.row) if axis != self.token_axis]
        value = state[..., : self.hidden_width].unflatten(-1, rest)  # [rows, tokens, rest]
        return self.hidden.together(value.movedim(1, 1 + self.token_axis)).to(self.hidden_dtype)

    def pack(self, hidden: Tensor, extras: Mapping[int, Tensor], before: Tensor | None) -> Tensor:
        """A state [rows, tokens, width] of the hidden state and some extras, as layers have them; the others are taken
        from the state before, [rows, tokens, width]; None: they are zeros."""
        if self.is_plain:
            return hidden
        by_row = self.hidden.by_row(hidden)
        flat = by_row.movedim(1 + self.token_axis, 1).flatten(2).to(self.dtype)
        parts = [flat]
        for number, extra in enumerate(self.extras):
            if number in extras:
                parts.append(self._columns(extra, extras[number]))
            elif before is not None:
                parts.append(before[..., extra.columns])
            else:
                parts.append(flat.new_zeros(*flat.shape[:2], extra.columns.stop - extra.columns.start))
        return torch.cat(parts, -1)

    def _columns(self, extra: _Extra, value: Tensor) -> Tensor:
        flat = extra.shape.by_row(value).flatten(1)
        pieces = split_values(flat, extra.pieces, self.dtype)  # [rows, pieces, values]
        padded = (extra.columns.stop - extra.columns.start) // extra.pieces * self.tokens
        pieces = nn.functional.pad(pieces, (0, padded - pieces.shape[-1]))
        return pieces.unflatten(-1, (self.tokens, -1)).transpose(1, 2).flatten(2)

    def _extra(self, extra: _Extra, state: Tensor) -> Tensor:
        pieces = state[..., extra.columns].unflatten(-1, (extra.pieces, -1)).transpose(1, 2).flatten(2)
        flat = join_values(pieces[..., : math.prod(extra.shape.row)], extra.dtype, self.dtype)
        return extra.shape.together(flat.unflatten(-1, extra.shape.row))

    # ---- running ---------------------------------------------------------------------------------------------------

    def run(self, index: int, layer: nn.Module, state: Tensor) -> Tensor:
        """One loaded layer on a state, [rows, tokens, width]; so is what leaves it."""
        if index not in self._places:
            return state
        index = self._places[index]
        rows, port = len(state), self.structure.ports[index]
        ready = self._ready.get((index, rows))
        if ready is None:
            ready = rebuild(self.calls[index], lambda _, leaf: leaf.of(rows) if isinstance(leaf, _Fixed) else leaf)
            self._ready[index, rows] = ready
        hidden = self.hidden_of(state)

        def fill(_: Path, leaf: Any) -> Any:
            if not isinstance(leaf, _Slot):
                return leaf
            return hidden if leaf.extra is None else self._extra(self.extras[leaf.extra], state)

        args, kwargs = rebuild(ready, fill)
        result = layer(*args, **kwargs)
        after = (result, args, kwargs)
        out = at(after, port.out)
        if self.is_plain:
            return out
        return self.pack(out, {number: at(after, path) for number, path in port.gives.items()}, state)

    def first(self, runner: Any, layers: Sequence[nn.Module], ids: Tensor) -> Tensor:
        """The state of rows [rows, tokens] that enters the first layer. What is read before it must be loaded."""
        wanted: dict[int, list[tuple[int, Path]]] = {0: []}
        for number, extra in enumerate(self.extras):
            if extra.made_at is not None:
                wanted.setdefault(extra.made_at[0], []).append((number, extra.made_at[1]))
        found: dict[int, Tensor] = {}
        hidden: list[Tensor] = []

        def seen(index: int, args: Any, kwargs: Any) -> None:
            if index == 0:
                hidden.append(at((args, kwargs), self.structure.ports[0].hidden))
            for number, path in wanted.get(index, ()):
                found[number] = at((args, kwargs), path)
            if index == max(wanted):
                raise Reached

        run_until_reached(runner, self.running(layers), self.stand_ins(seen), ids)
        return self.pack(hidden[0], found, None)

    def running(self, layers: Sequence[nn.Module]) -> list[nn.Module]:
        """Those of the layers that run on text."""
        return [layers[number] for number in self.structure.ran]

    def stand_ins(self, seen: Callable[[int, Any, Any], None], last: Tensor | None = None) -> list[Callable[..., Any]]:
        """As `stand_ins`, for all layers that run."""
        return stand_ins(self.structure.ports, seen, last)


def stand_ins(
    ports: Sequence[LayerPort],
    seen: Callable[[int, Any, Any], None],
    last: Tensor | None = None,
    made: Callable[[Tensor], None] = lambda value: None,
) -> list[Callable[..., Any]]:
    """Functions in place of the layers: each shows `seen` its number and arguments and returns zeros where the layer
    returns tensors, the last one `last` for the hidden state, of its shape. made: is given those, of any shape."""

    def stand_in(index: int, port: LayerPort) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            seen(index, args, kwargs)
            hidden = at((args, kwargs), port.hidden)

            def leaf(path: Path, value: Any) -> Any:
                if (0, *path) == port.out:
                    tensor = last if last is not None and index == len(ports) - 1 else torch.zeros_like(hidden)
                elif isinstance(value, Was):
                    tensor = torch.zeros(value.shape, dtype=value.dtype, device=hidden.device)
                else:
                    return value
                made(tensor)
                return tensor

            return rebuild(port.result, leaf)

        return forward

    return [stand_in(index, port) for index, port in enumerate(ports)]


def run_until_reached(
    runner: Any, layers: Sequence[nn.Module], forwards: list[Callable[..., Any]], ids: Tensor
) -> None:
    """Run a model on ids [rows, tokens] with its layers' forwards replaced, until one of these raises Reached."""
    with patched(layers, forwards):
        try:
            run_own(runner, ids)
        except Reached:
            return


# ---- whole numbers and wide floats in a state ------------------------------------------------------------------------


def pieces_of(dtype: torch.dtype, state: torch.dtype) -> int:
    """Values of a state in one dtype that hold a value of another exactly."""
    if dtype.is_floating_point:
        return 1 if dtype.itemsize <= state.itemsize else 3
    return 1 if dtype == torch.bool else 32 // DIGIT_BITS.get(state, 8)


def split_values(value: Tensor, pieces: int, dtype: torch.dtype) -> Tensor:
    """[rows, values] -> [rows, pieces, values] in `dtype`, which adds up to the same."""
    if pieces == 1:
        return value.to(dtype)[:, None]
    parts = []
    for number in range(pieces):
        if value.is_floating_point():
            part = value.to(dtype)
            value = value - part.to(value.dtype)
        else:
            bits = DIGIT_BITS.get(dtype, 8)
            part = (value % (1 << bits) if number < pieces - 1 else value).to(dtype)
            value = value // (1 << bits)
        parts.append(part)
    return torch.stack(parts, 1)


def join_values(pieces: Tensor, dtype: torch.dtype, state: torch.dtype) -> Tensor:
    """The opposite; [rows, pieces, values] -> [rows, values] in `dtype`."""
    if pieces.shape[1] == 1 or dtype.is_floating_point:
        return pieces.to(dtype).sum(1) if pieces.shape[1] > 1 else pieces[:, 0].to(dtype)
    whole = pieces.to(torch.int64)
    bits = DIGIT_BITS.get(state, 8)
    return sum(whole[:, number] << (bits * number) for number in range(pieces.shape[1])).to(dtype)  # type: ignore[union-attr]


# ---- recording -------------------------------------------------------------------------------------------------------


@dataclass
class _Extras:
    """What layers share beside the hidden state, one behind the other in a state. width: columns so far."""

    what: str  # the class, for messages
    tokens: int
    dtype: torch.dtype
    width: int
    found: list[_Extra] = field(default_factory=list)

    def add(self, shape: _Shape | None, value: Tensor, made_at: tuple[int, Path] | None) -> int:
        """Take one on; returns its number. Raises UnsupportedError for what no row has a part of."""
        if shape is None:
            raise UnsupportedError(
                f"{self.what}: layers share {list(value.shape)} without an axis of rows; not supported"
            )
        pieces = pieces_of(value.dtype, self.dtype)
        columns = -(-math.prod(shape.row) // self.tokens) * pieces
        self.found.append(_Extra(shape, value.dtype, slice(self.width, self.width + columns), pieces, made_at))
        self.width += columns
        return len(self.found) - 1


@torch.no_grad()
def record_layout(
    structure: Structure,
    model: nn.Module,
    runner: Any,
    layers: Sequence[nn.Module],
    stack_name: str,
    ids: Tensor,
    dtype: torch.dtype,
) -> Layout:
    """What the layers are called with for rows as long as ids, [1, tokens]. What is read before them must be loaded."""
    what, ports = type(model).__name__, structure.ports
    layers = [layers[number] for number in structure.ran]
    follow = Follow({})
    follow.mark(ids, "ids")
    with follow:
        one = _calls(runner, layers, ports, ids, lambda value: follow.mark(value, "layer"))
    two = _calls(runner, layers, ports, ids.expand(2, -1).contiguous(), lambda value: None)
    first = [at(calls[0], ports[0].hidden) for calls in (one, two)]
    tokens = ids.shape[1]
    hidden = _Shape.of(*first)
    if hidden is None:
        raise UnsupportedError(f"{what}: the hidden state {list(first[0].shape)} has no axis of rows; not supported")
    extras = _Extras(what, tokens, dtype, math.prod(hidden.row) // tokens)
    given: dict[int, int] = {}
    if structure.extras:
        with zeros_outside(model, stack_name, ids.device):
            shapes = [_given(structure, runner, layers, rows) for rows in (ids, ids.expand(2, -1).contiguous())]
        for number in range(structure.extras):
            given[number] = extras.add(_Shape.of(shapes[0][number], shapes[1][number]), shapes[0][number], None)
    numbers: dict[tuple[Any, ...], int] = {}
    calls = []
    for index, port in enumerate(ports):

        def leaf(path: Path, value: Any, index: int = index, port: LayerPort = port) -> Any:
            if path == port.hidden:
                return _Slot(None)
            if is_cache(value):
                return _Fixed(None)
            if not isinstance(value, Tensor):
                return _Fixed(value)
            labels = follow.of(value)
            if "layer" in labels:
                raise UnsupportedError(f"{what}: computes arguments of layer {index} between its layers; not supported")
            shape = _Shape.of(value, at(two[index], path))
            if "ids" not in labels:
                return _Fixed(value, shape)
            key = identity(value)
            if key not in numbers:
                numbers[key] = extras.add(shape, value, (index, path))
            return _Slot(numbers[key])

        reads = {path: given[number] for path, number in port.reads.items()}
        calls.append(_merge(port.inputs, one[index], reads, leaf))
    token_axis = _token_axis(structure, hidden, tokens)
    if token_axis is None:
        raise UnsupportedError(f"{what}: the hidden state {list(first[0].shape)} has no axis of tokens; not supported")
    return Layout(structure, dtype, tokens, hidden, token_axis, first[0].dtype, calls, extras.found)


def _token_axis(structure: Structure, hidden: _Shape, tokens: int) -> int | None:
    """Of the hidden state by row: the first axis that is as long as the rows, here and in the run on zeros."""
    was = list(structure.hidden_shape)
    del was[hidden.axis]
    was.insert(hidden.axis, hidden.per_row)
    if hidden.per_row == tokens:  # rows and tokens in one axis
        return hidden.axis
    found = (
        n for n, (then, now) in enumerate(zip(was, hidden.row, strict=True)) if (then, now) == (PROBE_TOKENS, tokens)
    )
    return next(found, None)


def _calls(
    runner: Any, layers: Sequence[nn.Module], ports: Sequence[LayerPort], ids: Tensor, made: Callable[[Tensor], None]
) -> list[tuple[Any, Any]]:
    """The (args, kwargs) of every layer, from a run that skips them."""
    calls: list[tuple[Any, Any]] = []

    def seen(index: int, args: Any, kwargs: Any) -> None:
        if index != len(calls):
            raise UnsupportedError(f"{type(runner).__name__} does not run its layers once each in order; not supported")
        calls.append((args, kwargs))
        if index == len(ports) - 1:
            raise Reached

    run_until_reached(runner, layers, stand_ins(ports, seen, made=made), ids)
    return calls


def _given(structure: Structure, runner: Any, layers: Sequence[nn.Module], ids: Tensor) -> dict[int, Tensor]:
    """The extras that layers make, from a run of them on weights of zero."""
    found: dict[int, Tensor] = {}

    def forward_of(layer: nn.Module, port: LayerPort) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            with zero_weights(layer, ids.device):
                result = type(layer).forward(layer, *args, **kwargs)
            for number, path in port.gives.items():
                found[number] = at((result, args, kwargs), path)
            if len(found) == structure.extras:
                raise Reached
            return result

        return forward

    forwards = [forward_of(layer, port) for layer, port in zip(layers, structure.ports, strict=True)]
    run_until_reached(runner, layers, forwards, ids)
    return found


def _merge(
    template: Any, value: Any, reads: Mapping[Path, int], leaf: Callable[[Path, Any], Any], path: Path = ()
) -> Any:
    """The tree of a call, with the extras of earlier layers, which a run without layers lacks, where they belong."""
    if path in reads:
        return _Slot(reads[path])
    if any(read[: len(path)] == path for read in reads):

        def under(step: Any) -> Any:
            try:
                return value[step]
            except (KeyError, IndexError, TypeError):
                return None

        if isinstance(template, (tuple, list)):
            return type(template)(_merge(t, under(n), reads, leaf, (*path, n)) for n, t in enumerate(template))
        fresh = {key: _merge(t, under(key), reads, leaf, (*path, key)) for key, t in template.items()}
        return fresh if type(template) is dict else type(template)(fresh)
    return rebuild(value, leaf, path)
