"""Scales and zero points of integer grids: where the levels of each group of weights lie.

Axes: O = out_features, I = in_features, G = group size, NG = I / G (1 for channel scales).
A grid represents w by (q - z) * s with a whole q in [code_min, code_max], a whole z in the same range (0 when
symmetric) and a scale s that is already rounded to the dtype it is stored in. Formats that store where the levels begin
as a float add an offset (affine_grids.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from recompile.errors import FormatError
from recompile.formats.packed_int import SCALE_DTYPES, IntScheme

GridMethod = Literal["rtn", "mse"]

# Candidate ranges, as fractions of the group's own range. Few bits clip more: a wide choice matters at 2 and 3 bits,
# while at 6 bits the best range is nearly the whole one. A range may also exceed the group's, since the outermost
# weight need not sit exactly on the outermost level. Twice as many candidates lower the error by 0 to 2 %.
_FRACTIONS_FEW_BITS = (0.35, 0.475, 0.575, 0.65, 0.72, 0.79, 0.86, 0.93, 1.0, 1.1)
_FRACTIONS_MANY_BITS = (0.45, 0.6, 0.72, 0.81, 0.87, 0.92, 0.96, 0.99, 1.02, 1.07)
_REFITS = 3  # rounds of (least-squares scale, reassigned codes) for the best candidate; a fourth gains 0.1 % at most
_CPU_CHUNK_WEIGHTS = 1 << 18  # 1 MiB as float32: small enough for the caches, big enough to hide a torch call
_DEVICE_CHUNK_WEIGHTS = 1 << 24


@dataclass(frozen=True)
class Grid:
    """The levels of every group of one weight; equality is identity, as for tensors."""

    scale: Tensor  # [O, NG] float32, exactly representable in the stored dtype; may be negative when symmetric
    zero_point: Tensor | None  # [O, NG] int8 in [code_min, code_max]; None when symmetric
    offset: Tensor | None = None  # [O, NG] float32, added to every level; None = 0

    def rows(self, rows: slice) -> Grid:
        """Of some rows of the weight, as views."""
        zero, offset = (None if t is None else t[rows] for t in (self.zero_point, self.offset))
        return Grid(self.scale[rows], zero, offset)

    def without_offset(self, weight: Tensor) -> Tensor:
        """weight [O, I] float32 less its offsets: what levels that start at a whole zero point are to represent."""
        if self.offset is None:
            return weight
        return (weight.unflatten(1, (self.offset.shape[1], -1)) - self.offset[:, :, None]).flatten(1)


def fit_grid(
    weight: Tensor,
    scheme: IntScheme,
    method: GridMethod = "mse",
    importance: Tensor | None = None,
    scale_dtype: torch.dtype = torch.bfloat16,
) -> Grid:
    """Choose scale and zero point of each group of `weight`.

    weight:      [O, I] float32, finite; I a multiple of the group size
    importance:  [I] float, >= 0, cost of a squared error in each column (a Hessian diagonal); None = all equal.
                 Columns far below the mean are raised to 1e-6 of it, so that a group of dead inputs still has a grid.
                 Used by "mse" only.
    scale_dtype: bfloat16, float16 or float32; the scales come back as float32 holding values of that dtype

    "rtn" spans the range of the group, as the compressed-tensors library's encoders do: max|w| / ((2^b - 1)/2) when
    symmetric, else (max - min) / (2^b - 1) with the range widened to 0 and z = code_min - min/s rounded.
    "mse" minimises the sum of importance * (w - (q - z) s)^2: codes are assigned for a set of candidate ranges and zero
    points, each is scored with its least-squares scale sum(h w p) / sum(h p^2), p = q - z, and the best one is refitted
    until it settles (linear regression with a fixed zero point, llama.cpp issue #397). Never worse than "rtn".
    A symmetric scale is negative where the one extra negative level then serves the longer tail.
    A group of zeros gets scale 1 and codes that decode to 0.

    Raises FormatError for a weight that is not finite, a group size that does not divide the row, an importance of
    another shape, negative or not finite, or scales that `scale_dtype` cannot hold.
    """
    check_weight(weight, scheme)
    if method not in ("rtn", "mse"):
        raise FormatError(f"method: found {method!r}, wanted 'rtn' or 'mse'")
    if scale_dtype not in SCALE_DTYPES:
        raise FormatError(f"scale_dtype: found {scale_dtype}, wanted one of {[str(dtype) for dtype in SCALE_DTYPES]}")
    out_features, in_features = weight.shape
    groups = scheme.count_groups(in_features)
    group_size = in_features // groups
    column_weight = normalise_importance(importance, in_features, weight.device)
    if column_weight is not None:
        column_weight = column_weight.view(groups, group_size, 1).transpose(0, 1)  # [G, NG, 1]

    scale = torch.empty((out_features, groups), dtype=torch.float32, device=weight.device)
    zero = None if scheme.symmetric else torch.empty_like(scale)
    chunk_rows = rows_per_chunk(in_features, weight.device)
    for start in range(0, out_features, chunk_rows):
        rows = slice(start, start + chunk_rows)
        # Groups run down the first axis: every pass then goes along long rows, and sums over a group are vector adds.
        columns = weight[rows].float().view(-1, groups, group_size).permute(2, 1, 0).contiguous()  # [G, NG, rows]
        chunk_scale, chunk_zero = fit_columns(columns, column_weight, scheme, method, scale_dtype)
        scale[rows] = chunk_scale.t()
        if zero is not None and chunk_zero is not None:
            zero[rows] = chunk_zero.t()
    if not bool(scale.isfinite().all()):
        limit = torch.finfo(scale_dtype).max
        raise FormatError(
            f"weight: found values up to {float(weight.abs().max()):.4g}, whose scale {scale_dtype} (at most "
            f"{limit:.4g}) cannot hold; store scales in a wider dtype or keep the module dense"
        )
    return Grid(scale, None if zero is None else (zero + scheme.code_min).to(torch.int8))


def quantize_to_grid(weight: Tensor, grid: Grid, scheme: IntScheme) -> Tensor:
    """The nearest code of every weight: clamp(round((w - offset) / s) + z).

    weight:  [O, I] float32, finite
    returns: [O, I] int8, signed codes in [code_min, code_max]
    """
    out_features, in_features = weight.shape
    groups = grid.scale.shape[1]
    codes = torch.empty((out_features, in_features), dtype=torch.int8, device=weight.device)
    chunk_rows = rows_per_chunk(in_features, weight.device)
    for start in range(0, out_features, chunk_rows):
        rows = slice(start, start + chunk_rows)
        levels = grid.rows(rows).without_offset(weight[rows].float()).view(-1, groups, in_features // groups)
        levels = levels / grid.scale[rows, :, None]
        levels.round_()
        if grid.zero_point is not None:
            levels += grid.zero_point[rows, :, None]
        codes[rows] = levels.clamp_(scheme.code_min, scheme.code_max).view(-1, in_features)
    return codes


def dequantize_codes(codes: Tensor, grid: Grid, scheme: IntScheme) -> Tensor:
    """The weights that codes stand for, (q - z) * s + offset computed in float32.

    codes:   [O, I] int8 in [code_min, code_max]
    returns: [O, I] float32, the same values that a reader of the stored form gets
    """
    groups = scheme.count_groups(codes.shape[1])
    levels = codes.float().view(codes.shape[0], groups, -1)  # [O, NG, G]
    if grid.zero_point is not None:
        levels -= grid.zero_point[:, :, None]
    levels *= grid.scale[:, :, None]
    if grid.offset is not None:
        levels += grid.offset[:, :, None]
    return levels.view(codes.shape)


def round_to_grid(
    weight: Tensor, scheme: IntScheme, method: GridMethod, importance: Tensor | None, scale_dtype: torch.dtype
) -> Tensor:
    """What a weight decodes to once it is stored on its fitted grid, float32 [O, I], without storing it; all as
    `fit_grid` has it."""
    grid = fit_grid(weight, scheme, method, importance, scale_dtype)
    return dequantize_codes(quantize_to_grid(weight, grid, scheme), grid, scheme)


def fit_columns(
    columns: Tensor, column_weight: Tensor | None, scheme: IntScheme, method: GridMethod, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """`fit_grid` for weights that are already laid out with each group along the first axis, unchecked.

    columns:       [G, ...] float32, contiguous for speed
    column_weight: float32 that broadcasts to `columns`, > 0; None = all equal
    returns:       scale [...] float32 as stored (infinite where `scale_dtype` cannot hold it), and the zero point [...]
                   counted from the lowest code (float32, whole, 0 .. 2^b - 1), None when symmetric
    """
    low, high = columns.aminmax(dim=0)
    if not scheme.symmetric:
        low, high = low.clamp_(max=0), high.clamp_(min=0)
    steps = (1 << scheme.bits) - 1
    if scheme.symmetric:
        span_scale = round_scale(torch.maximum(-low, high) / (steps / 2), scale_dtype)
        span_zero = torch.full_like(span_scale, 1 << (scheme.bits - 1))
    else:
        span_scale = round_scale((high - low) / steps, scale_dtype)
        span_zero = (-low / span_scale).round_().clamp_(0, steps)
    if method == "rtn":
        return span_scale, None if scheme.symmetric else span_zero

    search = _Search(columns, column_weight, scheme)
    fractions = _FRACTIONS_FEW_BITS if scheme.bits <= 3 else _FRACTIONS_MANY_BITS
    if scheme.symmetric:
        # The longer tail gets the longer side, -2^(b-1), by the sign of the scale; the other sign is tried as well.
        full_scale = torch.where(-low >= high, -low, -high) / (1 << (scheme.bits - 1))
        for fraction in fractions:
            search.score(full_scale * fraction, span_zero)
            search.score(full_scale * -fraction, span_zero)
    else:
        # Clipping shortens both tails alike, about the middle of the range; the neighbours clip one tail more.
        middle = (high + low) / 2
        for fraction in fractions:
            scale = (high - low) * (fraction / steps)
            middle_zero = steps / 2 - middle / _nonzero(scale)
            for shift in (-1, 0, 1):
                search.score(scale, (middle_zero + shift).round_().clamp_(0, steps))

    # From here on scales are as stored, and errors are those of the codes that will be written.
    scale, zero = round_scale(search.best_scale, scale_dtype), search.best_zero
    search.start_final(span_scale, span_zero)
    for refit in range(_REFITS + 1):
        regression = search.try_final(scale, zero)
        if refit < _REFITS:
            scale = round_scale(regression, scale_dtype)
    return search.final_scale, None if scheme.symmetric else search.final_zero


class _Search:
    """Scores grids for [G, ...] weights; keeps the best scale and unsigned zero point of each group so far."""

    def __init__(self, columns: Tensor, column_weight: Tensor | None, scheme: IntScheme) -> None:
        self.columns = columns
        self.column_weight = column_weight
        self.weighted = columns if column_weight is None else columns * column_weight  # h w
        self.steps = (1 << scheme.bits) - 1
        self.middle = 1 << (scheme.bits - 1) if scheme.symmetric else None  # the zero point of every group
        self.levels = torch.empty_like(columns)  # p = q - z
        self.product = torch.empty_like(columns)
        self.best_gain = torch.full(columns.shape[1:], -1.0, device=columns.device)
        self.best_scale = torch.ones_like(self.best_gain)
        self.best_zero = torch.zeros_like(self.best_gain)

    def score(self, scale: Tensor, zero: Tensor) -> None:
        """Assign codes on (scale, zero); keep the least-squares scale of those codes if it is the best so far.

        With p fixed the least squared error is sum(h w^2) - sum(h w p)^2 / sum(h p^2): the last term is the gain.
        """
        fitted, moment = self._regress(scale, zero)
        gain = moment.mul_(fitted)
        better = gain > self.best_gain
        self.best_gain = torch.where(better, gain, self.best_gain)
        self.best_scale = torch.where(better, fitted, self.best_scale)
        self.best_zero = torch.where(better, zero, self.best_zero)

    def start_final(self, scale: Tensor, zero: Tensor) -> None:
        """Begin the exact comparison with a grid whose scale is already as stored."""
        self._assign(scale, zero)
        self.final_error = self._measure_error(scale)
        self.final_scale, self.final_zero = scale, zero

    def try_final(self, scale: Tensor, zero: Tensor) -> Tensor:
        """Keep this stored grid if its true error is the least so far; the least-squares scale of its codes."""
        regression, _ = self._regress(scale, zero)
        error = self._measure_error(scale)
        better = error < self.final_error
        self.final_error = torch.where(better, error, self.final_error)
        self.final_scale = torch.where(better, scale, self.final_scale)
        self.final_zero = torch.where(better, zero, self.final_zero)
        return regression

    def _assign(self, scale: Tensor, zero: Tensor) -> None:
        torch.mul(self.columns, 1 / _nonzero(scale), out=self.levels)
        self.levels.round_()
        if self.middle is not None:  # numbers take half the time of tensors
            self.levels.clamp_(-self.middle, self.steps - self.middle)
        else:
            torch.clamp(self.levels, -zero, self.steps - zero, out=self.levels)

    def _regress(self, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
        """Least-squares scale for the codes of (scale, zero), and sum(h w p)."""
        self._assign(scale, zero)
        moment = torch.mul(self.weighted, self.levels, out=self.product).sum(0)
        torch.mul(self.levels, self.levels, out=self.product)
        if self.column_weight is not None:
            self.product *= self.column_weight
        return moment / self.product.sum(0).clamp_(min=1e-30), moment

    def _measure_error(self, scale: Tensor) -> Tensor:
        """sum(h (w - p s)^2) of the codes assigned last."""
        torch.addcmul(self.columns, self.levels, scale, value=-1, out=self.product)
        self.product *= self.product
        if self.column_weight is not None:
            self.product *= self.column_weight
        return self.product.sum(0)


def round_scale(scale: Tensor, scale_dtype: torch.dtype) -> Tensor:
    """Round to the stored dtype, back in float32, any shape; what becomes 0 is 1, whose codes are all zero or nearly
    so."""
    rounded = scale.to(scale_dtype).float()
    return torch.where(rounded == 0, torch.ones_like(rounded), rounded)


def _nonzero(scale: Tensor) -> Tensor:
    return torch.where(scale.abs() < 1e-30, torch.ones_like(scale), scale)


def rows_per_chunk(in_features: int, device: torch.device) -> int:
    """Rows of a weight that are searched at a time, so that temporaries stay small."""
    return max(1, (_CPU_CHUNK_WEIGHTS if device.type == "cpu" else _DEVICE_CHUNK_WEIGHTS) // in_features)


def check_weight(weight: Tensor, scheme: IntScheme) -> None:
    """weight: [out, in]. Raises FormatError for another shape, a group size that does not divide, NaN or infinity."""
    if weight.ndim != 2 or 0 in weight.shape:
        raise FormatError(f"weight: found shape {list(weight.shape)}, wanted [out, in]")
    if scheme.group_size is not None and weight.shape[1] % scheme.group_size:
        raise FormatError(
            f"group_size {scheme.group_size} does not divide the {weight.shape[1]} columns; "
            "choose another group size or keep the module dense"
        )
    if not bool(weight.isfinite().all()):
        raise FormatError(f"weight: found {int((~weight.isfinite()).sum())} NaN or infinite values, wanted none")


def normalise_importance(importance: Tensor | None, in_features: int, device: torch.device) -> Tensor | None:
    """[I] float32 with mean about 1 and no zeros, or None when every column counts the same."""
    if importance is None:
        return None
    if tuple(importance.shape) != (in_features,):
        raise FormatError(f"importance: found shape {list(importance.shape)}, wanted [{in_features}]")
    if not bool((importance.isfinite() & (importance >= 0)).all()):
        raise FormatError("importance: found negative, NaN or infinite values, wanted finite ones >= 0")
    importance = importance.to(device=device, dtype=torch.float64)
    mean = importance.mean()
    relative = torch.where(mean > 0, importance / mean, torch.ones_like(importance))
    return relative.clamp_(min=1e-6).float()
