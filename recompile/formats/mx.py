"""Microscaling floats: compressed-tensors `mxfp4-pack-quantized`, `mxfp6-pack-quantized` and `mxfp8-quantized`.

Axes: O = out_features, I = in_features. 32 neighbouring columns share a scale, a power of two. A module stores

            codes                                   values
    mxfp4   weight_packed uint8 [O, I/2]            E2M1, two a byte, low nibble first
    mxfp6   weight_packed uint8 [O, 3I/4]           E2M3, four in three bytes, lowest bits first
    mxfp8   weight        float8_e4m3fn [O, I]      itself

beside weight_scale uint8 [O, I/32], and means W[o, i] = value[o, i] * 2^(s[o, i//32] - 127); s = 255 is NaN. Element
and scale encodings are those of the OCP Microscaling specification (1.0), names those of compressed-tensors (0.20).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from recompile.errors import FormatError
from recompile.formats.checks import check_finite, check_matrix, get_part, row_chunks
from recompile.formats.fp4 import check_float_group, unpack_e2m1
from recompile.formats.scale_grid import read_bits

if TYPE_CHECKING:
    from recompile.checkpoint.checkpoint import Checkpoint, StoredModule

GROUP_SIZE = 32
SCALE_BIAS = 127
E2M3 = tuple(m / 8 for m in range(8)) + tuple((1 + m / 8) * 2.0**e for e in range(3) for m in range(8))


@dataclass(frozen=True)
class MxScheme:
    """bits of an element: 4, 6 or 8."""

    bits: int

    def __post_init__(self) -> None:
        if self.bits not in (4, 6, 8):
            raise FormatError(f"bits: found {self.bits!r}, wanted 4, 6 or 8")


def read_scheme(weights: Mapping[str, Any]) -> MxScheme:
    """From the `weights` entry of a config group. Raises FormatError for what microscaling floats do not have."""
    bits = read_bits(weights, "float", (4, 6, 8))
    check_float_group(weights, bits, GROUP_SIZE, ("group",))
    return MxScheme(bits)


def scheme_of(checkpoint: Checkpoint, module: StoredModule) -> MxScheme:
    """Of configs without groups (`quant_method` mxfp4)."""
    return MxScheme(4)


def unpack_e2m3(packed: Tensor) -> Tensor:
    """Values of packed 6-bit floats: code k of four takes bits [6k, 6k + 6) of three bytes, lowest byte first.

    packed:  [O, 3n] uint8
    returns: [O, 4n] float32
    """
    values = torch.tensor([*E2M3, *(-value for value in E2M3)], dtype=torch.float32, device=packed.device)
    triples = packed.int().unflatten(1, (-1, 3))
    words = triples[..., 0] | triples[..., 1] << 8 | triples[..., 2] << 16  # [O, n]
    shifts = torch.arange(0, 24, 6, dtype=torch.int32, device=packed.device)
    return values[(words[..., None] >> shifts & 63).flatten(1)]


def pack_e2m3(levels: Tensor) -> Tensor:
    """The inverse of `unpack_e2m3` for values that all are levels of E2M3; -0 is stored as 0.

    levels:  [O, 4n] float, each one of +-E2M3
    returns: [O, 3n] uint8
    """
    index = torch.zeros(8 * 8, dtype=torch.int32, device=levels.device)
    index[torch.tensor([int(8 * value) for value in E2M3], device=levels.device)] = torch.arange(
        len(E2M3), dtype=torch.int32, device=levels.device
    )
    codes = index[(levels.abs() * 8).int()] | (levels < 0).int() << 5
    words = codes[:, ::4] | codes[:, 1::4] << 6 | codes[:, 2::4] << 12 | codes[:, 3::4] << 18  # [O, n]
    return torch.stack([words >> shift & 255 for shift in (0, 8, 16)], -1).flatten(1).to(torch.uint8)


def shared_exponent(largest: Tensor, bits: int) -> Tensor:
    """The lowest power of two at which the largest magnitude of a group still rounds to a number of the element type:
    one more than its own where it lies half a step above the largest number. Groups of zeros get the lowest of all.

    largest: any shape, float32, >= 0;  returns: int32 exponents, the same shape
    """
    top, mantissa = {4: (6.0, 1), 6: (7.5, 3), 8: (448.0, 3)}[bits]
    top_exponent = math.floor(math.log2(top))
    exponent = torch.frexp(largest).exponent - 1 - top_exponent
    exponent = exponent + (torch.ldexp(largest, -exponent) >= top + 2.0 ** (top_exponent - mantissa) / 2)
    return torch.where(largest > 0, exponent, -SCALE_BIAS)


def _as_float32(weight: Tensor) -> Tensor:
    return weight.float()


# bits -> (part, dtype, columns in one unit, stored elements in one unit, decode)
_ELEMENTS = {
    4: ("weight_packed", torch.uint8, 2, 1, unpack_e2m1),
    6: ("weight_packed", torch.uint8, 4, 3, unpack_e2m3),
    8: ("weight", torch.float8_e4m3fn, 1, 1, _as_float32),
}


def dequantize(parts: Mapping[str, Tensor], scheme: MxScheme, module: str = "tensor") -> Tensor:
    """The dense weight [O, I] float32 of a module; exact but where float32 itself ends.

    Raises FormatError, naming `{module}.{part}`, for parts that are missing or do not fit each other or the scheme, and
    for scales or weights that are not finite.
    """
    part, dtype, columns, stored, decode = _ELEMENTS[scheme.bits]
    codes = get_part(parts, module, part, (dtype,))
    out_features, width = check_matrix(codes, f"{module}.{part}")
    in_features = width // stored * columns
    if width % stored or in_features % GROUP_SIZE:
        raise FormatError(
            f"{module}.{part}: found {width} elements a row, wanted whole groups of {GROUP_SIZE} columns of "
            f"{scheme.bits} bits"
        )
    because = f"one scale for {GROUP_SIZE} columns of {scheme.bits} bits"
    wanted = (out_features, in_features // GROUP_SIZE)
    scale = get_part(parts, module, "weight_scale", (torch.uint8, torch.float8_e8m0fnu), wanted, because)
    exponents = scale.view(torch.uint8)
    if bool((exponents == 255).any()):
        raise FormatError(
            f"{module}.weight_scale: found {int((exponents == 255).sum())} scales that mean NaN (255), wanted none"
        )
    # In float64, as 2^-127 is below the normal numbers of float32 and some devices flush those.
    powers = torch.exp2(torch.arange(256, dtype=torch.float64) - SCALE_BIAS).float().to(codes.device)
    factors = powers[exponents.int()]  # [O, I/32]
    dense = torch.empty((out_features, in_features), dtype=torch.float32, device=codes.device)
    for rows in row_chunks(out_features, in_features, codes.device):
        values = decode(codes[rows]).unflatten(1, (-1, GROUP_SIZE))  # [rows, I/32, 32]
        dense[rows] = (values * factors[rows, :, None]).flatten(1)
    check_finite(dense, f"{module}.{part}")
    return dense
