"""Error feedback for GGUF types: the encoder's scales stay, and codes are chosen one after another, each making up for
the errors of those before it.

The grid of every block is fixed once its type's own encoder (importance included) has made the bytes, so the codes are
rounded as GPTQ does with static activation order, or two-sided (`two_sided`), and put back. The file is as any other.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from recompile.checkpoint.checkpoint import Checkpoint
from recompile.formats.gguf import dequantize_rows
from recompile.formats.gguf_codes import LAYOUTS, grid_of, put_levels
from recompile.formats.gguf_types import GgufType
from recompile.gguf.names import Place
from recompile.gguf.values import Heads, make_step, row_order, split_one
from recompile.model.finite import check_finite
from recompile.model.stream import LayeredModel
from recompile.quantize.calibrate import BATCH_TOKENS, InputCollector, run_batches
from recompile.quantize.two_sided import (
    OutputSource,
    OutputStatistics,
    RoundingGrid,
    round_two_sided,
    round_where_better,
)

ROWS = 1024  # rounded together where rows do not influence each other
TINY = 1e-30  # stands for a scale of 0, whose level does not matter


class InputHessians:
    """X^T X of the inputs of every map over calibration rows, [in, in] float32.

    Layers are asked for in rising order, the head (None) last: the model is streamed as far as that, and only the last
    layer's are held. ids: int64 [rows, tokens]; counted: bool, the places of them that are meant, None: all
    """

    def __init__(
        self,
        base: Checkpoint,
        ids: Tensor,
        *,
        device: str = "cpu",
        dtype: torch.dtype | None = None,
        counted: Tensor | None = None,
    ) -> None:
        self._base, self._ids, self._device, self._dtype, self._counted = base, ids, device, dtype, counted
        self._layers: Iterator[tuple[int | None, dict[str, Tensor]]] | None = None
        self._at: int | None = -1
        self._found: dict[str, Tensor] = {}

    def of(self, module: str, layer: int | None) -> Tensor | None:
        """None for a module that no token reached, or that no layer runs."""
        if self._layers is None:
            self._layers = self._pass()
        while self._at is not None and (layer is None or self._at < layer):
            self._at, self._found = next(self._layers, (None, {}))
        return self._found.get(module) if self._at == layer else None

    @torch.inference_mode()
    def _pass(self) -> Iterator[tuple[int | None, dict[str, Tensor]]]:
        model = LayeredModel.of(self._base, dtype=self._dtype, device=self._device)
        model.model.set_experts_implementation("eager")  # one linear call an expert, which InputCollector sees
        batch = max(1, BATCH_TOKENS // self._ids.shape[1])
        states = list(model.embed(self._ids, batch))
        for number in range(model.depth):
            with model.layer(number):
                collector = InputCollector(model, number)
                with collector:
                    run_batches(model, number, states, batch, collector, self._counted)
            found: dict[str, Tensor] = {}
            for group in collector.groups:
                if group.hessian is not None:
                    found |= dict.fromkeys(group.modules, group.hessian)
            yield number, found
        total = torch.zeros(model.hidden_size, model.hidden_size, device=self._device)
        with model.norm_loaded() as norm:
            for n, state in enumerate(states):
                x = norm(state)
                if self._counted is not None:
                    x = x[self._counted[n * batch : n * batch + len(state)].to(x.device)]
                x = x.reshape(-1, model.hidden_size).float()
                total.addmm_(x.T, x)
        check_finite(total, f"{model.loaded_from}: inputs of the head")
        head, embedding = model.prefix_of(model.head), model.prefix_of(model.embedding)
        tied = self._base.config.get("tie_word_embeddings") or f"{head}.weight" not in self._base.tensors
        yield None, dict.fromkeys((head, embedding) if tied else (head,), total)


@dataclass(frozen=True)
class Feedback:
    """What the errors of a build are weighed by. outputs: for two-sided rounding; key: equal for equal statistics."""

    inputs: InputHessians
    outputs: OutputSource | None
    key: str

    def improve(
        self,
        kind: GgufType,
        packed: Tensor,
        weight: Tensor,
        module: str,
        layer: int | None,
        order: Order,
    ) -> tuple[Tensor, str]:
        """Better codes for the rows of one map and how they were rounded; what it was given, and "", where none are.

        packed: uint8 [rows, row bytes], as encoded;  weight: float32 [rows, columns], as GGUF has them
        """
        hessian = self.inputs.of(module, layer)
        if kind.name not in LAYOUTS or hessian is None or hessian.shape[0] != weight.shape[1]:
            return packed, ""
        if order.columns is not None:
            columns = order.columns.to(hessian.device)
            hessian = hessian[columns][:, columns]
        weight = weight.to(hessian.device)
        grid = rounding_grid(kind, packed.to(hessian.device), weight.shape[1])
        levels = round_rows(weight, hessian, grid)
        before = weight - dequantize_rows(kind, packed, weight.shape[1]).to(weight.device)
        made = put_levels(kind, packed, levels.cpu())
        after = weight - dequantize_rows(kind, made, weight.shape[1]).to(weight.device)
        if float(((after @ hessian) * after).sum()) >= float(((before @ hessian) * before).sum()):
            return packed, ""
        if self.outputs is None:
            return made, "one-sided"
        statistics = _in_order(self.outputs.of(module, hessian.device), order.rows, len(weight))
        ((levels, done),) = round_where_better(weight, hessian, statistics, [grid], [levels])
        return put_levels(kind, packed, levels.cpu()), done.note()


def rounding_grid(kind: GgufType, packed: Tensor, columns: int) -> RoundingGrid:
    """The grid of encoded rows, uint8 [rows, row bytes], as rounding takes it."""
    layout, found = LAYOUTS[kind.name], grid_of(kind, packed, columns)
    scale = torch.where(found.scale == 0, TINY, found.scale)
    group = torch.arange(columns, device=packed.device) // layout.group
    offset = found.offset if bool(found.offset.any()) else None
    if layout.values:
        table = torch.tensor(layout.values, dtype=torch.float32, device=packed.device)
        return RoundingGrid(scale, group, table=table, offset=offset)
    low, high = (torch.full_like(scale, level) for level in (layout.low, layout.high))
    return RoundingGrid(scale, group, low, high, offset=offset)


def round_rows(weight: Tensor, hessian: Tensor, grid: RoundingGrid) -> Tensor:
    """Levels [rows, columns] float32 by GPTQ with static activation order. Rows do not influence each other."""
    parts = []
    for start in range(0, len(weight), ROWS):
        rows = slice(start, start + ROWS)
        outputs = torch.eye(len(weight[rows]), device=weight.device)
        parts += round_two_sided(weight[rows], hessian, outputs, [grid.rows(rows)], output_damping=0.0)
    return torch.cat(parts)


def _in_order(statistics: OutputStatistics | None, order: Tensor | None, rows: int) -> OutputStatistics | None:
    """Those of the rows as GGUF has them. The file may lack the last rows of a vocabulary."""
    if statistics is None or order is None or len(order) < rows or len(statistics.fit) <= int(order.max()):
        return None
    order = order[:rows].to(statistics.fit.device)
    fit, held_out = (part[order][:, order] for part in (statistics.fit, statistics.held_out))
    return OutputStatistics(fit, held_out, statistics.tokens, statistics.held_out_tokens)


@dataclass(frozen=True)
class Order:
    """Which row and column of the model's matrix those of a GGUF tensor are. rows: None where they are no rows of it;
    columns: None where they are the same"""

    rows: Tensor | None
    columns: Tensor | None = None

    @staticmethod
    def of(place: Place, heads: Heads | None, rows: int, columns: int) -> Order:
        """rows, columns: of the model's matrix."""
        if heads is None:
            return Order(torch.arange(rows))
        index, across = torch.arange(rows)[:, None], torch.arange(columns)[None]
        if place.fused is not None:
            if place.stacked or place.fused.how.endswith("_turned"):
                return Order(None)
            index = split_one(place.fused.how, index, place.part, len(place.fused.parts), heads)
        elif place.heads:
            index = index[row_order(rows, place.heads, back=False)]
        for name in place.steps:
            if name == "value_columns":
                across = make_step(name, heads).to_gguf(across)
            else:
                index = make_step(name, heads).to_gguf(index)
        return Order(index.flatten(), across.flatten() if "value_columns" in place.steps else None)


def summary_of(notes: Sequence[str]) -> str:
    """Of the matrices of one tensor, which are several where it holds experts."""
    if len(notes) < 2:
        return notes[0] if notes else ""
    return f"{sum(note.startswith('two-sided') for note in notes)} two-sided of {len(notes)} with feedback"


def layer_of(tensor: str) -> int | None:
    """The layer of a GGUF tensor; None of what is outside the layers."""
    match = re.match(r"blk\.(\d+)\.", tensor)
    return int(match[1]) if match else None
