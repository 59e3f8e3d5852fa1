"""MLX quantized weights, as mlx-lm writes and loads them: affine integers, mxfp4, mxfp8 and nvfp4.

Axes: O = out_features, I = in_features, G = group_size columns that share a scale. A module stores

    weight   uint32 [O, I*bits/32]    codes, a little-endian bit stream along I: code i starts at bit i*bits of its row
    scales   affine: float [O, I/G]; mxfp4, mxfp8: uint8, E8M0; nvfp4: uint8, E4M3
    biases   affine only: float [O, I/G]

    mode     bits, G                         W[o, i], g = i // G
    affine   2, 3, 4, 5, 6, 8; 32, 64, 128   q * scales[o, g] + biases[o, g]
    mxfp4    4, 32                           e2m1(q) * 2^(scales[o, g] - 127)
    mxfp8    8, 32                           e4m3(q) * 2^(scales[o, g] - 127)
    nvfp4    4, 16                           e2m1(q) * e4m3(scales[o, g])

Which of them stands in config.json, see mlx_config.py. The layout is that of mlx 0.32, run.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from recompile.errors import FormatError
from recompile.formats.checks import SCALE_DTYPES, check_finite, check_matrix, get_part, row_chunks
from recompile.formats.fp4 import unpack_e2m1
from recompile.formats.mlx_config import MlxScheme
from recompile.formats.mx import SCALE_BIAS


def unpack_codes(weight: Tensor, bits: int) -> Tensor:
    """The codes of a bit stream, code i of a row at bits [i*bits, (i+1)*bits).

    weight:  [O, W] uint32, W*32 a multiple of 8*bits
    returns: [O, W*32/bits] int32
    """
    stream = weight.contiguous().view(torch.uint8).unflatten(1, (-1, bits)).int()  # 8 codes in `bits` bytes
    first = torch.arange(8, device=weight.device) * bits
    byte, shift = first // 8, (first % 8).int()
    pairs = stream[..., byte] | stream[..., (byte + 1).clamp(max=bits - 1)] << 8  # [O, n, 8]
    return (pairs >> shift & (1 << bits) - 1).flatten(1)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """The bit stream of `unpack_codes`.

    codes:   [O, I] integers in 0 .. 2^bits - 1, I a multiple of 32
    returns: [O, I*bits/32] uint32
    """
    eights = codes.to(torch.int64).unflatten(1, (-1, 8))  # in `bits` bytes each
    whole = torch.zeros(eights.shape[:-1], dtype=torch.int64, device=codes.device)  # 64 bits at most: bits <= 8
    for place in range(8):
        whole |= eights[..., place] << place * bits
    shifts = torch.arange(bits, device=codes.device) * 8
    stream = (whole[..., None] >> shifts & 0xFF).to(torch.uint8)
    return stream.flatten(1).contiguous().view(torch.uint32)


def dequantize(parts: Mapping[str, Tensor], scheme: MlxScheme, module: str = "tensor") -> Tensor:
    """The dense weight [O, I] float32 of a module, computed in float32 (MLX rounds to the dtype of the scales).

    Raises FormatError, naming `{module}.{part}`, for parts that are missing or do not fit each other or the scheme, and
    for scales or weights that are not finite.
    """
    weight = get_part(parts, module, "weight", (torch.uint32,))
    out_features, words = check_matrix(weight, f"{module}.weight")
    groups, rest = divmod(words * 32, scheme.bits * scheme.group_size)
    if rest:
        raise FormatError(
            f"{module}.weight: found {words} words a row, wanted whole groups of {scheme.group_size} columns of "
            f"{scheme.bits} bits"
        )
    affine = scheme.mode == "affine"
    because = f"one for {scheme.group_size} columns of {scheme.bits} bits"
    dtypes = SCALE_DTYPES if affine else (torch.uint8,)
    scales = get_part(parts, module, "scales", dtypes, (out_features, groups), because)
    factors = _factors(scales, scheme.mode, f"{module}.scales")
    biases = None
    if affine:
        biases = get_part(parts, module, "biases", SCALE_DTYPES, (out_features, groups), because).float()
        check_finite(biases, f"{module}.biases")
    in_features = groups * scheme.group_size
    dense = torch.empty((out_features, in_features), dtype=torch.float32, device=weight.device)
    for rows in row_chunks(out_features, in_features, weight.device):
        values = _values(weight[rows], scheme).unflatten(1, (-1, scheme.group_size)) * factors[rows, :, None]
        dense[rows] = (values if biases is None else values + biases[rows, :, None]).flatten(1)
    check_finite(dense, f"{module}.weight")
    return dense


def _values(weight: Tensor, scheme: MlxScheme) -> Tensor:
    if scheme.mode == "affine":
        return unpack_codes(weight, scheme.bits).float()
    stored = weight.contiguous().view(torch.uint8)
    return stored.view(torch.float8_e4m3fn).float() if scheme.mode == "mxfp8" else unpack_e2m1(stored)


def _factors(scales: Tensor, mode: str, name: str) -> Tensor:
    """What the values of every group are multiplied by, float32 in the shape of the scales."""
    if mode in ("mxfp4", "mxfp8"):
        # In float64, as 2^-127 is below the normal numbers of float32 and some devices flush those.
        powers = torch.exp2(torch.arange(256, dtype=torch.float64) - SCALE_BIAS).float()
        powers[255] = torch.nan
        factors = powers.to(scales.device)[scales.int()]
    else:
        factors = scales.float() if mode == "affine" else scales.view(torch.float8_e4m3fn).float()
    check_finite(factors, name)
    return factors
