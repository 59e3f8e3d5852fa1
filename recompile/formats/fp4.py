"""4-bit floats with 8-bit float scales: compressed-tensors `nvfp4-pack-quantized` and ModelOpt's spelling of the same.

Axes: O = out_features, I = in_features. A module stores

    compressed-tensors    ModelOpt          dtype and shape
    weight_packed         weight            uint8 [O, I/2]: even column in the low nibble, odd column in the high one
    weight_scale          weight_scale      float8_e4m3fn [O, I/16]
    weight_global_scale   weight_scale_2    float32 [1]: the first DIVIDES, the second multiplies

and means W[o, i] = e2m1(n[o, i]) * float(s[o, i//16]) / g. Names are those of the compressed-tensors library (0.20).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recompile.errors import FormatError
from recompile.formats.checks import check_finite, check_matrix, get_part, row_chunks
from recompile.formats.scale_grid import read_bits, read_symmetric
from recompile.formats.stored import Described, StoredModule

GROUP_SIZE = 16
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # by the low three bits of a code; bit 3 is the sign


@dataclass(frozen=True)
class Nvfp4Scheme:
    """Under which names the codes and the tensor's scale are stored, and whether that scale divides."""

    packed_part: str = "weight_packed"
    global_part: str = "weight_global_scale"
    divides: bool = True


def read_scheme(weights: Mapping[str, Any]) -> Nvfp4Scheme:
    """From the `weights` entry of a config group. Raises FormatError for what nvfp4 does not have."""
    check_float_group(weights, 4, GROUP_SIZE, ("tensor_group",))
    return Nvfp4Scheme()


def scheme_of(checkpoint: Described, module: StoredModule) -> Nvfp4Scheme:
    """ModelOpt's spelling: the parts say all."""
    return Nvfp4Scheme("weight", "weight_scale_2", divides=False)


def check_float_group(weights: Mapping[str, Any], bits: int, group_size: int, strategies: tuple[str, ...]) -> None:
    """Raise FormatError unless a `weights` entry is symmetric floats of `bits`, one scale for `group_size` columns."""
    read_bits(weights, "float", (bits,))
    if not read_symmetric(weights):
        raise FormatError(f"weights.symmetric: found false, wanted true: {bits}-bit floats have no zero point")
    if weights.get("strategy") not in (None, *strategies):
        raise FormatError(f"weights.strategy: found {weights['strategy']!r}, wanted {' or '.join(strategies)}")
    if weights.get("group_size") not in (None, group_size):
        raise FormatError(f"weights.group_size: found {weights['group_size']!r}, wanted {group_size}")


def unpack_e2m1(packed: Tensor) -> Tensor:
    """Values of packed 4-bit floats, low nibble first.

    packed:  [O, n] uint8
    returns: [O, 2n] float32
    """
    values = torch.tensor([*E2M1, *(-value for value in E2M1)], dtype=torch.float32, device=packed.device)
    codes = torch.stack((packed & 15, packed >> 4), -1)  # [O, n, 2]
    return values[codes.flatten(1).int()]


def round_small_float(values: Tensor, mantissa: int, lowest_exponent: int, largest: float) -> Tensor:
    """The nearest number of a small float type, ties to even, beyond the largest the largest; any shape, float32.

    mantissa: stored bits; lowest_exponent: of normal numbers, below it the steps stay the same
    """
    values = values.clamp(-largest, largest)
    exponent = torch.frexp(values).exponent - 1  # floor(log2 |x|); of 0 it is -1
    step = torch.ldexp(torch.ones_like(values), exponent.clamp_(min=lowest_exponent) - mantissa)
    return (values / step).round_().mul_(step)


def round_e2m1(values: Tensor) -> Tensor:
    """The nearest E2M1 level of every value, ties to even; any shape, float."""
    return round_small_float(values, 1, 0, E2M1[-1])


def pack_e2m1(levels: Tensor) -> Tensor:
    """Codes of values that all are levels of E2M1, two a byte, low nibble first; -0 is stored as 0.

    levels:  [O, 2n] float, each one of +-E2M1
    returns: [O, n] uint8
    """
    index = torch.zeros(2 * int(E2M1[-1]) + 1, dtype=torch.uint8, device=levels.device)
    index[torch.tensor([int(2 * value) for value in E2M1], device=levels.device)] = torch.arange(
        len(E2M1), dtype=torch.uint8, device=levels.device
    )
    codes = index[(levels.abs() * 2).int()] | (levels < 0).to(torch.uint8) << 3
    return codes[:, ::2] | codes[:, 1::2] << 4


def dequantize(parts: Mapping[str, Tensor], scheme: Nvfp4Scheme, module: str = "tensor") -> Tensor:
    """The dense weight [O, I] float32 of a module, computed in float32.

    Raises FormatError, naming `{module}.{part}`, for parts that are missing or do not fit each other, scales that are
    not finite, and a tensor's scale that is not above 0.
    """
    packed = get_part(parts, module, scheme.packed_part, (torch.uint8,))
    out_features, half = check_matrix(packed, f"{module}.{scheme.packed_part}")
    in_features = half * 2
    if in_features % GROUP_SIZE:
        raise FormatError(
            f"{module}.{scheme.packed_part}: found {in_features} columns, wanted a multiple of {GROUP_SIZE}"
        )
    wanted = (out_features, in_features // GROUP_SIZE)
    scale = get_part(parts, module, "weight_scale", (torch.float8_e4m3fn,), wanted, "one scale for 16 columns")
    check_finite(scale, f"{module}.weight_scale")
    whole = get_part(parts, module, scheme.global_part, (torch.float32, torch.bfloat16, torch.float16)).float()
    if whole.numel() != 1 or not bool((whole > 0).all()) or not bool(whole.isfinite().all()):
        found = whole.flatten().tolist()[:4]
        raise FormatError(
            f"{module}.{scheme.global_part}: found {list(whole.shape)} {found}, wanted one finite number above 0"
        )
    whole = whole.reshape(())
    factors = scale.float() / whole if scheme.divides else scale.float() * whole  # [O, I/16]
    check_finite(factors, f"{module}.{scheme.global_part} with weight_scale")
    dense = torch.empty((out_features, in_features), dtype=torch.float32, device=packed.device)
    for rows in row_chunks(out_features, in_features, packed.device):
        values = unpack_e2m1(packed[rows]).unflatten(1, (-1, GROUP_SIZE))  # [rows, I/16, 16]
        dense[rows] = (values * factors[rows, :, None]).flatten(1)
    return dense
