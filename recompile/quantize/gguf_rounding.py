"""Error feedback for GGUF types: the encoder's scales stay, and codes are chosen one after another, each making up for
the errors of those before it.

The grid of every block is fixed once its type's own encoder (importance included) has made the bytes, so the codes are
rounded as GPTQ does with static activation order, or two-sided (`two_sided`), and put back. The file is as any other.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from recompile.checkpoint.checkpoint import Checkpoint
from recompile.formats.gguf import dequantize_rows
from recompile.formats.gguf_codes import LAYOUTS, grid_of, put_levels
from recompile.formats.gguf_types import GgufType
from recompile.gguf.names import Place
from recompile.gguf.values import Heads, make_step, row_order, split_one
from recompile.quantize.calibrate import InputsWithPower, LayerInputs, stream_inputs
from recompile.quantize.two_sided import (
    OutputSource,
    OutputStatistics,
    RoundingGrid,
    round_two_sided,
    round_where_better,
)

ROWS = 1024  # rounded together where rows do not influence each other
TINY = 1e-30  # stands for a scale of 0, whose level does not matter


class InputSource(Protocol):
    """What maps are given: in the base (InputHessians), or in a build that compensates (gguf_compensated)."""

    compensates: bool

    def of(self, module: str, layer: int | None) -> Tensor | None:
        """X^T X of the inputs of a map, [in, in] float32; None for a map that is given nothing."""
        ...

    def mean_squares_of(self, module: str, layer: int | None) -> Tensor | None:
        """[in] float32 on the CPU, the mean square of every input up to a factor; None as `of`."""
        ...


class InputHessians:
    """X^T X of the inputs of every map over calibration rows, [in, in] float32, and their mean squares.

    Layers are asked for in rising order, the head (None) last: the model is streamed as far as that, and only the last
    layer's are held. ids: int64 [rows, tokens]; counted: bool, the places of them that are meant, None: all

    mean_squares: module -> float32 [in] on the CPU, of all layers so far; tokens: module -> how many were seen
    """

    compensates: bool = False

    def __init__(
        self,
        base: Checkpoint,
        ids: Tensor,
        *,
        device: str = "cpu",
        dtype: torch.dtype | None = None,
        counted: Tensor | None = None,
    ) -> None:
        self._layers = stream_inputs(base, ids, InputsWithPower, device=device, dtype=dtype, counted=counted)
        self._at: int | None = -1
        self._found: dict[str, Tensor] = {}
        self.mean_squares: dict[str, Tensor] = {}
        self.tokens: dict[str, int] = {}

    def of(self, module: str, layer: int | None) -> Tensor | None:
        """None for a module that no token reached, or that no layer runs."""
        self.go_to(layer)
        return self._found.get(module) if self._at == layer else None

    def mean_squares_of(self, module: str, layer: int | None) -> Tensor | None:
        """[in] float32, as `recompile.quantize.gguf.collect_importance` has them; None as `of`."""
        self.go_to(layer)
        return self.mean_squares.get(module)

    def go_to(self, layer: int | None) -> None:
        """Stream the model up to a layer, None: to its end."""
        while self._at is not None and (layer is None or self._at < layer):
            inputs = next(self._layers, LayerInputs(None, 0, []))
            self._at, self._found = inputs.layer, {}
            for group in inputs.groups:
                if group.hessian is None:
                    continue
                assert isinstance(group, InputsWithPower), "asked for"
                assert group.power is not None, "it grows with the Hessian"
                self._found |= dict.fromkeys(group.modules, group.hessian)
                self.mean_squares |= dict.fromkeys(group.modules, (group.power / group.tokens).cpu())
                self.tokens |= dict.fromkeys(group.modules, group.tokens)


@dataclass(frozen=True)
class Feedback:
    """What the errors of a build are weighed by. outputs: for two-sided rounding; key: equal for equal statistics;
    gives_importance: whether the encoders' own errors are weighed by these inputs as well."""

    inputs: InputSource
    outputs: OutputSource | None
    key: str
    gives_importance: bool = False

    @property
    def compensates(self) -> bool:
        return self.inputs.compensates

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
