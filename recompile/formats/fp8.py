"""8-bit floats, one per weight: compressed-tensors `float-quantized`, `naive-quantized`, DeepSeek-style fp8, ModelOpt.

Axes: O = out_features, I = in_features. A module stores

    weight        float8_e4m3fn (or e5m2) [O, I]
    weight_scale  float, one per tensor [1], row [O, 1], group, or block [ceil(O/bh), ceil(I/bw)]

and means W[o, i] = float(q[o, i]) * s, with the scale of the weight's place; blocks at the edges may be partial.
DeepSeek-style files call the scale `weight_scale_inv`; it is a multiplier all the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recompile.errors import FormatError
from recompile.formats.checks import check_finite, check_matrix, get_part
from recompile.formats.scale_grid import (
    CHANNEL,
    TENSOR,
    ScaleGrid,
    block_grid,
    check_scale,
    read_bits,
    read_grid,
    read_symmetric,
    scale_codes,
)
from recompile.formats.stored import Described, StoredModule

FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
E4M3_MAX = 448.0


def round_e4m3(values: Tensor) -> Tensor:
    """The nearest 8-bit float (4 exponent, 3 mantissa bits), ties to even, beyond 448 that; any shape, same dtype."""
    return values.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).to(values.dtype)


@dataclass(frozen=True)
class Fp8Scheme:
    """grid: which weights share a scale; scale_part: the name under which it is stored."""

    grid: ScaleGrid
    scale_part: str = "weight_scale"


def read_scheme(weights: Mapping[str, Any]) -> Fp8Scheme:
    """From the `weights` entry of a compressed-tensors config group. Raises FormatError for what fp8 does not have."""
    read_bits(weights, "float", (8,))
    if not read_symmetric(weights):
        raise FormatError("weights.symmetric: found false, wanted true: 8-bit floats have no zero point")
    return Fp8Scheme(read_grid(weights))


def scheme_of(checkpoint: Described, module: StoredModule) -> Fp8Scheme:
    """For configs without groups (`quant_method` fp8, fbgemm_fp8, modelopt): `weight_block_size` if the scale is a
    matrix of blocks, else what the shape of the scale says. Raises FormatError where neither does."""
    part = "weight_scale_inv" if "weight_scale_inv" in module.parts else "weight_scale"
    if part not in module.parts:
        raise FormatError(f"{checkpoint.label}: {module.name}.{part}: not found, wanted beside an 8-bit float weight")
    shape, out_features = module.parts[part].shape, module.parts["weight"].shape[0]
    block = checkpoint.quantization_config.get("weight_block_size")
    if block is not None and len(shape) == 2:
        return Fp8Scheme(block_grid(block, f"{checkpoint.label}: weight_block_size"), part)
    if module.parts[part].numel == 1:
        return Fp8Scheme(TENSOR, part)
    if shape in ((out_features,), (out_features, 1)):
        return Fp8Scheme(CHANNEL, part)
    raise FormatError(
        f"{checkpoint.label}: {module.name}.{part}: found shape {list(shape)}, wanted one scale, one a row, or a "
        f"weight_block_size in config.json"
    )


def dequantize(parts: Mapping[str, Tensor], scheme: Fp8Scheme, module: str = "tensor") -> Tensor:
    """The dense weight [O, I] float32 of a module, computed in float32 as q * s.

    Raises FormatError, naming `{module}.{part}`, for parts that are missing or do not fit each other or the scheme, and
    for weights or scales that are not finite.
    """
    codes = get_part(parts, module, "weight", FP8_DTYPES)
    shape = check_matrix(codes, f"{module}.weight")
    name = f"{module}.{scheme.scale_part}"
    if scheme.scale_part not in parts:
        raise FormatError(f"{name}: not found, wanted beside an 8-bit float weight")
    stored = parts[scheme.scale_part]
    stored = stored.float() if stored.dtype == torch.float8_e8m0fnu else stored  # powers of two, DeepSeek's ue8m0
    scale = check_scale(stored, name, scheme.grid, shape)
    zero_point = parts.get("weight_zero_point")  # old writers stored zeros
    if zero_point is not None and bool((zero_point.float() != 0).any()):
        raise FormatError(f"{module}.weight_zero_point: found values other than 0, wanted none with 8-bit floats")
    dense = scale_codes(codes, scale, scheme.grid)
    check_finite(dense, f"{module}.weight")
    return dense
