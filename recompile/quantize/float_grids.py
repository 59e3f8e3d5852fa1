"""Grids of the formats that are not packed integers: 8-bit floats, int8, nvfp4 and the MX formats.

Axes: O = out_features, I = in_features, C = columns that share a factor, NG = ceil(I / C). A grid represents a weight
by level * factor: levels are the numbers of a small float (or integer) type, factors come from the stored scales. All
factors are computed from scales already rounded to the type that they are stored in, so that what is scored is what a
reader gets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from recompile.errors import FormatError
from recompile.formats import FORMATS, fp4, mx
from recompile.formats.fp4 import round_e2m1, round_small_float
from recompile.formats.fp8 import E4M3_MAX, round_e4m3
from recompile.formats.schemes import Scheme

E2M1_MAX, E2M3_MAX = 6.0, 7.5
SMALLEST_NVFP4_SCALE = 0.125  # in place of 0; a group of zeros has it
# Scales tried by "mse", as multiples of the one that the largest weight asks for. A small float loses little where the
# largest weight is clipped, and next to nothing where it is not.
_FRACTIONS = (1.0, 1.08, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.62, 0.55)
_EXPONENT_STEPS = (0, 1, -1)  # MX scales are powers of two
_CHUNK_WEIGHTS = 1 << 20


def round_e2m3(values: Tensor) -> Tensor:
    """The nearest E2M3 level of every value, ties to even; any shape, float."""
    return round_small_float(values, 3, 0, E2M3_MAX)


def round_int8(values: Tensor) -> Tensor:
    """The nearest integer in -128 .. 127 of every value, ties to even; any shape, float."""
    return values.round().clamp_(-128, 127)


@dataclass(frozen=True)
class Levels:
    """A type of levels. largest: what the largest weight of a scale is mapped to when nothing is clipped; codes: levels
    [O, I] as they are stored."""

    round: Callable[[Tensor], Tensor]
    largest: float
    codes: Callable[[Tensor], Tensor]


E2M1 = Levels(round_e2m1, E2M1_MAX, fp4.pack_e2m1)
E2M3 = Levels(round_e2m3, E2M3_MAX, mx.pack_e2m3)
E4M3 = Levels(round_e4m3, E4M3_MAX, lambda levels: levels.to(torch.float8_e4m3fn))
INT8 = Levels(round_int8, 127.5, lambda levels: levels.to(torch.int8))

# As the rows of formats call them.
LEVELS: Mapping[str, Levels] = {"int8": INT8, "e4m3": E4M3, "e2m1": E2M1, "e2m3": E2M3}


def levels_of(scheme: Scheme) -> Levels:
    """The small floats (or int8) that the codes of a scheme stand for."""
    name = FORMATS[scheme.format].levels
    assert name is not None, f"{scheme.name}: integers have grids of their own"
    return LEVELS[name]


@dataclass(frozen=True)
class LevelGrid:
    """The grid of one weight.

    factor:  [O, NG] float32
    columns: C
    scales:  the stored scale parts, by name
    """

    scheme: Scheme
    factor: Tensor
    columns: int
    scales: Mapping[str, Tensor]

    @property
    def levels(self) -> Levels:
        return levels_of(self.scheme)

    def spread(self, in_features: int) -> Tensor:
        """The factor of every weight, [O, I]."""
        return self.factor.repeat_interleave(self.columns, 1)[:, :in_features]

    def round(self, weight: Tensor) -> Tensor:
        """The nearest level of every weight; [O, I] -> [O, I] float32."""
        levels = torch.empty_like(weight, dtype=torch.float32)
        rows = max(1, _CHUNK_WEIGHTS // weight.shape[1])
        for start in range(0, len(weight), rows):
            part = slice(start, start + rows)
            factor = self.factor[part].repeat_interleave(self.columns, 1)[:, : weight.shape[1]]
            levels[part] = self.levels.round(weight[part].float() / factor)
        return levels

    def pack(self, levels: Tensor) -> dict[str, Tensor]:
        """The stored parts of levels [O, I]."""
        part, _ = FORMATS[self.scheme.format].marks
        return {part: self.levels.codes(levels), **self.scales}


def global_scale(weights: Sequence[Tensor]) -> Tensor:
    """nvfp4's scale of a set of weights that engines fuse: 448 * 6 / max|w|, float32 [1]; it divides."""
    largest = torch.stack([weight.float().abs().max() for weight in weights]).max()
    return torch.where(largest > 0, E4M3_MAX * E2M1_MAX / largest, torch.ones_like(largest)).reshape(1)


def fit_levels(
    weight: Tensor,
    scheme: Scheme,
    method: str = "mse",
    column_weight: Tensor | None = None,
    scale_dtype: torch.dtype = torch.bfloat16,
    whole: Tensor | None = None,
    smallest: float = SMALLEST_NVFP4_SCALE,
) -> LevelGrid:
    """Choose the scales of one weight.

    weight:        [O, I] float, finite
    method:        "rtn": the scale that the largest weight asks for, as the compressed-tensors library computes it;
                   "mse": of several scales around it the one with the least sum of column_weight * (w - level*factor)^2
    column_weight: [I] float32, None = all equal; used by "mse" only
    scale_dtype:   of the scales of int8 and fp8 formats; the others have their own
    whole:         nvfp4: the global scale [1] to use, None = of this weight alone
    smallest:      nvfp4: the stored scale in place of 0

    Raises FormatError for weights that are not finite or do not fit the scheme.
    """
    if not bool(weight.isfinite().all()):
        raise FormatError(f"weight: found {int((~weight.isfinite()).sum())} NaN or infinite values, wanted none")
    why = scheme.why_not((weight.shape[0], weight.shape[1]))
    if why is not None:
        raise FormatError(f"{scheme.name}: {why}")
    weight = weight.float()
    if scheme.has_global_scale:
        whole = global_scale([weight]) if whole is None else whole
        return _fit_nvfp4(weight, scheme, method, column_weight, whole, smallest)
    if scheme.format.startswith("mxfp"):
        return _fit_mx(weight, scheme, method, column_weight)
    return _fit_plain(weight, scheme, method, column_weight, scale_dtype)


def _best(
    grids: Sequence[LevelGrid], weight: Tensor, column_weight: Tensor | None, reduce: Callable[[Tensor], Tensor]
) -> Tensor:
    """For every scale, the index of the grid with the least error. `reduce` adds up errors [O, NG] that share one."""
    errors = []
    for grid in grids:
        error = weight - grid.round(weight) * grid.spread(weight.shape[1])
        error = error.square_()
        if column_weight is not None:
            error *= column_weight
        pad = grid.factor.shape[1] * grid.columns - weight.shape[1]
        error = torch.nn.functional.pad(error, (0, pad)).unflatten(1, (-1, grid.columns)).sum(2)  # [O, NG]
        errors.append(reduce(error))
    return torch.stack(errors).argmin(0)


def _fit_plain(
    weight: Tensor, scheme: Scheme, method: str, column_weight: Tensor | None, scale_dtype: torch.dtype
) -> LevelGrid:
    """int8 and fp8: one scale a tensor, a row, or a block."""
    out_features, in_features = weight.shape
    strategy = scheme.weights["strategy"]
    rows, columns = {"tensor": (out_features, in_features), "channel": (1, in_features)}.get(strategy, (0, 0))
    if strategy == "block":
        rows, columns = scheme.weights["block_structure"]

    def over_rows(values: Tensor, how: Callable[..., Tensor]) -> Tensor:
        pad = -len(values) % rows
        return how(torch.nn.functional.pad(values, (0, 0, 0, pad)).unflatten(0, (-1, rows)), 1)

    pad = -in_features % columns
    groups = torch.nn.functional.pad(weight.abs(), (0, pad)).unflatten(1, (-1, columns)).amax(2)  # [O, NG]
    largest = over_rows(groups, torch.amax)  # [scale rows, NG]
    smallest = torch.finfo(scale_dtype).tiny

    def grid(fraction: float) -> LevelGrid:
        exact = largest / levels_of(scheme).largest * fraction
        scale = torch.where(largest > 0, exact, torch.ones_like(exact)).clamp_(min=smallest).to(scale_dtype)
        return with_scale(scale)

    def with_scale(scale: Tensor) -> LevelGrid:
        if not bool(scale.isfinite().all()):
            raise FormatError(f"scale: {scale_dtype} cannot hold it; store scales in a wider dtype")
        factor = scale.float().repeat_interleave(rows, 0)[:out_features]
        stored = scale.reshape(1) if strategy == "tensor" else scale
        return LevelGrid(scheme, factor, columns, {"weight_scale": stored.contiguous()})

    if method == "rtn":
        return grid(1.0)
    grids = [grid(fraction) for fraction in _FRACTIONS]
    chosen = _best(grids, weight, column_weight, lambda error: over_rows(error, torch.sum))
    scales = torch.stack([g.scales["weight_scale"].reshape(largest.shape) for g in grids])
    return with_scale(scales.gather(0, chosen[None])[0])


def _fit_nvfp4(
    weight: Tensor, scheme: Scheme, method: str, column_weight: Tensor | None, whole: Tensor, smallest: float
) -> LevelGrid:
    largest = weight.abs().unflatten(1, (-1, fp4.GROUP_SIZE)).amax(2)  # [O, NG]

    def with_scale(scale: Tensor) -> LevelGrid:
        parts = {"weight_scale": scale, "weight_global_scale": whole.float().reshape(1).clone()}
        return LevelGrid(scheme, scale.float() / whole.float(), fp4.GROUP_SIZE, parts)

    def grid(fraction: float) -> LevelGrid:
        scale = round_e4m3(largest * (whole * (fraction / E2M1_MAX)))
        return with_scale(torch.where(scale > 0, scale, smallest).to(torch.float8_e4m3fn))

    if method == "rtn":
        return grid(1.0)
    grids = [grid(fraction) for fraction in _FRACTIONS]
    chosen = _best(grids, weight, column_weight, lambda error: error)
    scales = torch.stack([g.scales["weight_scale"].view(torch.uint8) for g in grids])
    return with_scale(scales.gather(0, chosen[None])[0].view(torch.float8_e4m3fn))


def _fit_mx(weight: Tensor, scheme: Scheme, method: str, column_weight: Tensor | None) -> LevelGrid:
    largest = weight.abs().unflatten(1, (-1, mx.GROUP_SIZE)).amax(2)  # [O, NG]
    exponent = mx.shared_exponent(largest, scheme.bits)

    def with_exponent(found: Tensor) -> LevelGrid:
        stored = (found + mx.SCALE_BIAS).clamp(0, 254).to(torch.uint8)
        factor = torch.exp2(stored.double() - mx.SCALE_BIAS).float()
        return LevelGrid(scheme, factor, mx.GROUP_SIZE, {"weight_scale": stored})

    if method == "rtn":
        return with_exponent(exponent)
    grids = [with_exponent(exponent + more) for more in _EXPONENT_STEPS]
    chosen = _best(grids, weight, column_weight, lambda error: error)
    return with_exponent(exponent + torch.tensor(_EXPONENT_STEPS, device=weight.device)[chosen])
