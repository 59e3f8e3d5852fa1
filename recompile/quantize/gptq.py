"""GPTQ: round the columns of a weight one after another, each making up for the errors of those before it.

Axes: O = out_features (rows), I = in_features (columns), R = rows of all schemes stacked, G = group size.

For inputs X with H = X^T X the output error of rounding W to Q is tr(E H E^T), E = W - Q. Factor H = U D U^T with U
unit upper triangular and D diagonal; then it is the sum over columns of D_j * ((E U)_j)^2, and

    (E U)_j = target_j - q_j,   target_j = w_j + sum_{i<j} E_i U_ij

so rounding each target_j to its grid, in order, is the greedy minimiser. These are the updates of GPTQ (Frantar et al.
2022, arXiv:2210.17323) in the form of LDLQ (Chee et al. 2023, arXiv:2307.13304, which shows them to be the same): one
Cholesky factor, no inverse, and the errors kept are those of the original weights, which makes every update a product
with a block of U.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from recompile.errors import FormatError
from recompile.formats.packed_int import IntScheme
from recompile.quantize.int_grids import Grid, fit_columns, fit_grid, normalise_importance

ActOrder = Literal["off", "static"]

_RUN_COLUMNS = 32  # columns rounded between two small products; the column loop reads only errors of its own run
_STACK_WEIGHTS = 1 << 26  # weights of all schemes held at a time (float32 targets and errors, 512 MiB); rows are split
_MAX_DAMPING = 1.0


@dataclass(frozen=True)
class QuantizedWeight:
    """One weight on one grid; `packed_int.pack` makes the stored parts from it."""

    codes: Tensor  # [O, I] int8, signed
    grid: Grid
    scheme: IntScheme

    def rows(self, rows: slice) -> QuantizedWeight:
        """Some of its rows, as views."""
        return QuantizedWeight(self.codes[rows], self.grid.rows(rows), self.scheme)


def quantize_gptq(
    weight: Tensor,
    hessian: Tensor,
    schemes: Sequence[IntScheme],
    *,
    damping: float = 0.01,
    block: int = 128,
    importance: bool = True,
    act_order: ActOrder = "off",
    scale_dtype: torch.dtype = torch.bfloat16,
    grids: Sequence[Grid] | None = None,
) -> list[QuantizedWeight]:
    """Quantize one weight to every scheme in a single pass over its columns.

    weight:     [O, I] float, finite; matrices that read the same input (q, k, v; gate, up) may be stacked along rows,
                and the results split again: rows do not influence each other
    hessian:    [I, I] float, X^T X of the inputs times any positive number; on the weight's device. A column with a
                zero diagonal (an input that is always 0) is rounded to nearest, and takes no part in the others
    damping:    added to the diagonal, as a fraction of its mean; raised tenfold, up to 1, while the Hessian is not
                positive definite
    block:      columns between two updates of all later columns by one matrix product; no influence on the result
                beyond float rounding
    importance: fit the grids with each column's squared error weighted by the Hessian diagonal
    act_order:  "off" rounds the columns in order and fits the grid of each group to its error-compensated weights when
                the group begins. "static" fits all grids to the original weights and rounds the columns by decreasing
                Hessian diagonal: better where the diagonal varies much from column to column, equal where it does not.
                Neither changes the stored form: codes and grids are in the original column order
    grids:      one a scheme, fitted by the caller to the original weights; with act_order "static"
    returns:    one QuantizedWeight a scheme, in the order of `schemes`, on the weight's device

    Raises FormatError for shapes that do not fit, a group size that does not divide the row, NaN or infinite values, or
    a Hessian that stays indefinite.
    """
    if act_order not in ("off", "static"):
        raise FormatError(f"act_order: found {act_order!r}, wanted 'off' or 'static'")
    if block < 1:
        raise FormatError(f"block: found {block}, wanted at least 1 column")
    assert grids is None or (act_order == "static" and len(grids) == len(schemes)), "fixed before the first column"
    check_inputs(weight, hessian, schemes)
    if not schemes:
        return []
    diagonal = hessian.diagonal().double() if hessian.device.type != "mps" else hessian.diagonal().float()
    order = torch.argsort(diagonal, descending=True, stable=True) if act_order == "static" else None
    unit_upper = factor_hessian(hessian, order, damping)
    column_weight = normalise_importance(diagonal if importance else None, weight.shape[1], weight.device)

    rows_per_part = max(1, _STACK_WEIGHTS // (weight.shape[1] * len(schemes)))
    parts = []
    for start in range(0, len(weight), rows_per_part):
        rows = slice(start, start + rows_per_part)
        given = None if grids is None else [grid.rows(rows) for grid in grids]
        parts.append(
            _quantize_rows(weight[rows].float(), unit_upper, schemes, block, column_weight, order, scale_dtype, given)
        )
    return [_join([part[i] for part in parts]) for i in range(len(schemes))]


def proxy_error(weight: Tensor, quantized: Tensor, hessian: Tensor) -> Tensor:
    """tr(E H E^T) / tr(W H W^T), E = weight - quantized: relative squared error of the outputs on the calibration rows.

    weight, quantized: [O, I] float;  hessian: [I, I] float;  returns: scalar float32, NaN where the outputs are all 0
    """
    hessian, weight = hessian.float(), weight.float()
    error = weight - quantized.float()
    return ((error @ hessian) * error).sum() / ((weight @ hessian) * weight).sum()


@dataclass(frozen=True)
class _GridTable:
    """The grid of one scheme with groups first; filled as the groups begin, or beforehand."""

    scheme: IntScheme
    scale: Tensor  # [NG, O] float32
    zero_point: Tensor  # [NG, O] float32, signed; 0 when symmetric
    offset: Tensor | None = None  # [O, NG] float32, which the weights that are rounded lack

    def group_size(self) -> int:
        return self.scheme.group_size or 1 << 62  # channel: every column is in group 0

    def to_grid(self) -> Grid:
        zero = None if self.scheme.symmetric else self.zero_point.t().to(torch.int8).contiguous()
        return Grid(self.scale.t().contiguous(), zero, self.offset)


def _quantize_rows(
    weight: Tensor,
    unit_upper: Tensor,
    schemes: Sequence[IntScheme],
    block: int,
    column_weight: Tensor | None,
    order: Tensor | None,
    scale_dtype: torch.dtype,
    grids: Sequence[Grid] | None,
) -> list[QuantizedWeight]:
    """GPTQ of [O, I] rows; those of all schemes are stacked, [I, R], so that one loop over the columns serves all."""
    out_features, in_features = weight.shape
    original = weight.t().contiguous() if order is None else weight.t()[order]  # [I, O], in the order of rounding
    if grids is None:
        tables = [
            _start_table(
                weight, scheme, column_weight, scale_dtype, fit_now=order is not None or scheme.group_size is None
            )
            for scheme in schemes
        ]
    else:
        tables = [_table_of(grid, scheme) for grid, scheme in zip(grids, schemes, strict=True)]
    shifted = [  # offsets are no error: each scheme rounds the weights less its own
        original if grid.offset is None else grid.without_offset(weight).t()[order] for grid in grids or ()
    ]
    stack_rows = [slice(i * out_features, (i + 1) * out_features) for i in range(len(schemes))]
    code_min = _stack([torch.full_like(original[0], scheme.code_min) for scheme in schemes])  # [R]
    code_max = _stack([torch.full_like(original[0], scheme.code_max) for scheme in schemes])
    error = weight.new_zeros((in_features, len(code_min)))  # E; columns still to come are 0
    codes = torch.empty(error.shape, dtype=torch.int8, device=weight.device)

    for block_start in range(0, in_features, block):
        block_stop = min(block_start + block, in_features)
        columns = slice(block_start, block_stop)
        block_original = (  # [block, R]
            _stack([one[columns] for one in shifted]) if shifted else original[columns].repeat(1, len(schemes))
        )
        block_target = torch.addmm(block_original, unit_upper[:block_start, columns].t(), error[:block_start])
        for start, stop in _list_runs(block_start, block_stop, tables if order is None else ()):
            done, run = slice(block_start, start), slice(start, stop)  # of all columns
            run_in_block = slice(start - block_start, stop - block_start)
            for table, rows in zip(tables, stack_rows, strict=True):
                if order is not None or table.scheme.group_size is None or start % table.scheme.group_size:
                    continue
                group = slice(start, start + table.scheme.group_size)
                settled = _settled(original, block_target[:, rows], error[:, rows], unit_upper, columns, group)
                _fit_group(table, start // table.scheme.group_size, settled, column_weight, scale_dtype)

            # One grid for the whole run, or one a column where the columns of a run come from different groups.
            sizes = [table.group_size() for table in tables]
            groups = [slice(start // n, start // n + 1) if order is None else order[run] // n for n in sizes]
            scale = _stack([table.scale[g] for table, g in zip(tables, groups, strict=True)])  # [1 or run, R]
            zero_point = _stack([table.zero_point[g] for table, g in zip(tables, groups, strict=True)])
            target = torch.addmm(block_target[run_in_block], unit_upper[done, run].t(), error[done])
            levels = _round_run(
                target,
                block_original[run_in_block],
                unit_upper[run, run],
                (scale, code_min - zero_point, code_max - zero_point),
                error[run],
            )
            codes[run] = levels.add_(zero_point)

    if order is not None:
        codes = torch.empty_like(codes).index_copy_(0, order, codes)
    return [
        QuantizedWeight(codes[:, rows].t().contiguous(), table.to_grid(), table.scheme)
        for table, rows in zip(tables, stack_rows, strict=True)
    ]


def _settled(
    original: Tensor, block_target: Tensor, error: Tensor, unit_upper: Tensor, block: slice, group: slice
) -> Tensor:
    """[G, O]: what the weights of a group are about to become, which begins in a block of columns: its grid fits these.

    original, error: [I, O];  block_target: [block, O], with the errors of the columns before the block
    """
    if group.stop <= block.stop:  # what came before the block is in its targets already
        base = block_target[group.start - block.start : group.stop - block.start]
        since = slice(block.start, group.start)
    else:
        base, since = original[group], slice(0, group.start)
    pull = torch.addmm(base, unit_upper[since, group].t(), error[since]) - original[group]
    # The targets of the group's columns will also hold each other's errors. Were its columns free, they would settle
    # where (E U)_j = 0 in all of them, a triangular solve; rounding scatters around that.
    settled = torch.linalg.solve_triangular(unit_upper[group, group].t(), pull, upper=False, unitriangular=True)
    return settled + original[group]


def _round_run(
    target: Tensor, original: Tensor, unit_upper: Tensor, grid: tuple[Tensor, Tensor, Tensor], error: Tensor
) -> Tensor:
    """Round the columns of one run in order; writes their errors to `error`, returns their levels q - z.

    target, original, error: [n, R];  unit_upper: [n, n];  grid: scale, lowest and highest level, each [1 or n, R]
    `target` lacks the errors of this run only, and is used up. This loop is most of the time on a CPU: five kernels a
    column, nothing read back.
    """
    count = len(target)
    levels = torch.empty_like(target)
    scales, inverses, lows, highs = (t.expand_as(target).unbind(0) for t in (grid[0], 1 / grid[0], *grid[1:]))
    targets, originals, errors, columns = target.unbind(0), original.unbind(0), error.unbind(0), levels.unbind(0)
    for k in range(count):
        if k:
            targets[k].addmv_(error[:k].t(), unit_upper[:k, k])
        column = torch.mul(targets[k], inverses[k], out=columns[k])
        column.round_()
        torch.clamp(column, lows[k], highs[k], out=column)
        torch.addcmul(originals[k], column, scales[k], value=-1, out=errors[k])
    return levels


def _list_runs(block_start: int, block_stop: int, tables: Sequence[_GridTable]) -> list[tuple[int, int]]:
    """Cut a block into runs of at most _RUN_COLUMNS columns in which no group of any table begins half-way."""
    cuts = set(range(block_start, block_stop, _RUN_COLUMNS)) | {block_stop}
    for table in tables:
        if table.scheme.group_size is not None:
            first = -(-block_start // table.scheme.group_size) * table.scheme.group_size
            cuts |= set(range(first, block_stop, table.scheme.group_size))
    ordered = sorted(cuts)
    return list(pairwise(ordered))


def _start_table(
    weight: Tensor, scheme: IntScheme, column_weight: Tensor | None, scale_dtype: torch.dtype, fit_now: bool
) -> _GridTable:
    """The grid of the original weights if `fit_now`, else an empty table."""
    if not fit_now:
        scale = weight.new_ones((scheme.count_groups(weight.shape[1]), weight.shape[0]))
        return _GridTable(scheme, scale, torch.zeros_like(scale))
    return _table_of(fit_grid(weight, scheme, "mse", column_weight, scale_dtype), scheme)


def _table_of(grid: Grid, scheme: IntScheme) -> _GridTable:
    scale = grid.scale.t().contiguous()
    zero = torch.zeros_like(scale) if grid.zero_point is None else grid.zero_point.t().to(scale.dtype)
    return _GridTable(scheme, scale, zero, grid.offset)


def _fit_group(
    table: _GridTable, group: int, target: Tensor, column_weight: Tensor | None, scale_dtype: torch.dtype
) -> None:
    """Fit one group of a table to its error-compensated weights [G, O]."""
    size = len(target)
    weight = None if column_weight is None else column_weight[group * size : (group + 1) * size, None]
    scale, zero = fit_columns(target, weight, table.scheme, "mse", scale_dtype)
    table.scale[group] = scale
    if zero is not None:
        table.zero_point[group] = zero + table.scheme.code_min


def factor_hessian(hessian: Tensor, order: Tensor | None, damping: float) -> Tensor:
    """U [I, I] float32, unit upper triangular, with the damped H = U D U^T and D diagonal, in the order of rounding."""
    # float64: with 1 % damping the condition may reach 100 * I, too much for a float32 factor of a wide matrix.
    full = hessian.to(torch.float32 if hessian.device.type == "mps" else torch.float64, copy=True)
    diagonal = full.diagonal().clone()
    dead = diagonal == 0
    mean = diagonal.sum() / (~dead).sum().clamp(min=1)
    mean = torch.where(mean > 0, mean, torch.ones_like(mean))
    full.masked_fill_(dead[:, None] | dead[None, :], 0)
    full.diagonal().copy_(torch.where(dead, mean, diagonal))
    if order is not None:
        full = full[order][:, order]
    while True:
        damped = full.flip(0, 1)  # the lower factor of the reversed matrix is the upper factor of this one
        damped.diagonal().add_(damping * mean)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            upper = factor.flip(0, 1)
            return (upper / upper.diagonal()).float()
        if damping >= _MAX_DAMPING:
            raise FormatError(
                f"hessian: not positive definite even with damping {damping:g} of its mean diagonal; wanted X^T X of "
                "calibration inputs, check that it was summed in float32 or wider"
            )
        damping = min(max(10 * damping, 1e-4), _MAX_DAMPING)


def check_inputs(weight: Tensor, hessian: Tensor, schemes: Sequence[IntScheme]) -> None:
    """weight: [out, in]; hessian: [in, in]. Raises FormatError for other shapes, sizes and values."""
    if weight.ndim != 2 or 0 in weight.shape:
        raise FormatError(f"weight: found shape {list(weight.shape)}, wanted [out, in]")
    in_features = weight.shape[1]
    if tuple(hessian.shape) != (in_features, in_features):
        raise FormatError(f"hessian: found shape {list(hessian.shape)}, wanted {[in_features, in_features]}")
    for scheme in schemes:
        if scheme.group_size is not None and in_features % scheme.group_size:
            raise FormatError(
                f"group_size {scheme.group_size} does not divide the {in_features} columns; "
                "choose another group size or keep the module dense"
            )
    if not bool(weight.isfinite().all()):
        raise FormatError(f"weight: found {int((~weight.isfinite()).sum())} NaN or infinite values, wanted none")
    if not bool(hessian.isfinite().all()):
        raise FormatError(
            "hessian: found NaN or infinite values, wanted none; the calibration inputs overflow, run the model in a "
            "wider dtype or use method mse"
        )
    if bool((hessian.diagonal() < 0).any()):
        raise FormatError("hessian: found a negative diagonal, wanted X^T X")


def _join(parts: list[QuantizedWeight]) -> QuantizedWeight:
    """One weight from runs of its rows."""
    zeros = [part.grid.zero_point for part in parts if part.grid.zero_point is not None]
    scale = torch.cat([part.grid.scale for part in parts])
    if not bool(scale.isfinite().all()):
        raise FormatError("scale: found infinite values; store scales in a wider dtype or keep the module dense")
    offsets = [part.grid.offset for part in parts if part.grid.offset is not None]
    grid = Grid(scale, torch.cat(zeros) if zeros else None, torch.cat(offsets) if offsets else None)
    return QuantizedWeight(torch.cat([part.codes for part in parts]), grid, parts[0].scheme)


def _stack(tensors: list[Tensor]) -> Tensor:
    """Join the rows of all schemes: along the last axis."""
    return torch.cat(tensors, dim=-1)
