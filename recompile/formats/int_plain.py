"""compressed-tensors `int-quantized` and `naive-quantized` integers: one int8 per weight.

Axes: O = out_features, I = in_features. A module stores

    weight             int8 [O, I]
    weight_scale       float, one per tensor [1], row [O, 1], group of G columns [O, ceil(I/G)], or block
    weight_zero_point  int8, the shape of the scale; asymmetric only

and means W[o, i] = (q[o, i] - z) * s, with the scale and zero point of the weight's place. Field names and the stored
form are those of the compressed-tensors library (0.20).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recompile.errors import FormatError
from recompile.formats.checks import check_matrix, get_part
from recompile.formats.scale_grid import ScaleGrid, check_scale, read_bits, read_grid, read_symmetric, scale_codes


@dataclass(frozen=True)
class PlainIntScheme:
    """bits: 1..8, stored in 8 each; grid: which weights share a scale; symmetric: no zero point."""

    bits: int
    grid: ScaleGrid
    symmetric: bool


def read_scheme(weights: Mapping[str, Any]) -> PlainIntScheme:
    """From the `weights` entry of a config group. Raises FormatError for what unpacked integers do not have."""
    return PlainIntScheme(read_bits(weights, "int", range(1, 9)), read_grid(weights), read_symmetric(weights))


def dequantize(parts: Mapping[str, Tensor], scheme: PlainIntScheme, module: str = "tensor") -> Tensor:
    """The dense weight [O, I] float32 of a module, computed in float32 as (q - z) * s.

    Raises FormatError, naming `{module}.{part}`, for parts that are missing, do not fit each other or the scheme, or
    hold a scale that is not finite or a code outside the scheme's bits.
    """
    codes = get_part(parts, module, "weight", (torch.int8,))
    shape = check_matrix(codes, f"{module}.weight")
    half = 1 << (scheme.bits - 1)
    if scheme.bits < 8:
        low, high = (int(value) for value in codes.aminmax())
        if low < -half or high >= half:
            raise FormatError(
                f"{module}.weight: found codes {low} to {high}, wanted {-half} to {half - 1} for {scheme.bits} bits"
            )
    if "weight_scale" not in parts:
        raise FormatError(f"{module}.weight_scale: not found, wanted beside an int8 weight")
    scale = check_scale(parts["weight_scale"], f"{module}.weight_scale", scheme.grid, shape)
    zero_point = parts.get("weight_zero_point")
    if zero_point is None:
        if not scheme.symmetric:
            raise FormatError(f"{module}.weight_zero_point: not found, wanted for asymmetric weights")
        return scale_codes(codes, scale, scheme.grid)
    if zero_point.is_floating_point() or zero_point.dtype == torch.bool or zero_point.is_complex():
        raise FormatError(f"{module}.weight_zero_point: found {zero_point.dtype}, wanted torch.int8")
    if scheme.symmetric and bool((zero_point != 0).any()):
        raise FormatError(
            f"{module}.weight_zero_point: found values other than 0, wanted none: the config is symmetric"
        )
    zero_point = scheme.grid.check(zero_point, f"{module}.weight_zero_point", shape)
    return scale_codes(codes, scale, scheme.grid, zero_point)
