"""Bytes of llama.cpp's own tensor types -> float32 weights, on any device. One plain function for each type.

Every function takes blocks, uint8 [n, block bytes], and gives values, float32 [n, block], with products and sums
rounded to float32 in the order that ggml's reference decoder has, so that both agree to the last bit. The types with a
codebook are in `gguf_decode_iq`.

Axes: n blocks; inside a block groups of 32 (or 16) weights that share a scale.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

Decode = Callable[[Tensor], Tensor]

IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
E2M1_DOUBLED = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


def f16(packed: Tensor) -> Tensor:
    """Little-endian float16s: uint8 [n, 2k] -> float32 [n, k]."""
    return packed.contiguous().view(torch.float16).float()


def words(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """Little-endian integers: uint8 [n, w * k] -> dtype [n, k]."""
    return packed.clone(memory_format=torch.contiguous_format).view(dtype)  # a slice may begin anywhere


def nibbles(packed: Tensor, group: int) -> Tensor:
    """Low nibbles of `group` bytes, then their high nibbles: uint8 [n, k] -> [n, 2k]."""
    grouped = packed.unflatten(1, (-1, 1, group))  # [n, k / group, 1, group]
    return torch.cat((grouped & 15, grouped >> 4), 2).flatten(1)


def crumbs(packed: Tensor, group: int) -> Tensor:
    """Bits 0-1 of `group` bytes, then bits 2-3, 4-5, 6-7: uint8 [n, k] -> [n, 4k]."""
    grouped = packed.unflatten(1, (-1, 1, group))
    return torch.cat((grouped & 3, grouped >> 2 & 3, grouped >> 4 & 3, grouped >> 6), 2).flatten(1)


def bits(packed: Tensor) -> Tensor:
    """Bit 0 of all bytes, then bit 1, ...: uint8 [n, k] -> [n, 8, k] of 0 or 1."""
    return torch.stack([packed >> shift & 1 for shift in range(8)], 1)


@cache
def table(values: tuple[float, ...], device: torch.device) -> Tensor:
    """float32 [values]."""
    return torch.tensor(values, dtype=torch.float32, device=device)


def look_up(values: tuple[float, ...], codes: Tensor) -> Tensor:
    """values[codes] as float32, in the shape of codes (uint8)."""
    chosen = torch.index_select(table(values, codes.device), 0, codes.flatten().int())
    return chosen.view(codes.shape)


def scaled(codes: Tensor, scale: Tensor) -> Tensor:
    """codes [n, g * k] times the scale of their group [n, g]: float32 [n, g * k]."""
    grouped = codes.unflatten(1, (scale.shape[1], -1))
    return (grouped * scale.unsqueeze(-1)).flatten(1)


# ---- blocks of 32 with one scale -------------------------------------------------------------------------------------


def q4_0(x: Tensor) -> Tensor:
    """Blocks of Q4_0: x [blocks, bytes a block] uint8 -> [blocks, weights a block] float32."""
    return nibbles(x[:, 2:], 16).sub_(8).view(torch.int8) * f16(x[:, :2])


def q4_1(x: Tensor) -> Tensor:
    """Blocks of Q4_1: x [blocks, bytes a block] uint8 -> [blocks, weights a block] float32."""
    return (nibbles(x[:, 4:], 16) * f16(x[:, :2])).add_(f16(x[:, 2:4]))


def _fifth_bits(x: Tensor) -> Tensor:
    """Bit i of a 32-bit word as 16 at place i: uint8 [n, 4] -> [n, 32]."""
    masks = (1 << table_of_shifts(8, 1, x.device)).to(torch.uint8)
    return ((x.unsqueeze(-1) & masks) != 0).view(torch.uint8).mul_(16).flatten(1)


def q5_0(x: Tensor) -> Tensor:
    """Blocks of Q5_0: x [blocks, bytes a block] uint8 -> [blocks, weights a block] float32."""
    codes = nibbles(x[:, 6:], 16) | _fifth_bits(x[:, 2:6])
    return codes.sub_(16).view(torch.int8) * f16(x[:, :2])


def q5_1(x: Tensor) -> Tensor:
    """Blocks of Q5_1: x [blocks, bytes a block] uint8 -> [blocks, weights a block] float32."""
    codes = nibbles(x[:, 8:], 16) | _fifth_bits(x[:, 4:8])
    return (codes * f16(x[:, :2])).add_(f16(x[:, 2:4]))


def q8_0(x: Tensor) -> Tensor:
    """Blocks of Q8_0: x [blocks, bytes a block] uint8 -> [blocks, weights a block] float32."""
    return x[:, 2:].contiguous().view(torch.int8) * f16(x[:, :2])


def iq4_nl(x: Tensor) -> Tensor:
    """Blocks of IQ4_NL: x [blocks, bytes a block] uint8 -> [blocks, weights a block] float32."""
    return look_up(IQ4_VALUES, nibbles(x[:, 2:], 16)).mul_(f16(x[:, :2]))


def mxfp4(x: Tensor) -> Tensor:
    """Blocks of MXFP4: x [blocks, bytes a block] uint8 -> [blocks, weights a block] float32. The scale is a power of
    two, 2^(e - 128): the code values are doubled."""
    e = x[:, :1].int()
    scale = torch.where(e < 2, 0x00200000 << e.clamp(max=1), (e - 1) << 23).view(torch.float32)
    return look_up(E2M1_DOUBLED, nibbles(x[:, 1:], 16)).mul_(scale)


def nvfp4(x: Tensor) -> Tensor:
    """Blocks of NVFP4: x [blocks, bytes a block] uint8 -> [blocks, weights a block] float32. Four unsigned e4m3 scales,
    each for 16 weights; the code values are doubled."""
    code = x[:, :4].int()
    exponent, mantissa = code >> 3 & 15, (code & 7).float()
    scale = torch.where(exponent == 0, mantissa * 2.0**-9, (1 + mantissa / 8) * torch.exp2((exponent - 7).float()))
    scale = torch.where((code == 0) | (code == 127), 0, scale * 0.5)
    return scaled(look_up(E2M1_DOUBLED, nibbles(x[:, 4:], 8)), scale)


def q6_0(x: Tensor) -> Tensor:
    """Blocks of ik_llama.cpp's Q6_0: x [blocks, bytes a block] uint8 -> [blocks, weights a block] float32. float16 d, 8
    bytes of high bits, 16 bytes of nibbles (ik quants format spec)."""
    high = torch.cat((x[:, 2:10] & 15, x[:, 2:10] >> 4), 1)  # [n, 16]: 2 bits of weight k, 2 bits of weight k + 16
    codes = nibbles(x[:, 10:], 16) | torch.cat((high << 4 & 48, high << 2 & 48), 1)
    return codes.sub_(32).view(torch.int8) * f16(x[:, :2])


def q1_0(x: Tensor) -> Tensor:
    """Blocks of Q1_0: x [blocks, bytes a block] uint8 -> [blocks, weights a block] float32. Bit i of the block is the
    sign of weight i: d or -d."""
    signs = torch.stack([x[:, 2:] >> shift & 1 for shift in range(8)], 2).flatten(1)
    return (signs * 2).view(torch.int8).sub_(1) * f16(x[:, :2])


# ---- super-blocks of 256: K types ------------------------------------------------------------------------------------


def q2_k(x: Tensor) -> Tensor:
    """Blocks of Q2_K: x [blocks, bytes a block] uint8 -> [blocks, weights a block] float32."""
    d, least = f16(x[:, 80:82]), f16(x[:, 82:84])
    out = scaled(crumbs(x[:, 16:80], 32), d * (x[:, :16] & 15))
    return out.unflatten(1, (16, 16)).sub_((least * (x[:, :16] >> 4)).unsqueeze(-1)).flatten(1)


def q3_k(x: Tensor) -> Tensor:
    """Blocks of Q3_K: x [blocks, bytes a block] uint8 -> [blocks, weights a block] float32."""
    low = nibbles(x[:, 96:104], 8)
    high = torch.cat([x[:, 104:108] >> shift & 3 for shift in (0, 2, 4, 6)], 1)
    levels = (low | high << 4).sub_(32).view(torch.int8)
    codes = crumbs(x[:, 32:96], 32) | bits(x[:, :32]).flatten(1) << 2
    return scaled(codes.sub_(4).view(torch.int8), f16(x[:, 108:110]) * levels)


def _scales_and_minima(x: Tensor) -> tuple[Tensor, Tensor]:
    """The eight 6-bit scales and minima of a Q4_K or Q5_K block: uint8 [n, 12] -> twice [n, 8]."""
    first, second, third = x[:, :4], x[:, 4:8], x[:, 8:]
    scales = torch.cat((first & 63, third & 15 | first >> 2 & 48), 1)
    minima = torch.cat((second & 63, third >> 4 | second >> 2 & 48), 1)
    return scales, minima


def _k_affine(x: Tensor, codes: Tensor) -> Tensor:
    scales, minima = _scales_and_minima(x[:, 4:16])
    out = codes.unflatten(1, (8, 32)) * (f16(x[:, :2]) * scales).unsqueeze(-1)
    return out.sub_((f16(x[:, 2:4]) * minima).unsqueeze(-1)).flatten(1)


def q4_k(x: Tensor) -> Tensor:
    """Blocks of Q4_K: x [blocks, bytes a block] uint8 -> [blocks, weights a block] float32."""
    return _k_affine(x, nibbles(x[:, 16:], 32))


def q5_k(x: Tensor) -> Tensor:
    """Blocks of Q5_K: x [blocks, bytes a block] uint8 -> [blocks, weights a block] float32."""
    return _k_affine(x, nibbles(x[:, 48:], 32) | bits(x[:, 16:48]).flatten(1) << 4)


def q6_k(x: Tensor) -> Tensor:
    """Blocks of Q6_K: x [blocks, bytes a block] uint8 -> [blocks, weights a block] float32."""
    codes = nibbles(x[:, :128], 64) | crumbs(x[:, 128:192], 32) << 4
    scale = f16(x[:, 208:210]) * x[:, 192:208].contiguous().view(torch.int8)
    return scaled(codes.sub_(32).view(torch.int8), scale)


def iq4_xs(x: Tensor) -> Tensor:
    """Blocks of IQ4_XS: x [blocks, bytes a block] uint8 -> [blocks, weights a block] float32."""
    high = words(x[:, 2:4], torch.int16).int() >> table_of_shifts(8, 2, x.device) & 3
    levels = (nibbles(x[:, 4:8], 1) | high << 4) - 32
    return scaled(look_up(IQ4_VALUES, nibbles(x[:, 8:], 16)), f16(x[:, :2]) * levels)


@cache
def table_of_shifts(count: int, step: int, device: torch.device) -> Tensor:
    """0, step, 2 * step ...: int32 [count]."""
    return torch.arange(count, dtype=torch.int32, device=device) * step


# ---- ternary ---------------------------------------------------------------------------------------------------------


@cache
def _powers(count: int, device: torch.device) -> Tensor:
    """1, 3, 9 ...: uint8 [count, 1]."""
    return torch.tensor([[3**power] for power in range(count)], dtype=torch.uint8, device=device)


def _trits(packed: Tensor, powers: int) -> Tensor:
    """Digits 0, 1, 2 of bytes in base 3, the same digit of all bytes together: uint8 [n, k] -> int8 [n, powers * k]."""
    # uint8 products wrap, which takes digits off; the digit is 3 * rest / 256, rounded down
    rest = packed.unsqueeze(1) * _powers(powers, packed.device)
    digits = (rest > 85).view(torch.int8).add_((rest > 170).view(torch.int8))
    return digits.sub_(1).flatten(1)


def tq1_0(x: Tensor) -> Tensor:
    """Blocks of TQ1_0: x [blocks, bytes a block] uint8 -> [blocks, weights a block] float32."""
    codes = torch.cat((_trits(x[:, :32], 5), _trits(x[:, 32:48], 5), _trits(x[:, 48:52], 4)), 1)
    return codes * f16(x[:, 52:54])


def tq2_0(x: Tensor) -> Tensor:
    """Blocks of TQ2_0: x [blocks, bytes a block] uint8 -> [blocks, weights a block] float32."""
    return crumbs(x[:, :64], 32).sub_(1).view(torch.int8) * f16(x[:, 64:66])


DECODERS: dict[str, Decode] = {
    "Q4_0": q4_0,
    "Q4_1": q4_1,
    "Q5_0": q5_0,
    "Q5_1": q5_1,
    "Q8_0": q8_0,
    "Q2_K": q2_k,
    "Q3_K": q3_k,
    "Q4_K": q4_k,
    "Q5_K": q5_k,
    "Q6_K": q6_k,
    "IQ4_NL": iq4_nl,
    "IQ4_XS": iq4_xs,
    "TQ1_0": tq1_0,
    "TQ2_0": tq2_0,
    "MXFP4": mxfp4,
    "NVFP4": nvfp4,
    "Q1_0": q1_0,
    "Q6_0": q6_0,
}
