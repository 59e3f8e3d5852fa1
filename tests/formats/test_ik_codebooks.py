"""The fork's types whose codes stand for several weights: random bytes that its own decoder has decoded."""

from __future__ import annotations

import re
from pathlib import Path

import numba
import numpy as np
import pytest
import torch

from recompile.errors import FormatError
from recompile.formats import ik_codebooks
from recompile.formats.gguf import dequantize_rows
from recompile.formats.gguf_encode import quantize_rows
from recompile.formats.gguf_types import find_type

VECTORS = Path(__file__).parents[1] / "vectors" / "ik_codebooks.npz"
TYPES = tuple(ik_codebooks.TYPES)
QUICK = ("IQ2_KL", "IQ2_KT")  # to encode; the rest with scripts/test --all
ENCODED = [name if name in QUICK else pytest.param(name, marks=pytest.mark.sweep) for name in TYPES]


@pytest.mark.parametrize("name", TYPES)
def test_decoding_is_bit_exact(name: str) -> None:
    with np.load(VECTORS) as file:
        packed, decoded = file[f"{name}_packed"], file[f"{name}_decoded"]
    assert packed.shape[1] == find_type(name).row_bytes(decoded.shape[1]) == ik_codebooks.TYPES[name].row_bytes(512)
    for data in (packed, packed.tobytes(), torch.from_numpy(packed)):
        found = ik_codebooks.dequantize(name, data, decoded.shape)
        assert np.array_equal(found.numpy().view(np.int32), decoded.view(np.int32))
    found = dequantize_rows(name, torch.from_numpy(packed).flatten(), decoded.shape[1])
    assert np.array_equal(found.numpy().view(np.int32), decoded.view(np.int32))


@pytest.mark.parametrize("name", TYPES)
def test_many_rows_decode_as_one_row_does(name: str) -> None:
    """More rows than one chunk of weights holds."""
    row_bytes = ik_codebooks.TYPES[name].row_bytes(256)
    packed = torch.randint(0, 256, (600, row_bytes), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    packed[:, : ik_codebooks.TYPES[name].head_bytes] = 60  # a finite d
    whole = ik_codebooks.dequantize(name, packed, (600, 256))
    for row in (0, 511, 512, 599):
        assert torch.equal(ik_codebooks.dequantize(name, packed[row], (1, 256))[0], whole[row])


def test_a_trellis_worked_by_hand() -> None:
    """IQ2_KT: d = 2, level code 8 (1) in the first scale block, code 5: x begins at 5 + 4096."""
    row = torch.zeros(4 + 68, dtype=torch.uint8)
    row[:4] = torch.tensor([2.0]).view(torch.uint8)
    row[4], row[8] = 8, 5
    found = ik_codebooks.dequantize("IQ2_KT", row, (1, 256))[0]
    x = 5 + 4096
    for weight in found[:8].tolist():
        x = x * 0xCBAC1FED % 2**32
        assert weight == 2.0 * (sum(byte & 63 for byte in x.to_bytes(4, "little")) - 126)


def test_wrong_sizes_say_what_was_found_and_wanted() -> None:
    with pytest.raises(FormatError, match="found 100 columns; wanted a multiple of 256"):
        ik_codebooks.dequantize("IQ2_KL", b"", (0, 100))
    with pytest.raises(FormatError, match=re.escape("IQ4_KT: found 5 bytes; wanted 132, 1 rows of 132 bytes")):
        ik_codebooks.dequantize("IQ4_KT", bytes(5), (1, 256))
    with pytest.raises(FormatError, match="found 'IQ9_KT'; wanted one of IQ2_KL"):
        ik_codebooks.dequantize("IQ9_KT", b"", (0, 256))


# ---- encoding --------------------------------------------------------------------------------------------------------

# Weighted squared error over weighted square of the fork's own encoder (ik-llama-cpp-python 0.1.5) on `heavy`
REFERENCE = {"IQ2_KL": 0.05383, "IQ1_KT": 0.12621, "IQ2_KT": 0.07484, "IQ3_KT": 0.01989, "IQ4_KT": 0.00603}


def heavy(rows: int) -> tuple[np.ndarray, np.ndarray]:
    """float32 [rows, 1024] with outliers and rows of several sizes, and importance [1024]."""
    rng = np.random.default_rng(0)
    rng.standard_normal((16, 1024))
    importance = np.exp(rng.standard_normal(1024)).astype(np.float32)
    weight = rng.standard_t(4, (16, 1024)) * 0.02 * np.exp(0.5 * rng.standard_normal((16, 1)))
    return weight.astype(np.float32)[:rows], importance


def error_of(name: str, packed: torch.Tensor, weight: np.ndarray, importance: np.ndarray) -> float:
    decoded = ik_codebooks.dequantize(name, packed, weight.shape).double().numpy()
    return float((importance * (decoded - weight) ** 2).sum() / (importance * weight.astype(float) ** 2).sum())


@pytest.mark.parametrize("name", ENCODED)
def test_encoding_errs_about_as_little_as_the_forks_encoder(name: str) -> None:
    weight, importance = heavy(3)
    packed = quantize_rows(name, torch.from_numpy(weight), torch.from_numpy(importance))
    assert packed.shape == (3, find_type(name).row_bytes(1024))
    assert error_of(name, packed, weight, importance) < 1.12 * REFERENCE[name], "rows differ by some per cent"
    # Columns that count more get less error.
    plain = ik_codebooks.quantize(name, torch.from_numpy(weight))
    assert error_of(name, packed, weight, importance) < error_of(name, plain, weight, importance)


@pytest.mark.parametrize("name", ENCODED)
def test_what_a_file_holds_is_found_again(name: str) -> None:
    """Random codes and levels of one size, decoded and encoded: far less error than on other weights, every field in
    its place."""
    spec = ik_codebooks.TYPES[name]
    generator = torch.Generator().manual_seed(4)
    packed = torch.randint(0, 256, (2, spec.row_bytes(256)), dtype=torch.uint8, generator=generator)
    head = torch.tensor([0.001]).half() if spec.head_bytes == 2 else torch.tensor([0.001])
    packed[:, : spec.head_bytes] = head.view(torch.uint8)
    weight = ik_codebooks.dequantize(name, packed, (2, 256))
    found = ik_codebooks.quantize(name, weight)
    left = error_of(name, found, weight.numpy(), np.ones(256, np.float32))
    assert left < 0.6 * REFERENCE[name]


@pytest.mark.parametrize("name", ["IQ2_KL", pytest.param("IQ4_KT", marks=pytest.mark.sweep)])
def test_rows_are_encoded_alike_on_any_number_of_threads_and_zeros_stay(name: str) -> None:
    weight = torch.from_numpy(heavy(3)[0][:, :512].copy())
    weight[1] = 0
    weight[2, 32:64] = 0
    threads = numba.get_num_threads()
    try:
        numba.set_num_threads(1)
        one = ik_codebooks.quantize(name, weight)
    finally:
        numba.set_num_threads(threads)
    assert torch.equal(one, ik_codebooks.quantize(name, weight))
    assert torch.equal(one[:1], ik_codebooks.quantize(name, weight[:1]))
    decoded = ik_codebooks.dequantize(name, one, (3, 512))
    assert not decoded[1].any()
    assert not decoded[2, 32:64].any()


@pytest.mark.parametrize("size", [1e-6, 1e25])
def test_very_small_and_very_large_weights_are_encoded(size: float) -> None:
    weight = torch.from_numpy(heavy(1)[0][:, :256].copy()) * size
    found = error_of("IQ2_KT", ik_codebooks.quantize("IQ2_KT", weight), weight.numpy(), np.ones(256, np.float32))
    assert found < 1.2 * REFERENCE["IQ2_KT"]
    half = ik_codebooks.dequantize("IQ2_KL", ik_codebooks.quantize("IQ2_KL", weight), (1, 256))
    assert torch.isfinite(half).all(), "whose d is a float16"


def test_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.from_numpy(heavy(3)[0][:, :256].copy())
    wanted = ik_codebooks.quantize("IQ2_KL", weight)
    monkeypatch.setattr(ik_codebooks, "CHUNK_WEIGHTS_ENCODED", 256)
    assert torch.equal(ik_codebooks.quantize("IQ2_KL", weight), wanted)


def test_what_cannot_be_encoded_is_told() -> None:
    with pytest.raises(FormatError, match="found 100 columns; wanted a multiple of 256"):
        ik_codebooks.quantize("IQ2_KL", torch.zeros(1, 100))
    with pytest.raises(FormatError, match="NaN, infinite"):
        ik_codebooks.quantize("IQ1_KT", torch.full((1, 256), torch.nan))
    with pytest.raises(FormatError, match="found 'IQ9_KT'"):
        ik_codebooks.quantize("IQ9_KT", torch.zeros(1, 256))
