"""The codes inside blocks of GGUF types: whole levels of a grid whose scales and offsets stand beside them.

    weight = level * scale + offset        one scale and offset for `group` weights of a row

A type is one row of LAYOUTS: its levels, and how they go into a block's bytes (`gguf_decode` reads them).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from recompile.formats.gguf import dequantize_rows
from recompile.formats.gguf_decode import IQ4_VALUES
from recompile.formats.gguf_types import GgufType

Put = Callable[[Tensor, Tensor], None]  # blocks uint8 [n, block bytes], written to; codes uint8 [n, block]


@dataclass(frozen=True)
class CodeLayout:
    """Levels of a type.

    group: weights of a row that share scale and offset;  low, high: the lowest and highest level
    values: the levels themselves, rising, where they are not evenly spaced
    put: writes codes, counted from the lowest level
    """

    group: int
    low: int
    high: int
    put: Put
    values: tuple[int, ...] = ()


@dataclass(frozen=True)
class BlockGrid:
    """scale, offset: [rows, groups of a row] float32; scales may be negative, or 0 where a group has one value."""

    scale: Tensor
    offset: Tensor


def grid_of(kind: GgufType, packed: Tensor, columns: int) -> BlockGrid:
    """The grid of encoded rows, uint8 [rows, row bytes], for a type of LAYOUTS."""
    layout = LAYOUTS[kind.name]
    ends = layout.values or (layout.low, layout.high)
    first, last = ends[0], ends[-1]
    rows = len(packed)
    at_first, at_last = (
        dequantize_rows(kind, put_levels(kind, packed, torch.full((rows, columns), float(level))), columns)
        for level in (first, last)
    )
    each = slice(None, None, layout.group)
    scale = (at_last[:, each].double() - at_first[:, each].double()) / (last - first)
    offset = at_first[:, each].double() - first * scale
    return BlockGrid(scale.float(), offset.float())


def put_levels(kind: GgufType, packed: Tensor, levels: Tensor) -> Tensor:
    """Encoded rows, uint8 [rows, row bytes], with other levels [rows, columns]; scales stay."""
    layout = LAYOUTS[kind.name]
    if layout.values:
        table = torch.tensor(layout.values, dtype=levels.dtype, device=levels.device)
        codes = torch.bucketize(levels, table)
    else:
        codes = levels - layout.low
    blocks = packed.reshape(-1, kind.block_bytes).clone()
    layout.put(blocks, codes.to(torch.uint8).reshape(len(blocks), -1))
    return blocks.view(packed.shape)


# ---- codes into bytes ------------------------------------------------------------------------------------------------


def _joined(codes: Tensor, group: int, width: int) -> Tensor:
    """Fields of `width` bits: the first `group` codes go to the lowest bits of `group` bytes, the next above them."""
    fields = codes.unflatten(1, (-1, 8 // width, group))
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=codes.device).view(1, 1, -1, 1)
    return (fields << shifts).sum(2, dtype=torch.uint8).flatten(1)


def _word(bits: Tensor) -> Tensor:
    """0 or 1 [n, 32] -> a little-endian word, uint8 [n, 4]."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (bits.unflatten(1, (4, 8)) << shifts).sum(2, dtype=torch.uint8)


def _nibbles_at(start: int, group: int) -> Put:
    def put(blocks: Tensor, codes: Tensor) -> None:
        blocks[:, start:] = _joined(codes, group, 4)

    return put


def _five_bits_at(start: int) -> Put:
    def put(blocks: Tensor, codes: Tensor) -> None:
        blocks[:, start : start + 4] = _word(codes >> 4)
        blocks[:, start + 4 :] = _joined(codes & 15, 16, 4)

    return put


def _q8_0(blocks: Tensor, codes: Tensor) -> None:
    blocks[:, 2:] = codes - 128  # wraps: the bytes of int8


def _q2_k(blocks: Tensor, codes: Tensor) -> None:
    blocks[:, 16:80] = _joined(codes, 32, 2)


def _q3_k(blocks: Tensor, codes: Tensor) -> None:
    blocks[:, :32] = _joined(codes >> 2, 32, 1)
    blocks[:, 32:96] = _joined(codes & 3, 32, 2)


def _q5_k(blocks: Tensor, codes: Tensor) -> None:
    blocks[:, 16:48] = _joined(codes >> 4, 32, 1)
    blocks[:, 48:] = _joined(codes & 15, 32, 4)


def _q6_k(blocks: Tensor, codes: Tensor) -> None:
    blocks[:, :128] = _joined(codes & 15, 64, 4)
    blocks[:, 128:192] = _joined(codes >> 4, 32, 2)


LAYOUTS: Mapping[str, CodeLayout] = {
    "Q4_0": CodeLayout(32, -8, 7, _nibbles_at(2, 16)),
    "Q4_1": CodeLayout(32, 0, 15, _nibbles_at(4, 16)),
    "Q5_0": CodeLayout(32, -16, 15, _five_bits_at(2)),
    "Q5_1": CodeLayout(32, 0, 31, _five_bits_at(4)),
    "Q8_0": CodeLayout(32, -128, 127, _q8_0),
    "Q2_K": CodeLayout(16, 0, 3, _q2_k),
    "Q3_K": CodeLayout(16, -4, 3, _q3_k),
    "Q4_K": CodeLayout(32, 0, 15, _nibbles_at(16, 32)),
    "Q5_K": CodeLayout(32, 0, 31, _q5_k),
    "Q6_K": CodeLayout(16, -32, 31, _q6_k),
    "IQ4_NL": CodeLayout(32, 0, 15, _nibbles_at(2, 16), IQ4_VALUES),
    "IQ4_XS": CodeLayout(32, 0, 15, _nibbles_at(8, 16), IQ4_VALUES),
}
