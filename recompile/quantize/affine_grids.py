"""Affine grids w = q * scale + bias, q = 0 .. 2^b - 1, whose bias is a float of its own (MLX): scales and biases of
every group of weights.

Axes: O = out_features, I = in_features, G = group size, NG = I / G.
The bias is any number of the stored dtype, where an integer zero point is one of 2^b places: with few bits that is a
second parameter to fit. GPTQ and two-sided rounding see such a grid as one with a whole zero point and an offset of at
most half a step (int_grids.Grid), so that all of them round on what a reader decodes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from recompile.errors import FormatError
from recompile.formats.packed_int import IntScheme
from recompile.quantize.int_grids import (
    Grid,
    GridMethod,
    check_weight,
    normalise_importance,
    round_scale,
    rows_per_chunk,
)

# Ranges tried, as fractions of the group's own; few bits gain by clipping, many do not. Each is tried about the middle
# of the group and a step to both sides.
_FRACTIONS_FEW_BITS = (0.4, 0.5, 0.6, 0.68, 0.76, 0.84, 0.92, 1.0)
_FRACTIONS_MANY_BITS = (0.6, 0.76, 0.84, 0.9, 0.95, 1.0, 1.04)
_SHIFTS = (-1.0, -0.5, 0.0, 0.5, 1.0)
_REFITS = 4


@dataclass(frozen=True)
class AffineGrid:
    """scale, bias: [O, NG] float32, both exactly representable in the stored dtype."""

    scale: Tensor
    bias: Tensor

    def as_integers(self, scheme: IntScheme) -> Grid:
        """The same levels by whole zero points and offsets; scheme: asymmetric, of the grid's bits and group size."""
        at = scheme.code_min - self.bias / self.scale  # where w = 0 lies, in signed codes
        zero = at.round().clamp(scheme.code_min, scheme.code_max)
        return Grid(self.scale, zero.to(torch.int8), self.bias - (scheme.code_min - zero) * self.scale)


def fit_affine(
    weight: Tensor,
    bits: int,
    group_size: int,
    method: GridMethod = "mse",
    importance: Tensor | None = None,
    scale_dtype: torch.dtype = torch.bfloat16,
) -> AffineGrid:
    """Choose scale and bias of each group of `weight`.

    weight:      [O, I] float32, finite; I a multiple of the group size
    importance:  [I] float, >= 0, cost of a squared error in each column; None = all equal. Used by "mse" only
    scale_dtype: bfloat16, float16 or float32; scales and biases come back as float32 holding values of that dtype

    "rtn" spans the group: scale (max - min) / (2^b - 1), bias min. "mse" minimises sum of importance * (w - q s - b)^2:
    codes are assigned for a set of ranges, each is scored with the line that fits them best (weighted least squares),
    and the best one is refitted with scale and bias as stored until it settles. Never worse than "rtn".
    A group of equal weights gets scale 1, their value as bias and codes 0.

    Raises FormatError as `fit_grid` does.
    """
    scheme = IntScheme(bits, group_size, symmetric=False)
    check_weight(weight, scheme)
    out_features, in_features = weight.shape
    groups = in_features // group_size
    column_weight = normalise_importance(importance, in_features, weight.device)
    if column_weight is not None:
        column_weight = column_weight.view(groups, group_size, 1).transpose(0, 1)  # [G, NG, 1]
    scale = torch.empty((out_features, groups), dtype=torch.float32, device=weight.device)
    bias = torch.empty_like(scale)
    chunk_rows = rows_per_chunk(in_features, weight.device)
    for start in range(0, out_features, chunk_rows):
        rows = slice(start, start + chunk_rows)
        columns = weight[rows].float().view(-1, groups, group_size).permute(2, 1, 0).contiguous()  # [G, NG, rows]
        found = _fit_columns(columns, column_weight, (1 << bits) - 1, method, scale_dtype)
        scale[rows], bias[rows] = (values.t() for values in found)
    if not bool((scale.isfinite() & bias.isfinite()).all()):
        limit = torch.finfo(scale_dtype).max
        raise FormatError(
            f"weight: found values up to {float(weight.abs().max()):.4g}, whose scale or bias {scale_dtype} (at most "
            f"{limit:.4g}) cannot hold; store scales in a wider dtype or keep the module dense"
        )
    return AffineGrid(scale, bias)


def _fit_columns(
    columns: Tensor, column_weight: Tensor | None, steps: int, method: GridMethod, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """columns: [G, ...] float32; returns scale and bias [...] float32 as stored."""
    low, high = columns.aminmax(dim=0)
    span = high - low
    best = round_scale(span / steps, dtype), low.to(dtype).float()
    if method == "rtn":
        return best
    search = _Lines(columns, column_weight, steps)
    error = search.error_of(*best)
    middle = (low + high) / 2
    found, gain = best, torch.full_like(low, -1.0)
    for fraction in _FRACTIONS_FEW_BITS if steps < 16 else _FRACTIONS_MANY_BITS:
        scale = span * (fraction / steps)
        for shift in _SHIFTS if fraction < 1 else (0.0,):
            slope, start, explained = search.line_of(scale, middle + scale * (shift - steps / 2))
            better = explained > gain
            gain = torch.where(better, explained, gain)
            found = torch.where(better, slope, found[0]), torch.where(better, start, found[1])
    # From here on numbers are as stored, and errors are those of the codes that will be written.
    scale, bias = round_scale(found[0], dtype), found[1].to(dtype).float()
    for refit in range(_REFITS + 1):
        own = search.error_of(scale, bias)
        better = own < error
        error = torch.where(better, own, error)
        best = torch.where(better, scale, best[0]), torch.where(better, bias, best[1])
        if refit < _REFITS:
            slope, _, _ = search.line_of(scale, bias)
            scale = round_scale(slope, dtype)
            bias = search.start_of(scale).to(dtype).float()  # for the slope as stored
    return best


class _Lines:
    """Least-squares lines through the (code, weight) points of groups along the first axis."""

    def __init__(self, columns: Tensor, column_weight: Tensor | None, steps: int) -> None:
        self.columns, self.steps = columns, steps
        share = torch.ones_like(columns[:, :, :1]) if column_weight is None else column_weight
        self.share = share / share.sum(0)  # of the weight of the group; [G, NG, 1]
        self.mean = (columns * self.share).sum(0)
        self.codes = torch.empty_like(columns)
        self.product = torch.empty_like(columns)

    def _assign(self, scale: Tensor, bias: Tensor) -> None:
        inverse = 1 / torch.where(scale.abs() < 1e-30, torch.ones_like(scale), scale)
        torch.sub(self.columns, bias, out=self.codes)
        self.codes.mul_(inverse).round_().clamp_(0, self.steps)

    def line_of(self, scale: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of the codes of a grid: the best slope and start, and the squared error that they explain."""
        self._assign(scale, bias)
        self.code_mean = torch.mul(self.codes, self.share, out=self.product).sum(0)
        self.product.mul_(self.columns - self.mean)
        shared = self.product.sum(0)
        torch.mul(self.codes, self.codes, out=self.product).mul_(self.share)
        spread = self.product.sum(0) - self.code_mean.square()
        slope = torch.where(spread > 1e-6, shared / spread.clamp(min=1e-6), scale)  # all codes equal: any slope
        return slope, self.mean - slope * self.code_mean, torch.where(spread > 1e-6, shared * slope, -1.0)

    def start_of(self, slope: Tensor) -> Tensor:
        """The best start for the codes assigned last and a slope."""
        return self.mean - slope * self.code_mean

    def error_of(self, scale: Tensor, bias: Tensor) -> Tensor:
        """The mean squared error of the nearest codes."""
        self._assign(scale, bias)
        torch.mul(self.codes, scale, out=self.product).add_(bias).sub_(self.columns)
        return self.product.square_().mul_(self.share).sum(0)
