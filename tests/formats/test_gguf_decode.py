"""GGUF tensor types: golden blocks by hand, bit-exact agreement with the gguf package, damaged input."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch

from recompile.errors import FormatError, UnsupportedError
from recompile.formats import gguf, ik
from recompile.formats.gguf_types import TYPES, find_type

BY_PACKAGE = sorted(set(gguf.DECODERS) - {"Q6_0", "Q1_0"})  # the package knows Q1_0's size and not its values


def rows_of(kind: str, seed: int, rows: int = 5, columns: int = 512) -> torch.Tensor:
    raw = np.random.default_rng(seed).integers(0, 256, (rows, TYPES[kind].row_bytes(columns)), dtype=np.uint8)
    return torch.from_numpy(raw)


@pytest.mark.parametrize("kind", BY_PACKAGE)
def test_any_bytes_decode_to_the_same_bits_as_in_the_gguf_package(kind: str) -> None:
    pytest.importorskip("gguf")
    quants = importlib.import_module("gguf.quants")
    pytest.importorskip("gguf")
    constants = importlib.import_module("gguf.constants")
    packed = rows_of(kind, 3)
    with np.errstate(all="ignore"):
        want = quants.dequantize(packed.numpy(), constants.GGMLQuantizationType[kind])
    have = gguf.dequantize_rows(kind, packed, 512).numpy()
    same = (have.view(np.uint32) == np.ascontiguousarray(want).view(np.uint32)) | (np.isnan(have) & np.isnan(want))
    assert have.shape == want.shape == (5, 512)
    assert same.all(), f"{(~same).sum()} of {same.size} values differ"


@pytest.mark.parametrize("kind", sorted(gguf.DECODABLE))
def test_the_size_of_the_chunks_does_not_matter(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = rows_of(kind, 4)
    whole = gguf.dequantize_rows(kind, packed, 512)
    monkeypatch.setattr(gguf, "CHUNK_WEIGHTS_CPU", 1)
    assert torch.equal(gguf.dequantize_rows(kind, packed[1:3], 512).nan_to_num(), whole[1:3].nan_to_num())
    assert gguf.dequantize_rows(kind, packed[:0], 512).shape == (0, 512)


def test_a_q4_0_block_by_hand() -> None:
    block = np.float16(0.5).tobytes() + bytes([0x80 | 15] + [0x88] * 15)
    values = gguf.dequantize_rows("Q4_0", torch.tensor(list(block), dtype=torch.uint8), 32)
    assert values.tolist() == [[3.5] + [0.0] * 31]


def test_a_q6_0_block_by_hand() -> None:
    """From the ik quants spec: weight 0 has low nibble 5 and high bits 2, weight 16 low nibble 1 and high bits 3."""
    high = bytes([2 | 3 << 2] + [0] * 7)
    block = np.float16(2).tobytes() + high + bytes([5 | 1 << 4] + [0] * 15)
    values = gguf.dequantize_rows("Q6_0", torch.tensor(list(block), dtype=torch.uint8), 32)[0]
    assert values[0] == 2 * (5 + 32 - 32)
    assert values[16] == 2 * (1 + 48 - 32)
    assert values[1] == -64


def test_a_q1_0_block_by_hand() -> None:
    block = np.float16(0.25).tobytes() + bytes([0b101] + [0] * 15)
    values = gguf.dequantize_rows("Q1_0", torch.tensor(list(block), dtype=torch.uint8), 128)[0]
    assert values.tolist() == [0.25, -0.25, 0.25] + [-0.25] * 125


def test_types_of_the_fork_are_the_ik_module() -> None:
    packed = rows_of("IQ4_KSS", 7)
    want = ik.dequantize("IQ4_KSS", packed, (5, 512))
    assert torch.equal(gguf.dequantize_rows("iq4_kss", packed, 512).nan_to_num(), want.nan_to_num())


def test_floats() -> None:
    values = torch.tensor([[1.5, -2.0]])
    for kind, dtype in (("F32", torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16)):
        assert torch.equal(gguf.dequantize_rows(kind, values.to(dtype).view(torch.uint8), 2), values)


def test_what_cannot_be_decoded() -> None:
    with pytest.raises(FormatError, match="found 48 columns; wanted a multiple of 32"):
        gguf.dequantize_rows("Q8_0", torch.zeros(51, dtype=torch.uint8), 48)
    with pytest.raises(FormatError, match="wanted uint8, rows of 34 bytes"):
        gguf.dequantize_rows("Q8_0", torch.zeros(33, dtype=torch.uint8), 32)
    with pytest.raises(UnsupportedError, match="IQ2_BN can be copied and not decoded"):
        gguf.dequantize_rows("IQ2_BN", torch.zeros(20, dtype=torch.uint8), 64)
    with pytest.raises(UnsupportedError, match=r"blk\.0: tensor type Q4_K_R4"):
        gguf.dequantize({"weight": torch.zeros(4 * 144, dtype=torch.uint8)}, ("Q4_K_R4", (4, 256)), "blk.0")


def test_decoders_cover_every_type_but_the_opaque() -> None:
    opaque = {name for name in TYPES if name not in gguf.DECODABLE}
    plain = {"I8", "I16", "I32", "I64", "F64"}
    fork_only = {"IQ1_BN", "IQ2_BN", "Q8_KV"}
    assert opaque == plain | fork_only | {"Q2_0"} | {name for name in TYPES if find_type(name).rows > 1}
