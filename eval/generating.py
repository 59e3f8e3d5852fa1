"""A model's weights for writing text with its key-value cache: all of them in memory, or as many layers as fit."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from eval.layer_sizes import attention_widths
from recompile.errors import UnsupportedError
from recompile.events import Note, OnEvent, ignore
from recompile.io.memory import available_bytes, format_mib, process_bytes
from recompile.model.one_block import Block
from recompile.model.stream import LayeredModel

MEMORY_SHARE = 0.8  # of what is free, for weights and cache
CACHE_COPIES = 2  # a cache that grows by a token is copied, one layer's at a time; the rest is for what a layer makes


@dataclass(frozen=True)
class WritingPlan:
    """held: layers whose weights stay in memory, None: all weights of the model; rows: that are written at a time;
    read_bytes: of weights, anew for every token of them"""

    held: int | None
    rows: int
    read_bytes: int = 0


def plan_writing(
    model: LayeredModel,
    rows: int,
    most_rows: int,
    tokens: int,
    what: str,
    way_out: str,
    cap_bytes: int | None = None,
) -> WritingPlan:
    """How a model writes rows of up to `tokens` tokens on its device and in its dtype.

    rows: at a time where all weights are in memory, and at least; most_rows: where they are not, as far as caches fit;
    what: "greedy runs are", for messages; way_out: what else can be done; cap_bytes: that the process stays below.
    Raises UnsupportedError where not even one layer's weights fit beside the rest, or where a model has to be in memory
    as a whole and is too large.
    """
    label = getattr(model.source, "label", "the reference")
    free, said = available_bytes(str(model.device)), "are free"
    below = None if cap_bytes is None else max(1, cap_bytes - process_bytes(cap_bytes))
    if below is not None and (not free or below < free):
        free, said = below, f"of {{max_memory}} {format_mib(cap_bytes or 0)} are left"
    room = int(MEMORY_SHARE * free)
    whole = _bytes_below(model, "")
    if whole <= room or not free:  # 0: nothing says what is free
        return WritingPlan(None, rows)
    if isinstance(model.structure, Block):
        raise UnsupportedError(
            f"{label}: its {what} made with all weights in memory, {format_mib(whole)}, and {format_mib(free)} {said}; "
            f"{way_out}, or use a larger machine"
        )
    layers = [_bytes_below(model, f"{model.prefix_of_layer(index)}.") for index in range(model.depth)]
    row_bytes = CACHE_COPIES * _cache_bytes(model, tokens)
    # what is around the layers, and one of them as it runs beside one as it is read: stored, decoded
    always = whole - sum(layers) + 2 * max(layers)
    left = room - always - rows * row_bytes
    if left < 0:
        raise UnsupportedError(
            f"{label}: its {what} made with weights that are read layer by layer, for which "
            f"{format_mib(room - left)} are wanted ({rows} rows of {tokens} tokens at a time), and {format_mib(room)} "
            f"can be had, for {format_mib(free)} {said}; {way_out}, or use a larger machine"
        )
    more = min(most_rows - rows, left // row_bytes)
    left -= more * row_bytes
    held = 0
    while held < model.depth and layers[held] <= left:
        left -= layers[held]
        held += 1
    return WritingPlan(held, rows + more, sum(layers[held:]))


@contextmanager
def writing(model: LayeredModel, plan: WritingPlan, on_event: OnEvent = ignore) -> Iterator[Any]:
    """The model of transformers with its weights as planned, to be called as its own; says so where it reads them for
    every token."""
    if plan.held is None:
        with model.whole_loaded() as runner:
            yield runner
        return
    on_event(
        Note(
            f"the weights do not fit in memory: {plan.held} of {model.depth} layers stay there, the other "
            f"{format_mib(plan.read_bytes)} are read anew for every token of {plan.rows} rows at a time"
        )
    )
    with model.streamed(plan.held) as runner:
        yield runner


def _cache_bytes(model: LayeredModel, tokens: int) -> int:
    """Of keys and values of one row, at most: windows and states that do not grow count as if they did."""
    _, one = attention_widths(model)
    return 2 * model.depth * one * tokens * model.dtype.itemsize


def _bytes_below(model: LayeredModel, prefix: str) -> int:
    return model.dtype.itemsize * sum(
        math.prod(shape) for name, shape in model.shapes.items() if name.startswith(prefix)
    )
