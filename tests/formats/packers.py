"""Packers written from the specifications with plain Python integers, independent of what they test."""

from __future__ import annotations

import torch
from torch import Tensor

from recompile.formats.gptq import GptqScheme

PLANES = {2: [2], 3: [2, 1], 4: [4], 5: [4, 1], 6: [4, 2], 7: [4, 2, 1], 8: [8]}


def signed(word: int) -> int:
    return word - (1 << 32) if word >= 1 << 31 else word


def pack_stream(codes: list[int], bits: int) -> list[int]:
    """One little-endian bit stream: the definition, with one unbounded integer."""
    stream = sum(code << (bits * at) for at, code in enumerate(codes))
    return [signed(stream >> (32 * word) & 0xFFFF_FFFF) for word in range(-(-len(codes) * bits // 32))]


def pack_planes(codes: list[int], bits: int) -> list[int]:
    """Planar words of 32 codes at a time, one code after another."""
    words: list[int] = []
    for start in range(0, len(codes), 32):
        low = 0
        for width in PLANES[bits]:
            plane = [0] * width
            for at, code in enumerate(codes[start : start + 32]):
                word, field = divmod(at, 32 // width)
                plane[word] |= (code >> low & ((1 << width) - 1)) << (width * field)
            words += [signed(word) for word in plane]
            low += width
    return words


def pack_gptq(
    codes: Tensor, zeros: Tensor, scales: Tensor, scheme: GptqScheme, g_idx: Tensor | None = None
) -> dict[str, Tensor]:
    """codes [O, I], true zeros [O, NG], scales [O, NG] -> the stored parts."""
    pack = pack_planes if scheme.layout == "gptq_p" else pack_stream
    if scheme.layout == "gptq":
        zeros = (zeros - 1) % (1 << scheme.bits)
    parts = {
        "qweight": torch.tensor([pack(row, scheme.bits) for row in codes.tolist()], dtype=torch.int32).t().contiguous(),
        "qzeros": torch.tensor([pack(column, scheme.bits) for column in zeros.t().tolist()], dtype=torch.int32),
        "scales": scales.t().contiguous(),
    }
    return parts if g_idx is None else parts | {"g_idx": g_idx.to(torch.int32)}


AWQ_POSITION = [0, 4, 1, 5, 2, 6, 3, 7]  # of the natural column k in its word


def pack_awq_rows(rows: list[list[int]]) -> Tensor:
    """Codes in natural order -> words, one nibble after another."""
    packed = []
    for row in rows:
        words = [0] * (len(row) // 8)
        for column, code in enumerate(row):
            words[column // 8] |= code << (4 * AWQ_POSITION[column % 8])
        packed.append([signed(word) for word in words])
    return torch.tensor(packed, dtype=torch.int32)


def pack_awq(codes: Tensor, zeros: Tensor, scales: Tensor) -> dict[str, Tensor]:
    """codes [O, I], zeros and scales [O, NG]."""
    return {
        "qweight": pack_awq_rows(codes.t().tolist()),
        "qzeros": pack_awq_rows(zeros.t().tolist()),
        "scales": scales.t().contiguous().to(torch.float16),
    }
