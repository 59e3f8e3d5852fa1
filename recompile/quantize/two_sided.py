"""Two-sided rounding: errors are weighed by what reads the map's inputs and by what becomes of its outputs.

Axes: O = out_features (rows), I = in_features (columns), NG = groups of columns that share a scale.

To second order a change E = W - Q of a map's weight costs the model g^T E x squared, averaged over tokens, with x the
input and g the gradient at the output for a label that the model itself draws. With x and g taken as independent
(K-FAC: Martens and Grosse 2015, arXiv:1503.05671) that is

    tr(Hout E Hin E^T),    Hin = E[x x^T] [I, I],    Hout = E[g g^T] [O, O].

With Hin = U D U^T and Hout = V C V^T, U and V unit upper triangular, it is the sum of C_r D_c F_rc^2 where

    F = V^T E U,    F_rc = E_rc + A_rc + S_rc,
    A_rc = sum over c' < c of E_rc' U_c'c,    S_rc = sum over r' < r of V_r'r (E U)_r'c,

so rounding w + A + S to the grid, columns in order and rows in order within a column, is the greedy minimiser: LDLQ
(Chee et al. 2023, arXiv:2307.13304) on both sides, as YAQA has it (Tseng et al. 2025, arXiv:2505.22988). With Hout = I
it is GPTQ. An entry needs only those before it in both orders, so tiles of rows and columns are rounded one after
another, what earlier tiles give comes in by matrix products, and scalar loops run inside a tile only.

Hout is an average over far fewer tokens than it has entries, and its noise is what limits the gain: undamped, feedback
follows the noise and loses. So a multiple of the mean diagonal is added, the one with the least expected error on
gradients of rows held out. The error that feedback leaves is V^-T N U^-1 with N about white, hence

    expected error on held-out rows ~ tr(V^-1 Hheld V^-T)

(tr(Hheld) for V = I, one-sided), which needs no rounding. What was rounded is then measured on the held-out rows as
well, and a matrix whose two-sided error is not below the one-sided one keeps the latter.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from recompile.errors import FormatError
from recompile.quantize.float_grids import INT8, LevelGrid
from recompile.quantize.gptq import QuantizedWeight, factor_hessian

Rounding = Literal["one-sided", "two-sided"]
ROUNDINGS: tuple[Rounding, ...] = ("one-sided", "two-sided")
# Of the mean diagonal of Hout. At 3 bits SmolLM2 wins 6 to 9 % with 1.0 and loses 4 % with 0.1, for want of tokens; a
# narrow model with many tokens takes 0.03 to 0.3.
DAMPINGS = (0.03, 0.1, 0.3, 1.0, 3.0)

_TILE_ROWS, _TILE_COLUMNS = 64, 32  # on a CPU: what is inside stays in the first caches
_DEVICE_TILE = 128  # elsewhere: a tile takes rows + columns steps, each of which is a few kernels


@dataclass(frozen=True)
class OutputStatistics:
    """E[g g^T] of one map: of the rows that it is rounded with, and of rows held out. Equality is identity.

    fit, held_out: [O, O] float32, symmetric, any positive multiple; of the same kind of rows, from different ones
    tokens, held_out_tokens: how many (token, draw) pairs they are averages of
    """

    fit: Tensor
    held_out: Tensor
    tokens: int
    held_out_tokens: int


class OutputSource(Protocol):
    """Where the statistics of a model's maps come from, module by module."""

    @property
    def fingerprint(self) -> str:
        """Equal for equal statistics; part of what decides a build's bytes."""
        ...

    def of(self, module: str, device: torch.device) -> OutputStatistics | None:
        """None for a module that has none: no token reached it, or it is too wide."""
        ...


@dataclass(frozen=True)
class RoundingGrid:
    """The grid of one weight, the same whether levels are evenly spaced or not: w = level * scale.

    scale: [O, NG] float32;  group: int64 [I], the group of every column
    low, high: [O, NG] float32, lowest and highest whole level; unused where `table` is given
    table: [n] float32, all levels, rising, of a small float type; None for whole levels
    offset: [O, NG] float32, added to level * scale; None = 0
    """

    scale: Tensor
    group: Tensor
    low: Tensor | None = None
    high: Tensor | None = None
    table: Tensor | None = None
    offset: Tensor | None = None

    def rows(self, rows: slice) -> RoundingGrid:
        """Some of its rows, as views."""
        parts = {name: getattr(self, name) for name in ("scale", "low", "high", "offset")}
        return replace(self, **{name: part[rows] for name, part in parts.items() if part is not None})

    def without_offset(self, weight: Tensor) -> Tensor:
        """weight [O, I] less its offsets."""
        return weight if self.offset is None else weight - self.offset[:, self.group]


@dataclass(frozen=True)
class MatrixRounding:
    """What became of one matrix. ratio: the two-sided error over the one-sided one on held-out rows, as measured; None
    where it was not tried. damping: of Hout, as a fraction of its mean diagonal."""

    rounding: Rounding
    damping: float | None = None
    ratio: float | None = None
    reason: str = ""  # why it is one-sided

    def note(self) -> str:
        """For reports; empty where there is nothing to tell."""
        if self.rounding == "two-sided":
            return f"two-sided, {self.ratio:.3f} x the one-sided error on held-out rows, damping {self.damping:g}"
        return f"one-sided: {self.reason}" if self.reason else ""


def grid_of_integers(quantized: QuantizedWeight) -> RoundingGrid:
    """Levels are code - zero point."""
    grid, scheme, in_features = quantized.grid, quantized.scheme, quantized.codes.shape[1]
    zero = torch.zeros_like(grid.scale) if grid.zero_point is None else grid.zero_point.float()
    group = torch.arange(in_features, device=grid.scale.device) // (scheme.group_size or in_features)
    low, high = scheme.code_min - zero, scheme.code_max - zero
    return RoundingGrid(grid.scale.float(), group, low, high, offset=grid.offset)


def grid_of_levels(grid: LevelGrid, in_features: int) -> RoundingGrid:
    """Of a small float type, or of int8."""
    group = torch.arange(in_features, device=grid.factor.device) // grid.columns
    if grid.levels is INT8:
        ones = torch.ones_like(grid.factor)
        return RoundingGrid(grid.factor, group, -128 * ones, 127 * ones)
    table = level_table(grid.levels.round, grid.levels.largest)
    return RoundingGrid(grid.factor, group, table=table.to(grid.factor.device))


def choose_damping(statistics: OutputStatistics, dampings: Sequence[float] = DAMPINGS) -> tuple[float | None, float]:
    """The damping with the least expected error on held-out rows, and that error over the one-sided one.

    None where no damping is expected to gain.
    """
    best: tuple[float | None, float] = (None, 1.0)
    held_out = statistics.held_out.float()
    plain = held_out.diagonal().sum()
    if not bool(plain > 0):
        return best
    order = row_order(statistics.fit)
    held_out = held_out[order][:, order]
    for damping in dampings:
        upper = factor_hessian(statistics.fit, order, damping)
        half = torch.linalg.solve_triangular(upper, held_out, upper=True, unitriangular=True)  # V^-1 Hheld
        left = torch.linalg.solve_triangular(upper, half.t(), upper=True, unitriangular=True)  # its transpose V^-T
        ratio = float(left.diagonal().sum() / plain)
        if ratio < best[1]:
            best = (damping, ratio)
    return best


def row_order(outputs: Tensor) -> Tensor:
    """Rows by decreasing diagonal of outputs [O, O], int64 [O]: what counts most is rounded first, and what counts less
    makes up for it."""
    return torch.argsort(outputs.diagonal(), descending=True, stable=True)


def proxy(error: Tensor, inputs: Tensor, outputs: Tensor) -> float:
    """tr(Hout E Hin E^T); error [O, I], inputs [I, I], outputs [O, O], float32."""
    return float(((outputs @ error) * (error @ inputs)).sum(dtype=torch.float64))


def round_where_better(
    weight: Tensor,
    inputs: Tensor,
    statistics: OutputStatistics | None,
    grids: Sequence[RoundingGrid],
    one_sided: Sequence[Tensor],
    damping: float = 0.01,
) -> list[tuple[Tensor, MatrixRounding]]:
    """For every grid, levels of one weight: two-sided ones where they are better on held-out rows.

    weight:    [O, I] float, finite
    inputs:    [I, I] float, X^T X
    one_sided: a tensor a grid, levels [O, I] float32 that GPTQ found on the same grid
    damping:   of `inputs`, a fraction of its mean diagonal
    returns:   levels [O, I] float32 and what was done, a grid each
    """
    if statistics is None:
        kept = MatrixRounding("one-sided", reason="no gradients at its output were measured")
        return [(levels, kept) for levels in one_sided]
    if statistics.fit.shape != (len(weight), len(weight)):
        raise FormatError(
            f"output statistics: found {list(statistics.fit.shape)}, wanted [{len(weight)}, {len(weight)}]"
        )
    chosen, expected = choose_damping(statistics)
    if chosen is None:
        kept = MatrixRounding("one-sided", reason="no damping of its output side is expected to gain")
        return [(levels, kept) for levels in one_sided]
    del expected
    weight, inputs, held_out = weight.float(), inputs.float(), statistics.held_out.float()
    found = []
    for grid, before, after in zip(
        grids, one_sided, round_two_sided(weight, inputs, statistics.fit, grids, damping, chosen), strict=True
    ):
        spread, own = grid.scale[:, grid.group], grid.without_offset(weight)  # [O, I]
        old = proxy(own - before * spread, inputs, held_out)
        new = proxy(own - after * spread, inputs, held_out)
        ratio = new / old if old > 0 else 1.0
        if ratio < 1:
            found.append((after, MatrixRounding("two-sided", chosen, ratio)))
        else:
            why = f"two-sided has {ratio:.3f} x its error on held-out rows"
            found.append((before, MatrixRounding("one-sided", chosen, ratio, why)))
    return found


def improve_integers(
    weights: Mapping[str, Tensor],
    hessian: Tensor,
    one_sided: Sequence[QuantizedWeight],
    outputs: OutputSource,
    damping: float,
) -> tuple[list[QuantizedWeight], list[dict[str, str]]]:
    """Round what GPTQ made of modules stacked along rows once more, each by its own outputs' statistics.

    weights:   of every module, [its rows, I]; hessian: [I, I], X^T X of their inputs
    one_sided: of the stack, one a scheme
    returns:   the same with better codes, and for each scheme what was done to every module
    """
    codes = [quantized.codes.clone() for quantized in one_sided]
    notes: list[dict[str, str]] = [{} for _ in one_sided]
    stop = 0
    for name, weight in weights.items():
        rows = slice(stop, stop + len(weight))
        stop = rows.stop
        mine = [quantized.rows(rows) for quantized in one_sided]
        grids = [grid_of_integers(quantized) for quantized in mine]
        zeros = [
            0 if q.grid.zero_point is None else q.grid.zero_point.float()[:, g.group]
            for q, g in zip(mine, grids, strict=True)
        ]
        before = [quantized.codes.float() - zero for quantized, zero in zip(mine, zeros, strict=True)]
        statistics = outputs.of(name, weight.device)
        for number, (levels, done) in enumerate(
            round_where_better(weight, hessian, statistics, grids, before, damping)
        ):
            codes[number][rows] = (levels + zeros[number]).to(torch.int8)
            notes[number][name] = done.note()
    return [replace(quantized, codes=found) for quantized, found in zip(one_sided, codes, strict=True)], notes


def improve_levels(
    weights: Mapping[str, Tensor],
    hessian: Tensor,
    grids: Sequence[Mapping[str, LevelGrid]],
    one_sided: Sequence[Tensor],
    outputs: OutputSource,
    damping: float,
) -> tuple[list[Tensor], list[dict[str, str]]]:
    """As improve_integers, for grids of small floats and int8. grids: of every module, one mapping a scheme;
    one_sided: levels of the stack, [O, I] float32."""
    found = [levels.clone() for levels in one_sided]
    notes: list[dict[str, str]] = [{} for _ in one_sided]
    stop = 0
    for name, weight in weights.items():
        rows = slice(stop, stop + len(weight))
        stop = rows.stop
        mine = [grid_of_levels(of_scheme[name], weight.shape[1]) for of_scheme in grids]
        before = [levels[rows] for levels in one_sided]
        statistics = outputs.of(name, weight.device)
        for number, (levels, done) in enumerate(round_where_better(weight, hessian, statistics, mine, before, damping)):
            found[number][rows] = levels
            notes[number][name] = done.note()
    return found, notes


@torch.no_grad()
def round_two_sided(
    weight: Tensor,
    inputs: Tensor,
    outputs: Tensor,
    grids: Sequence[RoundingGrid],
    input_damping: float = 0.01,
    output_damping: float = 1.0,
) -> list[Tensor]:
    """Levels [O, I] float32 of one weight on every grid.

    weight:  [O, I] float, finite;  inputs: [I, I] float, X^T X;  outputs: [O, O] float, G^T G
    dampings: added to the diagonals, fractions of their means

    Columns go by decreasing diagonal of `inputs`, as static activation order has it, rows by that of `outputs`. Raises
    FormatError for shapes that do not fit or matrices that are not positive semidefinite.
    """
    out_features, in_features = weight.shape
    for name, found, size in (("inputs", inputs, in_features), ("outputs", outputs, out_features)):
        if tuple(found.shape) != (size, size):
            raise FormatError(f"{name}: found shape {list(found.shape)}, wanted {[size, size]}")
    columns = torch.argsort(inputs.diagonal().double(), descending=True, stable=True)
    rows = row_order(outputs)
    upper_in = factor_hessian(inputs, columns, input_damping)
    upper_out = factor_hessian(outputs, rows, output_damping)
    weight = weight.float()
    made = []
    for grid in grids:
        ordered = grid.without_offset(weight)[rows][:, columns].t().contiguous()  # [I, O], in the order of rounding
        made.append(_round_grid(ordered, upper_in, upper_out, grid, rows, columns))
    return made


def _round_grid(
    original: Tensor, upper_in: Tensor, upper_out: Tensor, grid: RoundingGrid, rows: Tensor, columns: Tensor
) -> Tensor:
    """original: [I, O] in the order of rounding; returns levels [O, I] in the stored order."""
    in_features, out_features = original.shape
    round_tile = _tile_rounder(original.device)
    on_cpu = original.device.type == "cpu"
    tile_rows, tile_columns = (_TILE_ROWS, _TILE_COLUMNS) if on_cpu else (_DEVICE_TILE, _DEVICE_TILE)
    group = grid.group[columns]
    # [groups, O] in the order of rounding; a run's rows are gathered, so the spread grid is never held whole
    scale, low, high = (t[rows].t().contiguous() if t is not None else None for t in (grid.scale, grid.low, grid.high))
    assert scale is not None, "every grid has scales"
    table = grid.table if grid.table is not None else original.new_empty(0)
    error = torch.zeros_like(original)
    levels = torch.empty_like(original)
    for start in range(0, in_features, tile_columns):
        run = slice(start, min(start + tile_columns, in_features))
        before = upper_in[:start, run].t() @ error[:start]  # [run, O]: A of the columns before
        carried = torch.zeros_like(before)  # E U of the run
        scales = scale[group[run]]
        lows, highs = (t[group[run]] if t is not None else scales for t in (low, high))
        run_in = upper_in[run, run].contiguous()
        for top in range(0, out_features, tile_rows):
            tile = slice(top, min(top + tile_rows, out_features))
            above = carried[:, :top] @ upper_out[:top, tile]  # [run, tile]: S of the rows before
            made = round_tile(
                Tile(
                    original[run, tile].contiguous(),
                    before[:, tile].contiguous(),
                    above.contiguous(),
                    run_in,
                    upper_out[tile, tile].contiguous(),
                    scales[:, tile].contiguous(),
                    lows[:, tile].contiguous(),
                    highs[:, tile].contiguous(),
                    table,
                )
            )
            levels[run, tile], error[run, tile], carried[:, tile] = made
    back = torch.empty_like(levels.t())
    back[rows[:, None], columns] = levels.t()
    return back


class Tile(NamedTuple):
    """What rounding one tile takes: K columns x R rows, every tensor float32 [K, R] but for upper_in [K, K], upper_out
    [R, R] and table [n], or empty where levels are whole numbers from low to high.

    before: A of columns of earlier runs;  above: S of rows of earlier tiles
    """

    original: Tensor
    before: Tensor
    above: Tensor
    upper_in: Tensor
    upper_out: Tensor
    scale: Tensor
    low: Tensor
    high: Tensor
    table: Tensor


TileRounder = Callable[[Tile], "tuple[Tensor, Tensor, Tensor]"]


def _tile_rounder(device: torch.device) -> TileRounder:
    compiled = _compiled() if device.type == "cpu" else None
    return round_tile_torch if compiled is None else compiled


@lru_cache(maxsize=1)
def _compiled() -> TileRounder | None:
    """The numba loops, or None (said once) where numba is not installed."""
    try:
        from recompile.quantize import two_sided_cpu
    except ImportError:
        message = "numba is not installed: two-sided rounding on the CPU is some 20 times slower; pip install numba"
        warnings.warn(message, RuntimeWarning, stacklevel=4)
        return None

    def rounder(tile: Tile) -> tuple[Tensor, Tensor, Tensor]:
        made = tuple(torch.empty_like(tile.original) for _ in range(3))
        two_sided_cpu.round_tile(tuple(t.numpy() for t in tile), tuple(t.numpy() for t in made))
        return made[0], made[1], made[2]

    return rounder


def round_tile_torch(tile: Tile) -> tuple[Tensor, Tensor, Tensor]:
    """Round one tile; returns levels, errors E and carried (E U), float32 [K, R] each.

    Entries with column + row alike need nothing of each other, so a tile takes K + R - 1 steps.
    """
    original, before, above, upper_in, upper_out, scale, low, high, table = tile
    columns, rows = original.shape
    levels, error, carried = (torch.zeros_like(original) for _ in range(3))
    strict_in = upper_in.triu(1)
    strict_out = upper_out.triu(1).t().contiguous()  # [row, rows before]
    midpoints = (table[1:] + table[:-1]) / 2
    every = torch.arange(columns, device=original.device)
    for step in range(rows + columns - 1):
        k = every[max(0, step - rows + 1) : min(columns, step + 1)]
        r = step - k
        a = before[k, r] + (error[:, r] * strict_in[:, k]).sum(0)
        s = above[k, r] + (carried[k] * strict_out[r]).sum(1)
        x = (original[k, r] + a + s) / scale[k, r]
        if len(table):
            level = _nearest(table, midpoints, x)
        else:
            level = torch.minimum(torch.maximum(x.round(), low[k, r]), high[k, r])
        levels[k, r] = level
        wrong = original[k, r] - level * scale[k, r]
        error[k, r] = wrong
        carried[k, r] = wrong + a
    return levels, error, carried


def _nearest(table: Tensor, midpoints: Tensor, x: Tensor) -> Tensor:
    """The nearest of rising levels; at a tie the one with the even place, counted from the middle (0)."""
    low, high = torch.searchsorted(midpoints, x), torch.searchsorted(midpoints, x, right=True)  # differ at a tie
    even = (low - len(table) // 2) % 2 == 0
    return table[torch.where(even, low, high)]


def level_table(round_levels: Callable[[Tensor], Tensor], largest: float) -> Tensor:
    """All levels of a small float type, rising, float32 [levels]: what its rounding gives on a grid fine enough for
    every step."""
    # Steps of small floats are powers of two no finer than 2^-9 (the smallest of E4M3)
    steps = torch.arange(0, int(largest * 512) + 1, dtype=torch.float32) / 512
    positive = round_levels(steps).unique()
    return torch.cat([-positive[1:].flip(0), positive])
