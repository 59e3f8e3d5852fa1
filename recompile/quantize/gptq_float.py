"""GPTQ for grids of small floats and int8: the recursion of `gptq.py` with levels that are not evenly spaced.

Axes: O = out_features (rows), I = in_features (columns), R = rows of all grids stacked. The grids are fixed before the
first column is rounded, and columns are rounded by decreasing Hessian diagonal; see `gptq.py` for the formula.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from recompile.quantize.float_grids import LevelGrid
from recompile.quantize.gptq import check_inputs, factor_hessian

_BLOCK_COLUMNS = 128  # columns between two products with all errors so far
_RUN_COLUMNS = 32  # columns between two products with the errors of the block
_STACK_WEIGHTS = 1 << 25


def round_gptq(weight: Tensor, hessian: Tensor, grids: Sequence[LevelGrid], damping: float = 0.01) -> list[Tensor]:
    """Levels [O, I] float32 of one weight on every grid, each column making up for the errors of those before it.

    weight:  [O, I] float, finite; may hold rows of several matrices that read the same input
    hessian: [I, I] float, X^T X of the inputs

    Raises FormatError for shapes that do not fit or a Hessian that is not positive semidefinite.
    """
    check_inputs(weight, hessian, ())
    if not grids:
        return []
    diagonal = hessian.diagonal().double() if hessian.device.type != "mps" else hessian.diagonal()
    order = torch.argsort(diagonal, descending=True, stable=True)
    unit_upper = factor_hessian(hessian, order, damping)
    rows = max(1, _STACK_WEIGHTS // (weight.shape[1] * len(grids)))
    found: list[list[Tensor]] = [[] for _ in grids]
    for start in range(0, len(weight), rows):
        part = slice(start, start + rows)
        factors = [grid.factor[part] for grid in grids]
        for number, levels in enumerate(_round_rows(weight[part].float(), unit_upper, order, grids, factors)):
            found[number].append(levels)
    return [torch.cat(parts) for parts in found]


def _round_rows(
    weight: Tensor, unit_upper: Tensor, order: Tensor, grids: Sequence[LevelGrid], factors: Sequence[Tensor]
) -> list[Tensor]:
    out_features, in_features = weight.shape
    original = weight.t()[order].repeat(1, len(grids))  # [I, R], in the order of rounding
    factor = torch.cat([f.t()[order // grid.columns] for grid, f in zip(grids, factors, strict=True)], 1)  # [I, R]
    places = [slice(n * out_features, (n + 1) * out_features) for n in range(len(grids))]
    error = torch.zeros_like(original)  # of the weights themselves; columns still to come are 0
    levels = torch.empty_like(original)
    for block_start in range(0, in_features, _BLOCK_COLUMNS):
        block = slice(block_start, min(block_start + _BLOCK_COLUMNS, in_features))
        block_target = torch.addmm(original[block], unit_upper[: block.start, block].t(), error[: block.start])
        for start in range(block.start, block.stop, _RUN_COLUMNS):
            stop = min(start + _RUN_COLUMNS, block.stop)
            done = slice(block.start, start)
            target = torch.addmm(
                block_target[start - block.start : stop - block.start],
                unit_upper[done, start:stop].t(),
                error[done],
            )
            for column in range(start, stop):
                wanted = target[column - start]
                if column > start:
                    wanted = torch.addmv(wanted, error[start:column].t(), unit_upper[start:column, column])
                scaled = wanted / factor[column]
                for grid, place in zip(grids, places, strict=True):
                    levels[column, place] = grid.levels.round(scaled[place])
                torch.addcmul(original[column], levels[column], factor[column], value=-1, out=error[column])
    back = torch.empty_like(levels).index_copy_(0, order, levels)
    return [back[:, place].t().contiguous() for place in places]
