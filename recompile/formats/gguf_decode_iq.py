"""Bytes of llama.cpp's codebook types (IQ1, IQ2, IQ3) -> float32 weights, on any device.

As `gguf_decode`, one plain function for each type. The codebooks are data of the `gguf` package, which is asked for
them; 4 or 8 weights are one entry.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from recompile.errors import UnsupportedError
from recompile.formats.gguf_decode import Decode, f16, nibbles, table_of_shifts, words

DELTA = 0.125  # of the IQ1 types


@cache
def codebook(name: str, device: torch.device) -> Tensor:
    """Entries of a type's codebook as magnitudes, float32 [entries, 4 or 8]. Raises UnsupportedError without `gguf`."""
    try:
        from gguf import quants
    except ImportError:
        raise UnsupportedError(
            f"decoding {name} needs the codebooks of the gguf package: pip install 'recompile[gguf]'"
        ) from None
    owner = getattr(quants, name)
    owner.init_grid()
    return torch.from_numpy(owner.grid.squeeze((0, 1)).copy()).float().contiguous().to(device)


@cache
def sign_rows(count: int, device: torch.device) -> Tensor:
    """Row s holds +1 or -1 for each of 8 weights, float32 [count, 8]: bit j set means -1.

    count 128: seven bits are stored, and the eighth makes the number of minus signs even."""
    code = torch.arange(count).unsqueeze(1)
    bits = code >> torch.arange(8) & 1  # [count, 8]
    if count == 128:
        bits[:, 7] = bits.sum(1) % 2
    return (1 - 2 * bits).float().to(device)


def _entries(name: str, index: Tensor) -> Tensor:
    """Codebook entries: int32 [n, k] -> float32 [n, k * entry]."""
    grid = codebook(name, index.device)
    return torch.index_select(grid, 0, index.flatten()).view(index.shape[0], -1)


def _signs(index: Tensor, count: int) -> Tensor:
    return torch.index_select(sign_rows(count, index.device), 0, index.flatten()).view(index.shape[0], -1)


def _scale(values: Tensor, scale: Tensor) -> Tensor:
    """In place: values [n, 256] times the scale of their group [n, groups]."""
    values.view(*scale.shape, -1).mul_(scale.unsqueeze(-1))
    return values


def _seven_bit_signs(word: Tensor) -> Tensor:
    """Four sign codes of 7 bits from each 32-bit word: int32 [n, 8] -> float32 [n, 256]."""
    return _signs(word.unsqueeze(-1) >> table_of_shifts(4, 7, word.device) & 127, 128)


def _half_and(d: Tensor, level: Tensor, factor: float) -> Tensor:
    return d * (level + 0.5) * factor


def iq2_xxs(x: Tensor) -> Tensor:
    """Blocks of IQ2_XXS: x [blocks, bytes a block] uint8 -> [blocks, weights a block] float32."""
    pairs = words(x[:, 2:], torch.int32).unflatten(1, (8, 2))
    index = x[:, 2:].unflatten(1, (8, 8))[:, :, :4].flatten(1).int()
    word = pairs[:, :, 1]
    values = _scale(_entries("IQ2_XXS", index), _half_and(f16(x[:, :2]), word >> 28 & 15, 0.25))
    return values.mul_(_seven_bit_signs(word))


def iq2_xs(x: Tensor) -> Tensor:
    """Blocks of IQ2_XS: x [blocks, bytes a block] uint8 -> [blocks, weights a block] float32."""
    code = words(x[:, 2:66], torch.int16).int() & 0xFFFF  # [n, 32]
    scale = _half_and(f16(x[:, :2]), nibbles(x[:, 66:74], 1), 0.25)
    return _scale(_entries("IQ2_XS", code & 511), scale).mul_(_signs(code >> 9, 128))


def iq2_s(x: Tensor) -> Tensor:
    """Blocks of IQ2_S: x [blocks, bytes a block] uint8 -> [blocks, weights a block] float32."""
    high = x[:, 66:74].int().unsqueeze(-1) >> table_of_shifts(4, 2, x.device) & 3  # [n, 8, 4]
    index = x[:, 2:34].int() | high.flatten(1) << 8
    scale = _half_and(f16(x[:, :2]), nibbles(x[:, 74:82], 1), 0.25)
    return _scale(_entries("IQ2_S", index), scale).mul_(_signs(x[:, 34:66].int(), 256))


def iq3_xxs(x: Tensor) -> Tensor:
    """Blocks of IQ3_XXS: x [blocks, bytes a block] uint8 -> [blocks, weights a block] float32."""
    word = words(x[:, 66:98], torch.int32)  # [n, 8]
    values = _scale(_entries("IQ3_XXS", x[:, 2:66].int()), _half_and(f16(x[:, :2]), word >> 28 & 15, 0.5))
    return values.mul_(_seven_bit_signs(word))


def iq3_s(x: Tensor) -> Tensor:
    """Blocks of IQ3_S: x [blocks, bytes a block] uint8 -> [blocks, weights a block] float32."""
    high = x[:, 66:74].int().unsqueeze(-1) >> table_of_shifts(8, 1, x.device) & 1  # [n, 8, 8]
    index = x[:, 2:66].int() | high.flatten(1) << 8
    scale = f16(x[:, :2]) * (1 + 2 * nibbles(x[:, 106:110], 1).int())
    return _scale(_entries("IQ3_S", index), scale).mul_(_signs(x[:, 74:106].int(), 256))


def iq1_s(x: Tensor) -> Tensor:
    """Blocks of IQ1_S: x [blocks, bytes a block] uint8 -> [blocks, weights a block] float32."""
    head = words(x[:, 34:50], torch.int16).int() & 0xFFFF  # [n, 8]
    high = head.unsqueeze(-1) >> table_of_shifts(4, 3, x.device) & 7
    values = _entries("IQ1_S", x[:, 2:34].int() | high.flatten(1) << 8)
    delta = DELTA * (1 - 2 * (head >> 15)).float()
    values.view(-1, 8, 32).add_(delta.unsqueeze(-1))
    return _scale(values, f16(x[:, :2]) * (2 * (head >> 12 & 7) + 1))


def iq1_m(x: Tensor) -> Tensor:
    """Blocks of IQ1_M: x [blocks, bytes a block] uint8 -> [blocks, weights a block] float32."""
    packed = words(x[:, 48:56], torch.int16).int() & 0xFFFF  # [n, 4]: a nibble of d and four 3-bit levels each
    d = ((packed >> 12) << table_of_shifts(4, 4, x.device)).sum(1, dtype=torch.int32)
    d = d.to(torch.int16).view(torch.float16).float().unsqueeze(-1)
    level = (packed.unsqueeze(-1) >> table_of_shifts(4, 3, x.device) & 7).flatten(1)  # [n, 16]
    extra = nibbles(x[:, 32:48], 1).int()  # [n, 32]: 3 high bits of an index and the sign of delta, of 8 weights
    values = _entries("IQ1_M", x[:, :32].int() | (extra & 7) << 8)
    values.view(-1, 32, 8).add_((DELTA * (1 - 2 * (extra >> 3)).float()).unsqueeze(-1))
    return _scale(values, d * (2 * level + 1))


DECODERS: dict[str, Decode] = {
    "IQ2_XXS": iq2_xxs,
    "IQ2_XS": iq2_xs,
    "IQ2_S": iq2_s,
    "IQ3_XXS": iq3_xxs,
    "IQ3_S": iq3_s,
    "IQ1_S": iq1_s,
    "IQ1_M": iq1_m,
}
