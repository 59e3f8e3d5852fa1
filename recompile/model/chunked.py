"""Rows that run through a layer some tokens at a time: what a layer makes of a long row may not fit in memory.

Each chunk is called as transformers' generation calls a layer that goes on from a cache: with positions and masks that
the model's own forward makes over a cache as long as what came before, and with a cache of this layer's keys and
values. So a layer holds the keys and values of one row and the mask of a chunk, where a whole row makes every
intermediate of all tokens and, for layers with a window, a mask of their square.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from recompile.errors import UnsupportedError
from recompile.model.own_forward import (
    OF_MODELS,
    Path,
    Reached,
    Structure,
    at,
    is_cache,
    patched,
    rebuild,
    zeros_outside,
)
from recompile.model.skeleton import one_line
from recompile.model.states import Layout, stand_ins

TRIED_TOKENS = 32  # of a layer's trial: in one piece, and in two
# of a trial's tokens: the largest relative error that two ways to one state may have, and how many may have a larger
# one: experts of a token that are chosen by a hair, in 16-bit arithmetic
AGREES, STRAYS = 1e-3, 0
AGREES_16_BIT, STRAYS_16_BIT = 0.05, 3
GROWING_ROTARY = ("dynamic", "longrope")  # tables of these depend on a row's length, which its first chunk cannot know
CHOOSING = ("index_topk", "keep_window_size")  # of attention to some tokens: pieces part ties otherwise than whole rows


@dataclass(frozen=True)
class Pieces:
    """How long rows run: so many tokens at a time.

    needed: what does not run in pieces is an error; else it runs on whole rows
    """

    tokens: int
    needed: bool = False


@dataclass
class ChunkedLayout:
    """As `Layout`, of rows of `tokens` tokens that run in pieces, one row after another.

    trial: of rows of TRIED_TOKENS
    record_whole: makes the layout of whole rows of ids [1, tokens], with the weights that are read before the layers
    """

    model: Any
    runner: Any
    layers: Sequence[nn.Module]  # all of the model's
    stack_name: str
    device: torch.device
    trial: Layout
    tokens: int
    pieces: Pieces
    record_whole: Callable[[Tensor], Layout]
    _as_whole: set[int] = field(default_factory=set)  # layers that do not go on from a cache
    _whole: Layout | None = None

    @property
    def structure(self) -> Structure:
        return self.trial.structure

    @property
    def hidden_width(self) -> int:
        return self.trial.hidden_width

    @property
    def width(self) -> int:
        return self.trial.width

    @property
    def is_plain(self) -> bool:
        return True

    def hidden_of(self, state: Tensor) -> Tensor:
        """A state [rows, tokens, width] is no more than the hidden state."""
        return state

    def first(self, runner: Any, layers: Sequence[nn.Module], ids: Tensor) -> Tensor:
        """As of `Layout`: [rows, tokens, width] of ids [rows, tokens]."""
        return self._first(ids, self.pieces.tokens)

    def _first(self, ids: Tensor, tokens: int) -> Tensor:
        state = torch.empty(*ids.shape, self.width, dtype=self.trial.dtype, device=ids.device)
        for into, row in zip(state[:, None], ids[:, None], strict=True):
            past = _Past(self.model, len(self.layers))
            for piece, part in zip(into.split(tokens, 1), row.split(tokens, 1), strict=True):
                piece.copy_(at(self._call(0, part, past), self.structure.ports[0].hidden))
        return state

    def why_not(self, ids: Tensor) -> str:
        """What keeps the model from going on from a cache before its layers, tried on ids [1, tokens]; "" where nothing
        does. What is read before the layers must be loaded, the rest there."""
        if not self.trial.is_plain or self.structure.extras or self.structure.norm is None:
            return "its layers hand on more than the hidden state"
        text = self.model.config.get_text_config()
        if any(getattr(text, name, None) for name in CHOOSING):
            return "which tokens its attention looks at is a choice among all"
        rotary = getattr(text, "rope_parameters", None) or {}
        kinds = {str(each.get("rope_type")) for each in (rotary, *rotary.values()) if isinstance(each, dict)}
        if not kinds.isdisjoint(GROWING_ROTARY):
            return "its positions depend on the length of the row"
        try:
            whole = self.trial.first(self.runner, self.layers, ids[:, :TRIED_TOKENS])
            pieces = self._first(ids[:, :TRIED_TOKENS], TRIED_TOKENS // 2)
        except OF_MODELS as error:
            return f"{type(error).__name__}: {one_line(error)}"
        return "" if self._agree(pieces, whole) else "its embedding counts positions anew in every piece"

    def try_layer(self, index: int, layer: nn.Module) -> None:
        """See whether a loaded layer goes on from a cache: rows of noise, in one piece and in two.

        Raises UnsupportedError where it does not and chunks are needed."""
        if index in self._as_whole or index not in self.structure.ran:
            return
        noise = torch.randn(1, TRIED_TOKENS, self.width, generator=torch.Generator().manual_seed(index))
        noise = noise.to(device=self.device, dtype=self.trial.dtype)
        wrong = ""
        try:
            whole, pieces = self.trial.run(index, layer, noise), noise.clone()
            with zeros_outside(self.model, self.stack_name, self.device):
                self._run_row(index, layer, pieces, TRIED_TOKENS // 2)
            if not self._agree(pieces, whole):
                wrong = "a row in two pieces gives other states than in one"
        except OF_MODELS as error:
            wrong = f"{type(error).__name__}: {one_line(error)}"
        if wrong and self.pieces.needed:
            place = f"{self.stack_name}.{index} of {type(self.model).__name__}"
            raise not_in_pieces(place, self.tokens, wrong)
        if wrong:
            self._as_whole.add(index)

    def _agree(self, pieces: Tensor, whole: Tensor) -> bool:
        """[1, tokens, width] each; of what is no number the run itself complains."""
        wide = self.trial.dtype.itemsize > 2
        limit, strays = (AGREES, STRAYS) if wide else (AGREES_16_BIT, STRAYS_16_BIT)
        error = (pieces.float() - whole.float()).norm(dim=-1)
        return int((error > limit * whole.float().norm(dim=-1)).sum()) <= strays

    def run(self, index: int, layer: nn.Module, state: Tensor) -> Tensor:
        """One loaded layer on a state [rows, tokens, width]; what leaves it is written into the state."""
        if index not in self.structure.ran:
            return state
        if index in self._as_whole:
            return self._whole_rows().run(index, layer, state)
        with zeros_outside(self.model, self.stack_name, self.device):
            for row in state[:, None]:
                self._run_row(index, layer, row, self.pieces.tokens)
        return state

    def _run_row(self, index: int, layer: nn.Module, row: Tensor, tokens: int) -> None:
        """row [1, tokens, width], which is written to. Weights outside the layers must be there, or zeros for them."""
        place = self.structure.ran.index(index)
        port = self.structure.ports[place]
        past, own = _Past(self.model, len(self.layers)), _new_cache(self.model)
        for piece in row.split(tokens, 1):
            ids = torch.zeros(piece.shape[:2], dtype=torch.int64, device=self.device)

            def leaf(path: Path, value: Any, piece: Tensor = piece) -> Any:
                if path == port.hidden:
                    return piece.clone()
                return own if is_cache(value) else value

            args, kwargs = rebuild(self._call(place, ids, past), leaf)
            result = layer(*args, **kwargs)
            piece.copy_(at((result, args, kwargs), port.out))

    def _call(self, place: int, ids: Tensor, past: _Past) -> tuple[Any, Any]:
        """(args, kwargs) of the layer at this place among those that run, for ids [1, tokens] behind `past`, which
        grows by them."""
        found: list[tuple[Any, Any]] = []

        def seen(number: int, args: Any, kwargs: Any) -> None:
            if number == place:
                found.append((args, kwargs))
                raise Reached

        with patched(self.trial.running(self.layers), stand_ins(self.structure.ports, seen)):
            try:
                self.runner(input_ids=ids, use_cache=True, **{_cache_argument(type(self.runner).forward): past.cache})
            except Reached:
                past.grow(ids)
        return found[0]

    def _whole_rows(self) -> Layout:
        """Of whole rows, for layers that take no others."""
        if self._whole is None:
            self._whole = self.record_whole(torch.zeros(1, self.tokens, dtype=torch.int64, device=self.device))
        return self._whole


class _Past:
    """A cache that is as long as the tokens before a chunk and has next to nothing of them."""

    def __init__(self, model: Any, layers: int) -> None:
        self.cache, self._layers = _new_cache(model), layers

    def grow(self, ids: Tensor) -> None:
        from transformers.cache_utils import DynamicLayer

        nothing = torch.zeros(1, 1, ids.shape[1], 1, device=ids.device)
        for number in range(len(self.cache.layers) or self._layers):
            if number >= len(self.cache.layers) or isinstance(self.cache.layers[number], DynamicLayer):
                self.cache.update(nothing, nothing, number)


@cache
def _cache_argument(forward: Callable[..., Any]) -> str:
    """What a model calls the cache that it is given: `past_key_values` before transformers 5.24."""
    return "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"


def _new_cache(model: Any) -> Any:
    from transformers.cache_utils import DynamicCache

    return DynamicCache(config=model.config)


def not_in_pieces(what: str, tokens: int, why_not: str) -> UnsupportedError:
    """Rows that do not fit as a whole, of what takes no others."""
    return UnsupportedError(
        f"{{max_memory}}: rows of {tokens} tokens would have to run in pieces through {what}, which they cannot "
        f"({why_not}); give more memory or shorter rows"
    )
