"""What a comparison of two models will hold in memory, decided before it starts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from eval.layer_sizes import DECODING, LayerSizes, attention_widths, layer_config
from recompile.errors import RecompileError
from recompile.io.memory import available_bytes, format_mib, process_bytes
from recompile.model.chunked import Pieces
from recompile.model.devices import batch_rows
from recompile.model.one_block import Block
from recompile.model.scratch import scratch_tensor
from recompile.model.stream import LayeredModel

PIECE_TOKENS = 2048  # of long rows, where no cap is given
LEAST_PIECE = 128
PIECES = (4096, PIECE_TOKENS, 1024, 512, 256, LEAST_PIECE)  # that are tried under a cap
SHARE = 0.5  # of free memory: a row that makes more of a layer runs in pieces though nobody has said so
LOGIT_CHUNK_TOKENS = 256
METRICS = 6  # of a chunk's logits, so many times as float32: both models', and what figures are made of
FIGURES = 160  # bytes a token of its figures, their parts and a cat of these


@dataclass(frozen=True)
class DiffPlan:
    """Bytes, and how rows run.

    process: the interpreter and its libraries; states: of all models; not in memory when `scratch`
    working: the largest of: what is read before the layers; one layer, and what it makes of a batch or piece; the heads
    batch: rows that run together; pieces: how rows run that are longer
    """

    process: int
    states: int
    working: int
    batch: int | None
    pieces: Pieces | None
    scratch: bool = False

    @property
    def total(self) -> int:
        return self.process + (0 if self.scratch else self.states) + self.working

    def describe(self) -> str:
        where = " in a scratch file" if self.scratch else ""
        how = f", {self.pieces.tokens} tokens of a row at a time" if self.pieces is not None else ""
        return (
            f"{format_mib(self.total)} of memory at most: {format_mib(self.process)} program, "
            f"{format_mib(self.states)} of states{where}, {format_mib(self.working)} for one layer or the heads{how}"
        )


def plan_diff(
    model: LayeredModel, candidates: int, lengths: Sequence[int], batch: int | None, cap_bytes: int | None
) -> DiffPlan:
    """How rows of these lengths run through `model` and as many candidates of its shape, each with its own states.

    batch: rows that run together, where the user said so. Raises RecompileError where nothing fits below the cap.
    """
    tokens, in_pieces = max(lengths), not isinstance(model.structure, Block)
    room, free = _Working(model, candidates, tokens), available_bytes(str(model.device))
    too_long = in_pieces and 0 < SHARE * free < room.layer(1, None)  # 0: nothing says what is free
    usual = Pieces(PIECE_TOKENS) if too_long else None
    if cap_bytes is None:
        return DiffPlan(0, 0, 0, batch, usual)
    model.pieces = Pieces(LEAST_PIECE) if in_pieces else None  # the width of a state costs no whole row
    width = model.state_size(tokens)
    model.layouts.clear()
    states = (1 + candidates) * sum(lengths) * width * model.dtype.itemsize
    process = process_bytes(cap_bytes)
    most = batch or batch_rows(model.device, tokens)
    ways: list[tuple[int, Pieces | None]] = [
        (rows, None) for rows in sorted({most, max(1, most // 2), 1}, reverse=True)
    ]
    ways += [(1, Pieces(size, needed=True)) for size in PIECES if in_pieces and size < tokens]
    least: DiffPlan | None = None
    for scratch in (False, True) if model.device.type == "cpu" else (False,):  # a file is no place for a device's
        for rows, pieces in ways:
            working = max(room.around(), room.layer(rows, pieces), room.heads())
            working += rows * tokens * width * model.dtype.itemsize + sum(lengths) * candidates * FIGURES
            plan = DiffPlan(process, states, working, rows, pieces or usual, scratch)
            if plan.total <= cap_bytes:
                return plan
            least = plan if least is None or plan.total < least.total else least
    assert least is not None, "at least one plan was tried"
    raise RecompileError(
        f"{{max_memory}} {format_mib(cap_bytes)} is too little: this comparison needs {format_mib(least.total)} "
        f"({format_mib(process)} program, {format_mib(least.working)} for one layer or the heads); use shorter rows"
    )


def kept_states(states: Iterable[Tensor], tokens: int, scratch: bool) -> list[Tensor]:
    """The states of a model, a batch [rows, tokens, width] each, of so many tokens in all, in a file or as they are."""
    if not scratch:
        return list(states)
    kept: list[Tensor] = []
    file, start = None, 0
    for state in states:
        if file is None:
            file = scratch_tensor((tokens, state.shape[-1]), state.dtype)
        end = start + state.shape[0] * state.shape[1]
        kept.append(file[start:end].view(state.shape).copy_(state))
        start = end
    return kept


def put_states(states: list[Tensor], after: Iterable[Tensor], scratch: bool) -> None:
    """Put what became of every batch [rows, tokens, width] in its place, in the file where there is one."""
    for n, state in enumerate(after):
        if scratch and state is not states[n]:
            states[n] = states[n].flatten()[: state.numel()].view(state.shape).copy_(state)
        else:
            states[n] = state


class _Working:
    """Bytes that parts of a run hold beside the states."""

    def __init__(self, model: LayeredModel, candidates: int, tokens: int) -> None:
        self.model, self.candidates, self.tokens = model, candidates, tokens
        self.largest = max((LayerSizes.of(model, n) for n in range(model.depth)), key=lambda sizes: sizes.weights)
        self.queries, self.keys = attention_widths(model)
        configs = [layer_config(model, index) for index in range(model.depth)]
        kinds = {kind for config in configs for kind in getattr(config, "layer_types", None) or ()}
        self.window = max(getattr(config, "sliding_window", None) or 0 for config in configs)
        self.has_windows = bool(kinds - {"full_attention"} if kinds else self.window)
        self.all_have = self.has_windows and kinds <= {"sliding_attention"}

    def around(self) -> int:
        """What is read before the layers: as stored, decoded."""
        return 2 * self._bytes(self.model.structure.before)

    def heads(self) -> int:
        """Those of all models, another one as it is read, and the logits of a chunk."""
        head = self._bytes(self.model.structure.head)
        return (2 + self.candidates) * head + METRICS * LOGIT_CHUNK_TOKENS * self.model.vocab_size * 4

    def layer(self, rows: int, pieces: Pieces | None) -> int:
        """A layer, and what it makes of `rows` rows or of a piece of one."""
        size, sizes = self.model.dtype.itemsize, self.largest
        at_once = rows * self.tokens if pieces is None else pieces.tokens
        made = at_once * (8 * self.model.hidden_size + 2 * sizes.outputs) * size
        # keys and values, one of them copied as it grows; what heads share is written out for each of them
        each_head = 2 * self.queries if self.queries != self.keys else 0
        seen = min(self.tokens, at_once + self.window) if self.all_have else self.tokens
        context = rows * seen * (3 * self.keys + each_head) * size
        # of two kinds of layers, as true or false and as what is added to scores; a whole causal row has none
        masks = at_once * self.tokens * 8 if pieces is not None or self.has_windows else 0
        implementation = getattr(self.model.model.config, "_attn_implementation", None)
        scores = 0 if implementation == "sdpa" else 3 * sizes.attention * at_once * self.tokens * 4
        weights = sizes.weights * size + DECODING * sizes.parameter * max(size, 4)
        return weights + made + context + masks + scores

    def _bytes(self, names: Sequence[str]) -> int:
        return self.model.dtype.itemsize * sum(math.prod(self.model.shapes[name]) for name in names)
